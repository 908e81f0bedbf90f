"""make doctor: what it checks is broken on purpose, and it sees it."""

import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, python, refused, run

DOCTOR = "scripts/doctor.py"
README = (ROOT / "modules/01_single_gpu_smoke/readme.md").read_text()
ON_GPU = {"driver", "nvcc", "nccl", "pinned", "load"}
CPU = {"PROFILE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def doctor():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("doctor")
    sys.path.remove(str(ROOT / "scripts"))


def checked(*names, before="", **env) -> dict:
    """Findings of these checks; `before` is shell that breaks something first. A failure exits with 2, all else with 0."""
    command = shlex.join([sys.executable, DOCTOR, "--only", *names, "--json"])
    done = run("bash", "-c", f"{before}\n{command}", **CPU | env)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (2 if any(f["verdict"] == "failed" for f in found.values()) else 0), done.stderr
    assert all(("faq" in f) == (f["verdict"] in ("warning", "failed")) for f in found.values())
    return found


def test_all_checks_on_this_machine(doctor):
    """Nothing fails here; what this machine does not have is never ok."""
    done = run("make", "doctor", check=0)
    lines = {name: verdict for verdict, name in re.findall(r"^(ok|warning|failed|not applicable) +([\w-]+) ", done.stdout, re.M)}
    assert lines.keys() == doctor.CHECKS.keys() and "failed" not in lines.values()
    if not os.path.exists("/proc/driver/nvidia/version"):
        assert {name for name, verdict in lines.items() if verdict == "not applicable"} >= ON_GPU


def test_every_check_has_its_entry_in_the_faq(doctor):
    for name, (_, anchor) in doctor.CHECKS.items():
        assert f'<a id="{anchor}"></a>' in README, name


def test_versions_that_differ_from_the_lock(tree):
    lock = tree / "locks/cpu.txt"
    lock.write_text(re.sub(r"^accelerate==\S+", "accelerate==0.0.1", lock.read_text(), flags=re.M))
    done = run(sys.executable, tree / DOCTOR, "--only", "versions", cwd=tree, PYTHONPATH=str(tree), check=2, **CPU)
    assert "accelerate 1.11.0 instead of 0.0.1" in done.stdout and "#faq-versions" in done.stdout


def test_no_compiler_no_ninja(tmp_path):
    """PATH holds a compiler and no ninja, then the other way round; then both are there, and no place to build in."""
    for name in ("c++", "ninja"):
        other = {"c++": "ninja", "ninja": "c++"}[name]
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(subprocess.run(["which", name], capture_output=True, text=True, check=True, env=os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"}).stdout.strip())
        found = checked("compiler", before=f"export PATH={folder}")["compiler"]
        assert found["verdict"] == "failed" and ("compiler" if other == "c++" else other) in found["found"]
    assert checked("compiler", TORCH_EXTENSIONS_DIR="/dev/null/nowhere")["compiler"]["verdict"] == "failed"


def test_processes_that_cannot_meet():
    found = checked("all-reduce", GLOO_SOCKET_IFNAME="nosuch0")["all-reduce"]
    assert found["verdict"] == "failed" and "gloo" in found["found"]


def test_wrong_sums_and_hangs_are_found(doctor, monkeypatch):
    """The program that both processes run, made to lie and to hang."""
    program = doctor.ALL_REDUCE
    monkeypatch.setattr(doctor, "ALL_REDUCE", program.replace("dist.all_reduce(numbers)", "dist.all_reduce(numbers); numbers[-1] += size > 1000"))
    assert doctor.all_reduce(None) == ("failed", "gloo: 1 of 4000000 numbers are wrong")
    monkeypatch.setattr(doctor, "ALL_REDUCE", program.replace("dist.barrier()", "import time; time.sleep(60 * rank)"))
    monkeypatch.setattr(doctor, "PATIENCE_S", 12)
    assert doctor.all_reduce(None) == ("failed", "gloo: hangs")


def test_little_room(tmp_path):
    """A /dev/shm of 8 MiB, a home of 8 MiB for models, few files: in a mount namespace of its own."""
    inside = f"mount -t tmpfs -o size=8m tmpfs /dev/shm && mount -t tmpfs -o size=8m tmpfs {tmp_path} && ulimit -n 512 && exec "
    command = shlex.join([sys.executable, DOCTOR, "--only", "shared-memory", "disk", "limits", "--json"])
    done = run("unshare", "--mount", "--map-root-user", "bash", "-c", inside + command, check=2, HF_HOME=str(tmp_path), **CPU)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: f["verdict"] for name, f in found.items()} == {"shared-memory": "failed", "disk": "warning", "limits": "warning"}
    assert "512 open files" in found["limits"]["found"] and "0 GB free for models" in found["disk"]["found"]


def test_little_memory(doctor, monkeypatch):
    from lab.profile import load_profile

    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=3 * 2**30))
    verdict, words = doctor.ram(load_profile("cpu"))
    assert verdict == "warning" and words.startswith("3.0 GiB free")


def test_a_taken_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 7860))
        other.listen()
        found = checked("ports")["ports"]
    assert found["verdict"] == "warning" and "7860 (make lf-webui)" in found["found"]
    assert "7860 (" not in checked("ports")["ports"]["found"]


def test_the_hub(tmp_path):
    assert checked("hub", HF_ENDPOINT="http://127.0.0.1:9")["hub"]["verdict"] == "warning"
    with subprocess.Popen([sys.executable, "-m", "http.server", "18099", "--bind", "127.0.0.1"], cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
        time.sleep(1)
        assert checked("hub", HF_ENDPOINT="http://127.0.0.1:18099")["hub"]["verdict"] == "ok"
        server.terminate()


def test_an_orphan():
    """A process that looks like vLLM's worker and whose parent is gone."""
    run("bash", "-c", "(setsid bash -c 'exec -a VLLM::EngineCore-test sleep 120' >/dev/null 2>&1 &); sleep 0.5", check=0)
    try:
        found = checked("orphans")["orphans"]
        assert found["verdict"] == "warning" and "VLLM::EngineCore-test" in found["found"]
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if "VLLM::EngineCore-test" in (process.info["cmdline"] or []):
                process.kill()


def test_exit_codes_and_bad_input():
    flags = ["--only", "hub", "--strict"]
    assert python(DOCTOR, *flags, check=1, HF_ENDPOINT="http://127.0.0.1:9", **CPU).stdout.count("warning") == 2
    assert "there is no check magic" in refused("python", DOCTOR, "--only", "magic")


def test_snapshot(tree):
    """What the doctor finds stands in .CLAUDE.md, once, however often it is written."""
    for _ in range(2):
        run(sys.executable, tree / DOCTOR, "--snapshot", "--only", "limits", "ports", cwd=tree, PYTHONPATH=str(tree), **CPU)
    text = (tree / ".CLAUDE.md").read_text()
    assert text.count("- limits: ok") == 1 and "profile cpu" in text and "transformers 5.6.0" in text
    (tree / ".CLAUDE.md").write_text(text.replace("<!-- snapshot -->", ""))
    assert "no place for a snapshot" in run(sys.executable, tree / DOCTOR, "--snapshot", "--only", "limits", cwd=tree, PYTHONPATH=str(tree), check=2, **CPU).stderr
