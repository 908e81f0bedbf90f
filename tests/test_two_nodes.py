"""One model on two machines: refusals, heads of zeros, and what an interrupted start leaves.

The run itself, with both kinds of parallelism, is the readme's; test_claims.py looks at its
records.
"""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, python, refused

from lab import jobs

MODULE = ROOT / "modules/03_vllm"
SCRIPT = MODULE / "14_two_nodes.py"


def test_refusals(tmp_path):
    assert "--tokens must be 2 to 256" in refused(
        sys.executable, SCRIPT, "--tokens", "1", PROFILE="cpu"
    )
    assert "the program ip is not installed" in refused(
        sys.executable, SCRIPT, PROFILE="cpu", PATH=str(tmp_path)
    )
    for program in ("ip", "unshare"):
        (tmp_path / program).write_text(
            "#!/bin/sh\necho unshare: unshare failed: Operation not permitted >&2\nexit 1\n"
        )
        (tmp_path / program).chmod(0o755)
    sentence = refused(
        sys.executable, SCRIPT, PROFILE="cpu", PATH=f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}"
    )
    assert (
        "no network namespaces can be made here (unshare: unshare failed: Operation not permitted)"
        in sentence
    )


def test_heads_of_zeros_change_nothing(tmp_path, monkeypatch):
    """3 heads that share one KV head become 6 that share two: other shapes, the same logits; heads
    that are even stay as they are.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(str(MODULE))
    import even_heads

    monkeypatch.setattr(even_heads, "RUNS", tmp_path / "runs")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
    model.save_pretrained(tmp_path / "odd")
    folder = even_heads.with_even_heads(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (
        6,
        2,
        16,
    )
    prompt = torch.arange(20)[None]
    with torch.inference_mode():
        assert (
            LlamaForCausalLM.from_pretrained(folder)(prompt).logits - model(prompt).logits
        ).abs().max() < 1e-5
    assert even_heads.with_even_heads(folder) == folder


@pytest.mark.long
@pytest.mark.needs("ip")
def test_interrupted_start_leaves_nothing(two_machines):
    """Ctrl+C while both machines start: afterwards no process, and nobody who would keep a
    namespace alive.
    """

    def network(pid) -> int:
        try:
            return os.stat(f"/proc/{pid}/ns/net").st_ino
        except OSError:
            return 0

    python("scripts/stop.py", check=0)
    here = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout
    process = subprocess.Popen(
        [sys.executable, SCRIPT],
        cwd=ROOT,
        env=ENVIRONMENT | {"PROFILE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not {"node0", "node1"} <= jobs.running().keys():
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    time.sleep(10)
    members = [p for name in ("node0", "node1") for p in jobs.members(jobs.running()[name])]
    networks = {network(p.pid) for p in [*members, process]} - {0}
    assert len(networks) == 2 and network(os.getpid()) not in networks, (
        "two machines, neither of them this one"
    )
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err and not jobs.running()
    assert not [p for p in members if p.is_running() and p.status() != "zombie"]
    assert not [pid for pid in psutil.pids() if network(pid) in networks]
    assert (
        subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        == here
    )
