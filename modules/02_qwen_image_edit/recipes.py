"""The recipes: where the weights of each component lie, and how they are stored there.

What a recipe needs on each card and on the host is arithmetic on names and shapes of tensors
(lab/planner/images.py). 02_what_fits.py prints it, 01_edit.py goes by it, and so does the planner
(make plan).
"""

import json
import struct
from pathlib import Path

from lab import fail, machine, shown
from lab.planner import images
from lab.planner.images import Tensors, stored_gib

COMPONENTS = ("transformer", "text_encoder", "vae")

# {recipe: {component: (place, how its weights are stored there)}}, from the fastest to the slowest.
RECIPES = {
    "plain": {
        "transformer": ("cuda:0", "bf16"),
        "text_encoder": ("cuda:0", "bf16"),
        "vae": ("cuda:0", "bf16"),
    },
    "fp8": {
        "transformer": ("cuda:1", "fp8"),
        "text_encoder": ("cuda:0", "bf16"),
        "vae": ("cuda:0", "bf16"),
    },
    "nf4": {
        "transformer": ("cuda:0", "nf4"),
        "text_encoder": ("cuda:0", "nf4"),
        "vae": ("cuda:0", "bf16"),
    },
    "group-offload": {
        "transformer": ("host", "pinned"),
        "text_encoder": ("host", "bf16"),
        "vae": ("cuda:0", "bf16"),
    },
}
# What diffusers can do besides, and 01_edit.py does not: the planner knows it, nobody has run it.
PLANNED = {
    "gguf": {
        "transformer": ("cuda:0", "gguf"),
        "text_encoder": ("cuda:1", "bf16"),
        "vae": ("cuda:0", "bf16"),
    },
    "model-offload": dict.fromkeys(COMPONENTS, ("in turn", "bf16")),
    "sequential-offload": dict.fromkeys(COMPONENTS, ("host", "bf16")),
}
TILED = {"nf4"}  # recipes whose VAE goes in tiles of 512 x 512

# -----------------------------------------------------------------------------
# The tensors of a model


def header(file: Path) -> dict[str, dict]:
    """{tensor: {shape, ...}} of a safetensors file; {} where it is damaged or cut short."""
    with file.open("rb") as f:
        length = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
        text = f.read(length) if length < 100e6 else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in entries.values())
    except ValueError:
        return {}
    return entries if file.stat().st_size == 8 + length + end else {}


def tensors_of(folder: Path) -> Tensors:
    """The tensors in the safetensors files; exit code 2 where a file is missing or cut short."""
    tensors: Tensors = {component: {} for component in COMPONENTS}
    for component in COMPONENTS:
        for file in sorted((folder / component).glob("*.safetensors")):
            entries = header(file)
            if not entries:
                fail(
                    f"{shown(file)} is damaged or not fully downloaded: "
                    "remove it and get the model again"
                )
            for name, entry in entries.items():
                tensors[component][name] = tuple(entry["shape"])
        if not tensors[component]:
            fail(
                f"the model folder {shown(folder)} has no weights in {component}/: "
                "get the model again"
            )
    return tensors


def published() -> Tensors:
    """tensors_of(Qwen/Qwen-Image-Edit) from shapes.json.

    There, tensors of equal shape in repeated blocks are one line: name, how many, shape.
    """
    content = json.loads(Path(__file__).with_name("shapes.json").read_text())
    tensors: Tensors = {component: {} for component in content}
    for component, lines in content.items():
        for line, (name, count, shape) in enumerate(lines):
            for number in range(count):
                tensors[component][f"{name}#{line}.{number}"] = tuple(shape)
    return tensors


def weights_gb(tensors: Tensors) -> float:
    """GB of the bf16 files."""
    return sum(stored_gib(component, "bf16") for component in tensors.values()) * 2**30 / 1e9


# -----------------------------------------------------------------------------
# What a recipe needs, and whether it fits here


def needs(recipe: str, tensors: Tensors, size: int, device: str = "cuda") -> dict[str, float]:
    """{place: GiB}: weights and working memory of every card, and the most that the host holds."""
    if device == "cpu":
        on_cpu = dict.fromkeys(COMPONENTS, ("host", "float32"))
        return {"host": images.on_host(on_cpu, tensors)}
    work = images.working_memory(size, tiled=recipe in TILED)
    return images.needs((RECIPES | PLANNED)[recipe], tensors, work)


def lacking(
    recipe: str, tensors: Tensors, size: int, free: dict[str, float], device: str = "cuda"
) -> str:
    """What this machine lacks for the recipe; "" where it fits."""
    lacks = []
    for place, gib in sorted(needs(recipe, tensors, size, device).items()):
        if gib > free.get(place, 0):
            there = f"{free[place]:.1f} free" if place in free else "no such card"
            lacks.append(f"{gib:.1f} GiB on {place} ({there})")
    return " and ".join(lacks)


def free_memory(device: str) -> dict[str, float]:
    """{place: GiB} of the host and the cards, on a card no more than MEMORY_CAP_GIB."""
    import psutil

    free = {"host": psutil.virtual_memory().available / 2**30}
    if device == "cuda":
        import torch

        for card in range(torch.cuda.device_count()):
            gib = torch.cuda.mem_get_info(card)[0] / 2**30
            free[f"cuda:{card}"] = min(gib, machine.memory_cap_gib() or gib)
    return free
