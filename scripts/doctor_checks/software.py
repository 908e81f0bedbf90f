"""What is installed, and what the engines compile while they run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path

from doctor_checks import (
    ABSENT,
    FAILED,
    FOLDER,
    OK,
    WARNING,
    Finding,
    end_of,
    installed_lock,
    no_cards,
    program,
    start,
    used_cards,
)
from lab import ROOT

COMPILE_S = 400  # the first time, beside other busy programs; 40 s and 20 s on an idle machine


def versions(profile) -> Finding:
    """Every package of the lock that fills this environment, in the locked version."""
    lock = installed_lock()
    text = (ROOT / "locks" / f"{lock}.txt").read_text()
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, re.M))
    installed = {}
    for package in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        installed[name] = package.version.split("+")[0]
    wrong = []
    for name, version in wanted.items():
        if installed.get(name) != version.split("+")[0]:
            wrong.append(f"{name} {installed.get(name, 'absent')} instead of {version}")
    if wrong:
        first = ", ".join(wrong[:3])
        return (
            FAILED,
            f"{len(wrong)} of {len(wanted)} packages differ from locks/{lock}.txt: {first}",
        )
    return OK, f"{len(wanted)} packages as in locks/{lock}.txt"


def path(profile) -> Finding:
    """No blank in the paths that PyTorch hands to compilers unquoted: its own, and its caches."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    temporary = tempfile.gettempdir()
    places = {
        "the environment": torch,
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or temporary,
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or cache / "vllm",
    }
    for name, place in places.items():
        if re.search(r"[^\w./@+~=-]", str(place)):
            return FAILED, f"compilers cannot cope with the path of {name}: {place}"
    return OK, "no blank or special character in what compilers are given"


def headers(profile) -> Finding:
    """Three lines of C against Python.h, compiled as Triton compiles its launcher, and imported."""
    users = "Triton (vLLM on a GPU, torch.compile) and CPUAdam need it"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return FAILED, f"no C compiler (gcc or clang on PATH, or CC): {users}"
    include = Path(sysconfig.get_paths()["include"])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"doctor{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = [compiler, FOLDER / "extension.c", "-O3", "-shared", "-fPIC", f"-I{include}"]
        try:
            done = subprocess.run([*command, "-o", library], capture_output=True, text=True)
        except OSError as error:
            return FAILED, f"the C compiler {compiler} does not run ({error.strerror}): {users}"
        if not (include / "Python.h").exists():
            return FAILED, f"no Python.h in {include}: {users}"
        if done.returncode:
            problem = done.stderr.strip()[:100]
            return FAILED, f"{compiler} cannot compile against Python.h: {problem}"
        spec = importlib.util.spec_from_file_location("doctor", library)
        answer = importlib.util.module_from_spec(spec).answer()
    return (OK if answer == 42 else FAILED), f"{compiler} and Python.h: a C module built, imported"


def stale_lock() -> Path | None:
    """The lock file of a build of CPUAdam that began more than ten minutes ago and never ended."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    for lock in root.glob("**/cpu_adam/lock"):
        if time.time() - lock.stat().st_mtime > 600:
            return lock
    return None


def compiler(profile) -> Finding:
    """DeepSpeed's CPUAdam is built (kept for the next time) and steps as torch's Adam does."""
    users = "DeepSpeed cannot build CPUAdam (train-z2-offload)"
    if not shutil.which(os.environ.get("CXX") or "c++"):
        return FAILED, f"no C++ compiler on PATH ({os.environ.get('CXX') or 'c++'}): {users}"
    if not shutil.which("ninja"):
        return FAILED, f"no ninja in the environment or on PATH: {users}"
    if lock := stale_lock():
        return FAILED, f"a build that was killed left its lock, others wait for ever: rm {lock}"
    returncode, last_line = program("cpu_adam", timeout_s=COMPILE_S)
    return (OK if returncode == 0 else FAILED), last_line[:150]


def torch_compile(profile) -> Finding:
    """torch.compile builds C++ for the CPU, and the result computes the same."""
    returncode, last_line = program("torch_compile", timeout_s=COMPILE_S)
    if returncode:
        return FAILED, f"torch.compile (vLLM without --enforce-eager uses it): {last_line[:150]}"
    return OK, last_line[:150]


def triton(profile) -> Finding:
    """A Triton kernel, compiled and launched on every card: vLLM samples by such kernels."""
    if not used_cards():
        return ABSENT, no_cards()
    devices = [f"cuda:{index}" for index in range(len(used_cards()))]
    process = start([FOLDER / "triton_kernel.py", *devices], os.environ)
    returncode, last_line = end_of(process, 120)
    return (OK if returncode == 0 else FAILED), last_line[:150]


def nvcc(profile) -> Finding:
    """No stage needs the CUDA compiler; where one is, it must be of torch's CUDA and work."""
    if not used_cards():
        return ABSENT, no_cards()
    callers = []
    if os.environ.get("VLLM_USE_FLASHINFER_SAMPLER") != "0":
        callers.append(
            "FlashInfer's sampler, vLLM's default (VLLM_USE_FLASHINFER_SAMPLER=0 avoids it)"
        )
    newer = used_cards()[0]["capability"] >= [9, 0]
    if newer and os.environ.get("VLLM_USE_DEEP_GEMM") != "0":
        callers.append("DeepGEMM for block-FP8 models (VLLM_USE_DEEP_GEMM=0 avoids it)")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    compiler = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if not compiler:
        if callers:
            return WARNING, f"no nvcc, but it would be called by {' and by '.join(callers)}"
        return ABSENT, "no nvcc, and no stage needs it (DeepSpeed's FusedAdam, FlashInfer would)"
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    _, cuda = program("cuda_of_torch", timeout_s=60)
    if not release or cuda.split(".")[0] != release[1]:
        version = f"{release[1]}.{release[2]}" if release else "of unknown version"
        return WARNING, f"nvcc {version}, torch is built for CUDA {cuda}: take it off PATH"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-c", FOLDER / "kernel.cu", "-o", Path(folder) / "kernel.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return WARNING, f"{compiler} compiles nothing: {done.stderr.strip()[:120]}"
    return OK, f"nvcc {release[1]}.{release[2]} compiles a kernel; torch is built for CUDA {cuda}"
