"""make doctor: what it checks is broken on purpose, and it sees it."""

import importlib
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
import types

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, python, refused, run
from readmes import BLOCKS

DOCTOR = "scripts/doctor.py"
FAQ = (ROOT / "modules/01_single_gpu_smoke/faq.md").read_text()
ON_GPU = {"driver", "triton", "nvcc", "nccl", "iommu", "pinned", "desktop", "load", "xid"}
CARD = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 24, "reserved_gib": 0.4}
CPU = {"PROFILE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def doctor():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("doctor")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def cards(doctor, monkeypatch):
    """The checks of cards on a described machine: cards, the lock, CUDA_VISIBLE_DEVICES."""
    from lab import machine

    monkeypatch.syspath_prepend(ROOT / "tests/fakes")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)

    def describe(*descriptions, lock="gpu", visible=None):
        monkeypatch.setenv("FAKE_CARDS", json.dumps(descriptions))
        monkeypatch.setattr(machine, "lock", lambda: lock)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        machine.cards.cache_clear()
        return doctor.cards

    yield describe
    machine.cards.cache_clear()


def program(folder, name: str, script: str):
    """An executable shell script of this name in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def serve(utilization: float):
    """A profile of which the check reads only vLLM's share of the memory."""
    return types.SimpleNamespace(
        serve=types.SimpleNamespace(args={"gpu-memory-utilization": utilization})
    )


def checked(*names, before="", **env) -> dict:
    """What these checks found (exit code 2 for a failure); `before`: shell that breaks a thing."""
    command = shlex.join([sys.executable, DOCTOR, "--only", *names, "--json"])
    done = run("bash", "-c", f"{before}\n{command}", **CPU | env)
    findings = json.loads(done.stdout.splitlines()[-1])
    verdicts = [finding["verdict"] for finding in findings.values()]
    assert done.returncode == (2 if "failed" in verdicts else 0), done.stderr
    for finding in findings.values():
        assert ("faq" in finding) == (finding["verdict"] in ("warning", "failed"))
    return findings


SLOW = {"compiler", "torch-compile", "all-reduce"}


def test_checks_on_this_machine(doctor):
    """Nothing fails here; what this machine does not have is never ok.

    The whole `make doctor`, with those that compile or start processes, is the readme's block.
    """
    names = [name for name in doctor.CHECKS if name not in SLOW]
    out = run("make", "doctor", f"ARGS=--only {' '.join(names)}", check=0).stdout
    shown = re.findall(r"^(ok|warning|failed|not applicable) +([\w-]+) ", out, re.M)
    verdicts = {name: verdict for verdict, name in shown}
    assert list(verdicts) == names and "failed" not in verdicts.values()
    if not os.path.exists("/proc/driver/nvidia/version"):
        absent = {name for name, verdict in verdicts.items() if verdict == "not applicable"}
        assert absent >= ON_GPU


def test_the_readme_runs_them_all():
    (block,) = [b for b in BLOCKS if b.code.strip() == "make doctor"]
    assert block.mark == ""


def test_every_check_has_its_entry_in_the_faq(doctor):
    for name, (_, anchor) in doctor.CHECKS.items():
        assert f'<a id="{anchor}"></a>' in FAQ, name


def test_versions_that_differ_from_the_lock(tree):
    lock = tree / "locks/cpu.txt"
    lock.write_text(re.sub(r"^accelerate==\S+", "accelerate==0.0.1", lock.read_text(), flags=re.M))
    done = run(
        sys.executable,
        tree / DOCTOR,
        "--only",
        "versions",
        cwd=tree,
        PYTHONPATH=str(tree),
        check=2,
        **CPU,
    )
    assert "accelerate 1.11.0 instead of 0.0.1" in done.stdout and "#faq-versions" in done.stdout


def test_versions_go_by_the_lock_not_by_the_cards(cards, doctor):
    cards(CARD, lock="cpu")
    assert doctor.software.versions(None)[0] == "ok"
    cards(lock="gpu")
    verdict, reason = doctor.software.versions(None)
    assert verdict == "failed" and "locks/gpu.txt" in reason


def test_a_path_that_compilers_cannot_cope_with(tmp_path):
    """A cache with a blank; then the environment, called through a link in such a folder."""
    finding = checked("path", TORCHINDUCTOR_CACHE_DIR="/tmp/a b")["path"]
    assert finding["verdict"] == "failed"
    assert "TORCHINDUCTOR_CACHE_DIR: /tmp/a b" in finding["found"]
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/venv").symlink_to(sys.prefix)
    done = run(tmp_path / "a b/venv/bin/python", DOCTOR, "--only", "path", check=2, **CPU)
    assert "the environment" in done.stdout and "a b/venv" in done.stdout


def test_no_c_compiler_no_headers(doctor, monkeypatch, tmp_path):
    """The C compiler away, broken, absent; the headers away, as in a Python of the distribution."""
    assert doctor.software.headers(None)[0] == "ok"
    monkeypatch.setattr(doctor.software.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    verdict, reason = doctor.software.headers(None)
    assert verdict == "failed" and "no Python.h" in reason and "Triton" in reason
    monkeypatch.undo()
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", "echo broken >&2; exit 1") / "cc"))
    assert "cannot compile against Python.h: broken" in doctor.software.headers(None)[1]
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "does not run" in doctor.software.headers(None)[1]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "no C compiler" in doctor.software.headers(None)[1]


def test_no_compiler_no_ninja(doctor, monkeypatch, tmp_path):
    """Each of them away; ninja in the environment only is found; no place to build in."""
    bare = program(tmp_path, "c++", "exit 1")
    monkeypatch.setenv("PATH", str(bare))
    assert "no ninja" in doctor.software.compiler(None)[1]
    (bare / "c++").unlink()
    assert "no C++ compiler" in doctor.software.compiler(None)[1]
    program(tmp_path, "c++", f'exec {shutil.which("c++", path=ENVIRONMENT["PATH"])} "$@"')
    before = f"export PATH={bare}"
    nowhere = {"TORCH_EXTENSIONS_DIR": "/dev/null/nowhere"}
    finding = checked("compiler", before=before, **nowhere)["compiler"]
    assert finding["verdict"] == "failed" and "ninja" not in finding["found"]


def test_the_lock_of_a_killed_build(tmp_path):
    folder = tmp_path / "py311_cpu/cpu_adam"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - 700,) * 2)
    finding = checked("compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))["compiler"]
    assert finding["verdict"] == "failed" and f"rm {folder / 'lock'}" in finding["found"]


def test_torch_compile_without_a_compiler(tmp_path):
    broken = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    finding = checked("torch-compile", **broken)["torch-compile"]
    assert finding["verdict"] == "failed" and "torch.compile" in finding["found"]


def test_triton_without_a_card(cards, doctor):
    """Here no card is behind the description: the kernel cannot run, and that is said."""
    cards(CARD)
    assert doctor.software.triton(None)[0] == "failed"


def test_nvcc(cards, doctor, monkeypatch, tmp_path):
    """Absent and not needed, absent and called, of another CUDA, broken, and right."""
    nvcc, cuda = doctor.software.nvcc, "exit 0"
    cards(CARD)
    monkeypatch.setattr(doctor.software, "program", lambda *name, timeout_s: (0, "13.0"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    assert nvcc(None)[0] == "not applicable" and "no stage needs it" in nvcc(None)[1]
    cards(CARD | {"capability": [9, 0]})
    assert nvcc(None)[0] == "warning" and "DeepGEMM" in nvcc(None)[1]
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    assert nvcc(None)[0] == "warning" and "FlashInfer's sampler" in nvcc(None)[1]
    for release, cuda, expected in (
        ("12.4", "exit 0", ("warning", "take it off PATH")),
        ("13.0", "exit 1", ("warning", "compiles nothing")),
        ("13.0", "exit 0", ("ok", "compiles a kernel")),
    ):
        script = f'[ "$1" = --version ] && echo release {release}, && exit 0; {cuda}'
        program(tmp_path, "nvcc", script)
        verdict, reason = nvcc(None)
        assert verdict == expected[0] and expected[1] in reason
    cards(CARD, lock="cpu")
    assert nvcc(None) == (
        "not applicable",
        "1 NVIDIA GPU(s), not used by the cpu lock and this profile",
    )


# -----------------------------------------------------------------------------
# Cards: described by tests/fakes/pynvml.py and a /sys of their own


TOOLS = ("bash", "cut", "grep", "head", "id", "sed", "timeout", "uname")  # and no nvidia-smi


def machine_root(root, *, vendor="0x10de", kind="0x030000"):
    """A root directory of which scripts/machine.sh reads /sys: one PCI device."""
    device = root / "sys/bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    return root


@pytest.fixture
def path(monkeypatch, tmp_path):
    """A folder that is the whole PATH: what machine.sh calls, and what a test adds."""
    folder = tmp_path / "path"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.mark.parametrize(
    ("files", "nvidia_smi", "remedy"),
    [
        ([], None, "an NVIDIA card is here, but not its driver"),
        (["sys/module/nouveau"], None, "nouveau, which cannot compute"),
        ([], "Failed to initialize NVML: Driver/library version mismatch", "still loaded"),
        ([".dockerenv"], None, "--gpus all"),
        (["dev/dxg"], "NVIDIA-SMI has failed", "driver in Windows"),
    ],
)
def test_a_card_without_a_working_driver(
    cards, monkeypatch, tmp_path, path, files, nvidia_smi, remedy
):
    """Failed under the gpu lock, a warning under the cpu lock, with the remedy of its cause."""
    monkeypatch.setenv("FAKE_NVML_ERROR", "Driver Not Loaded")
    monkeypatch.setenv("MACHINE_ROOT", str(machine_root(tmp_path)))
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    if nvidia_smi:
        program(path, "nvidia-smi", f"echo '{nvidia_smi}'; exit 18")
    for lock, expected in (("gpu", "failed"), ("cpu", "warning")):
        verdict, reason = cards(lock=lock).driver(None)
        assert verdict == expected and remedy in reason


@pytest.mark.parametrize("other", [{"vendor": "0x1002"}, {"kind": "0x040300"}])
def test_no_nvidia_card_is_no_failure(cards, monkeypatch, tmp_path, path, other):
    """Another maker's card, and the sound of an NVIDIA card that a virtual machine has."""
    monkeypatch.setenv("MACHINE_ROOT", str(machine_root(tmp_path, **other)))
    profile = types.SimpleNamespace(device="cpu")
    assert cards(lock="cpu").driver(profile) == ("not applicable", "no NVIDIA GPU")
    verdict, reason = cards(lock="gpu").driver(profile)
    assert verdict == "failed" and "make setup LOCK=cpu" in reason


def test_a_card_that_the_cpu_lock_leaves_alone(cards, monkeypatch, tmp_path, path):
    monkeypatch.setenv("MACHINE_ROOT", str(machine_root(tmp_path)))
    program(path, "nvidia-smi", "echo 'GPU 0: NVIDIA GeForce RTX 4090'")
    verdict, reason = cards(CARD, lock="cpu").driver(None)
    assert verdict == "not applicable" and "not used by the cpu lock" in reason


def test_wsl(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.cards, "PROC", tmp_path)
    (tmp_path / "version").write_text("Linux version 6.6.87.2-microsoft-standard-WSL2")
    assert doctor.cards.wsl(None)[0] == "warning"
    (tmp_path / "version").write_text("Linux version 6.8.0-51-generic")
    assert doctor.cards.wsl(None)[0] == "not applicable"


def test_driver_and_torch(cards, monkeypatch):
    """Too old, wrong numbers, another count; right with one card, and with two used of four."""
    checks = cards(CARD)
    for answer, driver_cuda, verdict, part in (
        ((0, "13.0 1"), "13000", "ok", "on 1 card(s)"),
        ((0, "13.0 1"), "12080", "failed", "too old"),
        ((0, "13.0 2"), "13000", "failed", "torch sees 2 cards of 1"),
        ((1, "cuda:0 computes wrong numbers"), "13000", "failed", "wrong numbers"),
    ):
        monkeypatch.setattr(checks, "program", lambda name, timeout_s, answer=answer: answer)
        monkeypatch.setenv("FAKE_CUDA", driver_cuda)
        finding = checks.driver(None)
        assert finding[0] == verdict and part in finding[1]
    monkeypatch.setenv("FAKE_CUDA", "13000")
    monkeypatch.setattr(checks, "program", lambda name, timeout_s: (0, "13.0 2"))
    assert cards(*[CARD] * 4, visible="2,3").driver(None)[0] == "ok"


def test_one_card_is_no_failure(cards, doctor):
    cards(CARD)
    checks = doctor.links
    assert checks.nccl(None) == checks.iommu(None) == ("not applicable", "one NVIDIA GPU")


def test_p2p_that_hangs(cards, doctor, monkeypatch):
    """A warning where only P2P is at fault, a failure where the way without it is."""
    cards(*[CARD] * 2)
    checks = doctor.links
    monkeypatch.setattr(
        checks, "pair", lambda *a, NCCL_P2P_DISABLE: "hangs" if NCCL_P2P_DISABLE == "0" else ""
    )
    assert checks.nccl(None) == (
        "warning",
        "cards 0 and 1, P2P on: hangs; the profile keeps P2P off",
    )
    monkeypatch.setattr(checks, "pair", lambda *a, NCCL_P2P_DISABLE: "hangs")
    assert checks.nccl(None) == ("failed", "cards 0 and 1, P2P off: hangs")


def test_memory_that_others_hold(cards, monkeypatch):
    """On the fourth of four cards: the right one is named, its owner, and what still starts."""
    from lab import jobs

    owner = {"pid": os.getpid(), "gib": 3}
    held = CARD | {"used_gib": 3, "processes": [owner]}
    checks = cards(CARD, CARD, CARD, held, visible="2,3")
    verdict, reason = checks.desktop(serve(0.9))
    name = psutil.Process().name()
    assert verdict == "warning" and f"card 1: 3.0 of 23.6 GiB held by {name}" in reason
    assert "up to 0.85 starts" in reason and "0.9 is refused" in reason
    assert "0.85 starts" in checks.desktop(serve(0.85))[1]
    assert cards(CARD, CARD, CARD, held, visible="0,1").desktop(serve(0.9))[0] == "ok"
    monkeypatch.setattr(jobs, "running", lambda: {"vllm": {}})
    monkeypatch.setattr(jobs, "members", lambda job: [types.SimpleNamespace(pid=os.getpid())])
    assert cards(held).desktop(serve(0.9))[0] == "ok", "a job of ours"


def bridge_config(control: int) -> bytes:
    """PCIe configuration: at 0x100 another capability, at 0x148 ACS with this control word."""
    content = bytearray(4096)
    struct.pack_into("<I", content, 0x100, 0x0001 | 0x148 << 20)
    struct.pack_into("<IHH", content, 0x148, 0x000D, 0, control)
    return bytes(content)


def test_iommu_and_acs(cards, doctor, monkeypatch, tmp_path):
    """Nothing on; an IOMMU that translates, ACS at a bridge; both harmless while P2P is off."""
    cards(*[CARD] * 2)
    checks = doctor.links
    monkeypatch.setattr(checks, "SYS", tmp_path)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    for number in (1, 2):
        bridge = tmp_path / f"devices/pci0000:00/0000:00:0{number}.0"
        card = bridge / f"0000:0{number}:00.0"
        (card / "iommu_group").mkdir(parents=True)
        (card / "iommu_group/type").write_text("identity\n")
        (bridge / "config").write_bytes(bridge_config(0b1))
        (tmp_path / "bus/pci/devices" / card.name).symlink_to(card)
    assert checks.iommu(None) == ("ok", "no IOMMU translates for the cards, ACS redirects nothing")
    (card / "iommu_group/type").write_text("DMA-FQ\n")
    (bridge / "config").write_bytes(bridge_config(0b11101))
    verdict, reason = checks.iommu(None)
    assert (
        verdict == "warning"
        and "translates for card 1" in reason
        and "ACS redirects at 0000:00:02.0" in reason
    )
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert checks.iommu(None)[0] == "ok" and "no harm" in checks.iommu(None)[1]
    (card / "iommu_group/type").write_text("identity\n")
    (bridge / "config").write_bytes(bytes(64))
    assert "root only" in checks.iommu(None)[1], "what a user may read ends at byte 64"


def test_xid(cards, monkeypatch, tmp_path):
    checks = cards(CARD)
    line = "[  9.1] NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."
    folder = program(tmp_path, "dmesg", f"cat <<'END'\n{line}\nEND")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    verdict, reason = checks.xid(None)
    assert verdict == "warning" and reason.startswith(
        "Xid 79 at 0000:01:00: the card fell off the bus"
    )
    program(tmp_path, "dmesg", "echo '[ 0.0] Linux version'")
    assert checks.xid(None)[0] == "ok"
    program(
        tmp_path,
        "dmesg",
        "echo dmesg: read kernel buffer failed: Operation not permitted >&2; exit 1",
    )
    program(tmp_path, "journalctl", "exit 0")
    assert checks.xid(None) == (
        "not applicable",
        "the kernel log cannot be read: sudo dmesg | grep Xid",
    )


@pytest.mark.parametrize(
    ("busy", "problem"),
    [
        ({}, None),
        ({"lanes": 4}, "runs at PCIe 4 x4, it could PCIe 4 x16"),
        ({"generation": 3, "lanes": 16}, "runs at PCIe 3 x16"),
        ({"limit": 300}, "is limited to 300 of 450 W"),
        ({"reasons": 0x20, "celsius": 88}, "is throttled by heat (88 C)"),
        ({"reasons": 0x80}, "is throttled by its power supply"),
    ],
)
def test_under_load(cards, busy, problem):
    """x8 and clocks held by the power limit are what healthy cards show; the others are not."""
    import pynvml

    checks = cards(CARD | {"busy": busy})
    problems = checks.under_load(pynvml, 0)[1]
    assert problems == [] if problem is None else problem in problems[0]


# -----------------------------------------------------------------------------
# The host


def test_processes_that_cannot_meet():
    finding = checked("all-reduce", GLOO_SOCKET_IFNAME="nosuch0")["all-reduce"]
    assert finding["verdict"] == "failed" and "gloo" in finding["found"]


def test_wrong_sums_and_hangs_are_found(doctor, monkeypatch, tmp_path):
    """The program that both processes run, made to lie and to hang."""
    programs = doctor.links.PROGRAMS.read_text()
    other = tmp_path / "programs.py"
    monkeypatch.setattr(doctor.links, "PROGRAMS", other)
    lie = "dist.all_reduce(numbers)\n        numbers[-1] += size > 1000"
    other.write_text(programs.replace("dist.all_reduce(numbers)", lie))
    assert doctor.links.all_reduce(None) == ("failed", "gloo: 1 of 4000000 numbers are wrong")
    other.write_text(programs.replace("dist.barrier()", "time.sleep(60 * int(rank))"))
    monkeypatch.setattr(doctor.links, "PATIENCE_S", 12)
    assert doctor.links.all_reduce(None) == ("failed", "gloo: hangs")


def test_little_room(tmp_path):
    """8 MiB of /dev/shm, 8 MiB of room for models, few files: in a mount namespace of its own."""
    small = "mount -t tmpfs -o size=8m tmpfs"
    inside = f"{small} /dev/shm && {small} {tmp_path} && ulimit -n 512 && exec "
    command = shlex.join(
        [sys.executable, DOCTOR, "--only", "shared-memory", "disk", "limits", "--json"]
    )
    done = run(
        "unshare",
        "--mount",
        "--map-root-user",
        "bash",
        "-c",
        inside + command,
        check=2,
        HF_HOME=str(tmp_path),
        **CPU,
    )
    finding = json.loads(done.stdout.splitlines()[-1])
    assert {name: f["verdict"] for name, f in finding.items()} == {
        "shared-memory": "failed",
        "disk": "warning",
        "limits": "warning",
    }
    assert (
        "512 open files" in finding["limits"]["found"]
        and "0 GB free for models" in finding["disk"]["found"]
    )


def test_little_memory(doctor, monkeypatch):
    from lab.profile import load_profile

    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=3 * 2**30))
    verdict, reason = doctor.host.ram(load_profile("cpu"))
    assert verdict == "warning" and reason.startswith("3.0 GiB free")


def test_a_taken_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 5050))
        other.listen()
        finding = checked("ports")["ports"]
    assert finding["verdict"] == "warning" and "5050 (make monitor's exporter)" in finding["found"]
    assert "5050 (" not in checked("ports")["ports"]["found"]


def test_a_proxy():
    """A proxy that nobody answers at: 127.0.0.1 goes to it, unless the shell says otherwise."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    finding = checked("proxy", **proxy)["proxy"]
    assert (
        finding["verdict"] == "warning"
        and "export no_proxy=127.0.0.1,localhost" in finding["found"]
    )
    assert "127.0.0.1 and localhost go to the proxy" in finding["found"]
    finding = checked("proxy", **proxy | {"no_proxy": "127.0.0.1"})["proxy"]
    assert finding["verdict"] == "warning" and "to localhost go" in finding["found"]
    assert (
        checked("proxy", **proxy | {"no_proxy": "127.0.0.1,localhost"})["proxy"]["verdict"] == "ok"
    )
    assert checked("proxy", http_proxy="")["proxy"]["verdict"] == "not applicable"


def test_the_hub(tmp_path):
    assert checked("hub", HF_ENDPOINT="http://127.0.0.1:9")["hub"]["verdict"] == "warning"
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "18099", "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    ) as server:
        time.sleep(1)
        assert checked("hub", HF_ENDPOINT="http://127.0.0.1:18099")["hub"]["verdict"] == "ok"
        server.terminate()


def test_an_orphan():
    """A process that looks like vLLM's worker and whose parent is gone."""
    run(
        "bash",
        "-c",
        "(setsid bash -c 'exec -a VLLM::EngineCore-test sleep 120' >/dev/null 2>&1 &); sleep 0.5",
        check=0,
    )
    try:
        finding = checked("orphans")["orphans"]
        assert finding["verdict"] == "warning" and "VLLM::EngineCore-test" in finding["found"]
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if "VLLM::EngineCore-test" in (process.info["cmdline"] or []):
                process.kill()


def test_exit_codes_and_bad_input():
    flags = ["--only", "hub", "--strict"]
    assert (
        python(DOCTOR, *flags, check=1, HF_ENDPOINT="http://127.0.0.1:9", **CPU).stdout.count(
            "warning"
        )
        == 2
    )
    assert "there is no check magic" in refused("python", DOCTOR, "--only", "magic")


def test_snapshot(tree):
    """What the doctor finds stands in .CLAUDE.md, once, however often it is written."""
    for _ in range(2):
        run(
            sys.executable,
            tree / DOCTOR,
            "--snapshot",
            "--only",
            "limits",
            "ports",
            cwd=tree,
            PYTHONPATH=str(tree),
            **CPU,
        )
    text = (tree / ".CLAUDE.md").read_text()
    assert (
        text.count("- limits: ok") == 1 and "profile cpu" in text and "transformers 5.6.0" in text
    )
    (tree / ".CLAUDE.md").write_text(text.replace("<!-- snapshot -->", ""))
    assert (
        "no place for a snapshot"
        in run(
            sys.executable,
            tree / DOCTOR,
            "--snapshot",
            "--only",
            "limits",
            cwd=tree,
            PYTHONPATH=str(tree),
            check=2,
            **CPU,
        ).stderr
    )
