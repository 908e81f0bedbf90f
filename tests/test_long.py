"""Slow proofs: a clone set up from nothing in an awkward place; everything again without a network."""

import os
import subprocess

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.long


def namespaces() -> bool:
    return subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(1500)
def test_clone_in_an_awkward_place(tmp_path):
    """git clone, make setup and pytest -m smoke under a path with a space and Chinese characters, HOME read-only."""
    clone = tmp_path / "克隆 of it"
    run("git", "clone", "-q", ROOT, clone, check=0)
    environment = {"PATH": os.environ["PATH"].replace(str(ROOT), "/nowhere"), "HOME": "/proc", "VIRTUAL_ENV": ""}
    assert "done" in run("make", "setup", cwd=clone, timeout=1200, check=0, **environment).stdout
    assert "up to date" in run("make", "setup", cwd=clone, check=0, **environment).stdout
    out = run(".venv/bin/python", "-m", "pytest", "-m", "smoke", "-q", cwd=clone, timeout=600, check=0, **environment).stdout
    assert "passed" in out and "failed" not in out


@pytest.mark.timeout(900)
@pytest.mark.needs("ip")
@pytest.mark.skipif(not namespaces() and os.environ.get("CI") != "true", reason="needs the right to make a network namespace")
def test_second_run_offline(small_model):
    """What ran once runs again in a network namespace that holds nothing but loopback."""
    run("make", "stop", check=0)
    script = "ip link set lo up && make smoke && make vllm-serve && make vllm-chat && make stop"
    done = run("unshare", "--net", "bash", "-euc", script, timeout=600, check=0)
    assert done.stdout.count("Paris") >= 2 and "ended vllm" in done.stdout
