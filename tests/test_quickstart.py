"""The order of a quickstart: headline results, a failed stage, an interruption, going on. The stages here are stand-ins of a
second each in a copy of the tree; .ci/run runs the real ones."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, python

GOOD = "from lab import results\nresults.finish(__file__, {{'wrong_count': 0, 'vllm_tok_per_s': 7.0, 'ran_s': 1}})\nopen('{log}', 'a').write('x')\n"
TWO = ["--only", "01_single_gpu_smoke", "03_vllm"]


@pytest.fixture
def stages(tree):
    """(tree, script): the headline scripts of 01 and 03 replaced by stand-ins that append to a file each time they run."""
    (tree / "scripts/setup.sh").write_text("#!/bin/sh\n")  # the copy shares this repository's environment
    (tree / ".venv").symlink_to(ROOT / ".venv")

    def script(stage: str):
        return next((tree / "modules" / stage).glob({"01_single_gpu_smoke": "01_smoke.py", "03_vllm": "05_throughput.py"}[stage]))

    for stage in ("01_single_gpu_smoke", "03_vllm"):
        script(stage).write_text(GOOD.format(log=tree / f"{stage}.ran"))
    return tree, script


def quickstart(tree, *args, **kwargs):
    return python("scripts/quickstart.py", *(args or TWO), cwd=tree, PYTHONPATH=str(tree), **kwargs)


def test_all_stages(stages):
    tree, _ = stages
    out = quickstart(tree, check=0).stdout
    assert "2 of 2 stages done" in out and "tokens/s, vLLM" in out
    quickstart(tree, check=0)  # a finished run starts anew
    assert (tree / "03_vllm.ran").read_text() == "xx"


def test_a_failed_stage_is_named_and_the_rest_go_on(stages):
    tree, script = stages
    script("01_single_gpu_smoke").write_text("raise SystemExit('no such card')")
    done = quickstart(tree, check=1)
    assert "FAILED" in done.stdout and "no such card" in done.stdout and "runs/quickstart/01_single_gpu_smoke.log" in done.stdout
    script("01_single_gpu_smoke").write_text(GOOD.format(log=tree / "01_single_gpu_smoke.ran"))
    assert "03_vllm: done before" in quickstart(tree, check=0).stdout
    assert (tree / "03_vllm.ran").read_text() == "x" and (tree / "01_single_gpu_smoke.ran").read_text() == "x"


def test_interrupted_and_resumed(stages):
    tree, script = stages
    script("03_vllm").write_text("import subprocess, time\nprint('hanging', flush=True)\nsubprocess.run(['sleep', '314159'])\n")
    process = subprocess.Popen(
        [sys.executable, "scripts/quickstart.py", *TWO], cwd=tree, env=ENVIRONMENT | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tree / "runs/quickstart/03_vllm.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "hanging" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in out
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "314159"] not in commands, "the interrupted stage's child lives on"
    script("03_vllm").write_text(GOOD.format(log=tree / "03_vllm.ran"))
    assert "01_single_gpu_smoke: done before" in quickstart(tree, check=0).stdout
    assert (tree / "01_single_gpu_smoke.ran").read_text() == "x"
    assert json.loads((tree / "runs/quickstart/summary.json").read_text())["finished"]


def test_unknown_stage(stages):
    assert "unknown stage 99" in quickstart(stages[0], "--only", "99", check=2).stderr
