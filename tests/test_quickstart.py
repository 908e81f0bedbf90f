"""The order of a quickstart: headline results, a failed stage, an interruption, going on.

The stages here are stand-ins of a second each in a copy of the tree; .ci/run runs the real ones.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, python, run

GOOD = """
from lab import results

results.finish(__file__, {{"wrong_count": 0, "vllm_tok_per_s": 7.0, "ran_s": 1}})
open("{log}", "a").write("x")
"""
HANGING = """
import subprocess

print("hanging", flush=True)
subprocess.run(["sleep", "314159"])
"""
TWO = ["--only", "01_single_gpu_smoke", "03_vllm"]


@pytest.fixture
def stages(tree):
    """(tree, script): the scripts of 01 and 03 are stand-ins that note each time they run."""
    # The copy shares this repository's environment.
    (tree / "scripts/setup.sh").write_text("#!/bin/sh\n")
    (tree / ".venv").symlink_to(ROOT / ".venv")
    headlines = {"01_single_gpu_smoke": "01_smoke.py", "03_vllm": "05_throughput.py"}

    def script(stage: str):
        return tree / "modules" / stage / headlines[stage]

    for stage in headlines:
        script(stage).write_text(GOOD.format(log=tree / f"{stage}.ran"))
    return tree, script


def quickstart(tree, *args, **kwargs):
    return python("scripts/quickstart.py", *(args or TWO), cwd=tree, PYTHONPATH=str(tree), **kwargs)


def test_all_stages(stages):
    tree, _ = stages
    out = quickstart(tree, check=0).stdout
    assert "2 of 2 stages done" in out and "tokens/s, vLLM" in out
    assert "make progress" in out.splitlines()[-1], "the end says where to go on"
    quickstart(tree, check=0)  # a finished run starts anew
    assert (tree / "03_vllm.ran").read_text() == "xx"


def test_a_failed_stage_is_named_and_the_rest_go_on(stages):
    tree, script = stages
    script("01_single_gpu_smoke").write_text("print('working')\nraise RuntimeError('no such card')")
    done = quickstart(tree, check=1)
    assert re.search(r"(?m)^  FAILED after 0:\d\d: no such card$", done.stdout), done.stdout
    assert "whole log: runs/quickstart/01_single_gpu_smoke.log" in done.stdout
    script("01_single_gpu_smoke").write_text(GOOD.format(log=tree / "01_single_gpu_smoke.ran"))
    assert "03_vllm: done before" in quickstart(tree, check=0).stdout
    for stage in ("01_single_gpu_smoke", "03_vllm"):
        assert (tree / f"{stage}.ran").read_text() == "x"


def test_interrupted_and_resumed(stages):
    tree, script = stages
    script("03_vllm").write_text(HANGING)
    process = subprocess.Popen(
        [sys.executable, "scripts/quickstart.py", *TWO],
        cwd=tree,
        env=ENVIRONMENT | {"PYTHONPATH": str(tree), "RUNS": ""},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tree / "runs/quickstart/03_vllm.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "hanging" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "goes on from here" in out
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "314159"] not in commands, "the interrupted stage's child lives on"
    script("03_vllm").write_text(GOOD.format(log=tree / "03_vllm.ran"))
    assert "01_single_gpu_smoke: done before" in quickstart(tree, check=0).stdout
    assert (tree / "01_single_gpu_smoke.ran").read_text() == "x"
    assert json.loads((tree / "runs/quickstart/summary.json").read_text())["finished"]


def test_lines_while_it_works(stages):
    """Which stage, what it does, how far it is; its output stays in a file that is named."""
    tree, script = stages
    file = tree / "scripts/quickstart.py"
    file.write_text(file.read_text().replace("REPORT_EVERY_S = 15", "REPORT_EVERY_S = 1"))
    slow = "import time\nprint('(EngineCore) INFO noise', flush=True)\ntime.sleep(4)\n"
    script("03_vllm").write_text(slow + GOOD.format(log=tree / "03_vllm.ran"))
    out = quickstart(tree, check=0).stdout
    log = r"runs/quickstart/03_vllm\.log"
    assert re.search(rf"\[2/2\] 03_vllm: the same requests .*\n.* {log}\n", out)
    assert re.search(r"(?m)^  \[2/2\] 03_vllm: working, 0:0\d( of usually \d+:\d\d)?$", out)
    assert "noise" not in out and "noise" in (tree / "runs/quickstart/03_vllm.log").read_text()
    out = quickstart(tree, "--only", "03_vllm", check=0).stdout
    took = json.loads((tree / "runs/quickstart/summary.json").read_text())["usual_s"]["03_vllm"]
    assert 4 <= took < 60
    assert "0:0" in out and " of usually 0:" in out, "what it took the first time"


def test_what_is_forgotten(stages):
    """Ticked tasks and readmes leave a stage done, since they change no result; values do not."""
    tree, script = stages
    script("03_vllm").write_text("raise SystemExit('not yet')")
    quickstart(tree, check=1)
    for text in ("modules/01_single_gpu_smoke/PLAN.md", "README.md", ".CLAUDE.md"):
        (tree / text).write_text((tree / text).read_text().replace("- [ ]", "- [x]") + "\n")
    assert "01_single_gpu_smoke: done before" in quickstart(tree, check=1).stdout
    profile = tree / "configs/profiles/cpu.yaml"
    profile.write_text(profile.read_text() + "\n# another value\n")
    assert "01_single_gpu_smoke: done before" not in quickstart(tree, check=1).stdout


def test_arguments_are_not_the_stages(stages):
    """`make quickstart ARGS=...` is for quickstart; make would hand it on to those below it."""
    tree, script = stages
    script("03_vllm").write_text(
        "import sys\nassert not sys.argv[1:], sys.argv\n" + script("03_vllm").read_text()
    )
    command = ["make", "quickstart", "ARGS=--only 03_vllm"]
    out = run(*command, cwd=tree, check=0, PYTHONPATH=str(tree)).stdout
    assert "1 of 1 stages done" in out


def test_one_card(stages, filled):
    """What divides work over two cards has a stand-in on one, and no stage asks for two."""
    tree, _ = stages
    (tree / ".venv").unlink()
    (tree / ".venv").symlink_to(filled("gpu").parent.parent)
    requires = "\nrequires: {gpus: 1, gpu_memory_gib: 22}\n"
    cpu = (tree / "configs/profiles/cpu.yaml").read_text()
    one = re.sub(r"(?m)^ +CUDA_VISIBLE_DEVICES:.*\n", "", cpu) + requires
    (tree / "configs/profiles/one.yaml").write_text(one)
    (tree / "modules/04_Accelerate/01_train_ddp.py").write_text(GOOD.format(log=tree / "one.ran"))
    card = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 23.99, "capability": [8, 9]}
    path = f"{ROOT / 'tests/fakes'}{os.pathsep}{tree}"
    command = ["scripts/quickstart.py", "--only", "04_Accelerate", "05_DeepSpeed"]
    here = {"PROFILE": "one", "FAKE_CARDS": json.dumps([card]), "PYTHONPATH": path}
    out = run(filled("gpu"), *command, cwd=tree, check=0, **here).stdout
    for sentence in ("make train-one;", "make zero-theory;", "2 of 2 stages done"):
        assert sentence in out, out
    assert re.search(r"(?m)^  GB a card of two, 7B, ZeRO-3 +56.0$", out)


def test_unknown_stage(stages):
    assert "unknown stage 99" in quickstart(stages[0], "--only", "99", check=2).stderr
