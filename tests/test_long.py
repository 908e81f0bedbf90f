"""Slow proofs: a clone set up from nothing in an awkward place, and all without a network."""

import os
import subprocess

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.long


def namespaces() -> bool:
    return (
        subprocess.run(
            ["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False
        ).returncode
        == 0
    )


COMPILES = """
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(1000))
optimizer = DeepSpeedCPUAdam([weight], lr=0.1)
weight.grad = torch.ones(1000)
optimizer.step()
total = torch.compile(lambda x: (x + 1).sum())(torch.ones(100))
print("compiled", round(weight[0].item(), 3), total.item())
"""


def test_clone_in_an_awkward_place(tmp_path):
    """git clone, make setup, pytest -m smoke: a blank and Chinese in the path, HOME read-only.

    Nothing is compiled.
    """
    clone = tmp_path / "克隆 of it"
    run("git", "clone", "-q", ROOT, clone, check=0)
    environment = {
        "PATH": os.environ["PATH"].replace(str(ROOT), "/nowhere"),
        "HOME": "/proc",
        "VIRTUAL_ENV": "",
    }
    environment |= {"XDG_DATA_HOME": str(tmp_path / "data"), "TMPDIR": str(tmp_path)}
    empty = {
        "TORCH_EXTENSIONS_DIR": "extensions",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "VLLM_CACHE_ROOT": "vllm",
    }
    environment |= {
        variable: str(tmp_path / "caches" / folder) for variable, folder in empty.items()
    }
    assert "done" in run("make", "setup", cwd=clone, check=0, **environment).stdout
    assert "up to date" in run("make", "setup", cwd=clone, check=0, **environment).stdout
    environment["PATH"] = f"{clone}/.venv/bin:{environment['PATH']}"
    out = run(".venv/bin/python", "-c", COMPILES, cwd=clone, check=0, **environment).stdout
    assert "compiled 0.9 200.0" in out
    assert (tmp_path / "caches/extensions/cpu_adam/cpu_adam.so").exists() and list(
        (tmp_path / "caches/inductor").rglob("*.so")
    )
    out = run(
        ".venv/bin/python",
        "-m",
        "pytest",
        "-m",
        "smoke",
        "-q",
        cwd=clone,
        check=0,
        **environment,
    ).stdout
    assert "passed" in out and "failed" not in out


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not os.environ.get("GPU_LOCK"), reason="downloads several GB: GPU_LOCK=1 make test-long"
)
def test_gpu_lock_is_whole(tmp_path):
    """The gpu lock in a fresh clone: every engine imports and answers on its command line."""
    out = run("scripts/check_lock.sh", tmp_path / "clone", timeout=3500, check=0).stdout
    assert "check: the gpu lock is whole" in out


@pytest.mark.needs("ip")
@pytest.mark.skipif(
    not namespaces() and os.environ.get("CI") != "true",
    reason="needs the right to make a network namespace",
)
def test_second_run_offline(small_model):
    """What ran once runs again in a network namespace that holds nothing but loopback."""
    run("make", "stop", check=0)
    script = "ip link set lo up && make smoke && make vllm-serve && make vllm-chat && make stop"
    done = run("unshare", "--net", "bash", "-euc", script, check=0)
    assert done.stdout.count("Paris") >= 2 and "ended vllm" in done.stdout
