"""What each recipe needs on each card and on the host: arithmetic on names and shapes.

02_what_fits.py prints it, 01_edit.py goes by it, and so does the planner (make plan). Weights are
exact; working memory was measured at 1024 x 1024 and scaled.
"""

import json
import math
import re
import struct
from pathlib import Path

from lab import fail, machine, shown

Tensors = dict[str, dict[str, tuple[int, ...]]]  # {component: {tensor: shape}}

# Where the weights of each component lie, and how they are stored there; from the fastest recipe
# to the slowest.
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
    "model-offload": {c: ("in turn", "bf16") for c in ("transformer", "text_encoder", "vae")},
    "sequential-offload": {c: ("host", "bf16") for c in ("transformer", "text_encoder", "vae")},
}
COMPONENTS = ("transformer", "text_encoder", "vae")
# Working memory of a component at 1024 x 1024, GiB, from the peaks of fp8, nf4 and group-offload on
# an H100. They run one after another.
WORK = {"transformer": 0.9, "text_encoder": 1.1, "vae": 4.3}
FILE = 5.0  # GiB: the largest safetensors files of such models
LIBRARIES = 2.0  # GiB of host memory for Python, torch and the CUDA libraries

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
    shapes = [shape for component in tensors.values() for shape in component.values()]
    return 2 * sum(map(math.prod, shapes)) / 1e9


# -----------------------------------------------------------------------------
# What they need


def stored_bytes(name: str, shape: tuple[int, ...], how: str) -> float:
    count = math.prod(shape)
    # enable_layerwise_casting leaves norms and the output layer alone.
    if how == "fp8" and not re.search(r"norm|proj_out", name):
        return count
    if how == "nf4" and len(shape) == 2 and not re.search(r"embed_tokens|lm_head", name):
        return count * (4 + 32 / 64) / 8  # 4 bits, and a float32 scale for 64 numbers
    if how == "gguf" and len(shape) == 2:
        return count * 13.1 / 20.43  # a Q4_K_M file of this transformer has 13.1 GB
    if how == "pinned":  # torch rounds page-locked host memory up to a power of two
        return 2 ** math.ceil(math.log2(2 * count))
    return count * (4 if how == "float32" else 2)


def stored_gib(component: dict[str, tuple[int, ...]], how: str) -> float:
    return sum(stored_bytes(name, shape, how) for name, shape in component.items()) / 2**30


def working_memory(recipe: str, size: int) -> dict[str, float]:
    """{component: GiB} while it runs, for a picture of size x size."""
    tokens = 4096 + size**2 / 256  # of the input at 1 megapixel, and of the output
    # The VAE encodes the input at 1 megapixel, whatever `size` is; nf4 goes in tiles of 512 x 512.
    pictures = 1 / 4 if recipe == "nf4" else max(1, size**2 / 2**20)
    return {
        "transformer": WORK["transformer"] * tokens / 8192,
        "text_encoder": WORK["text_encoder"],
        "vae": WORK["vae"] * pictures,
    }


def needs(recipe: str, tensors: Tensors, size: int, device: str = "cuda") -> dict[str, float]:
    """{place: GiB}: weights and working memory of every card, and the most that the host holds.

    The host holds most while the model is loaded, or with an offloaded one all the time.
    """
    work = working_memory(recipe, size)
    places = dict.fromkeys(COMPONENTS, ("host", "float32"))
    gib: dict[str, float] = {"host": LIBRARIES}
    if device == "cuda":
        places = (RECIPES | PLANNED)[recipe]
        gib["cuda:0"] = 0
    for component, (place, how) in places.items():
        weights = stored_gib(tensors[component], how)
        if place == "in turn":  # lies on the host, and whole on the card while it runs
            gib["cuda:0"] = max(gib["cuda:0"], weights + work[component])
            place = "host"
        gib[place] = gib.get(place, 0) + weights
    for card in gib.keys() - {"host"}:
        running = [work[c] for c, (place, _) in places.items() if place in (card, "host")]
        gib[card] += max(running, default=0)
    if recipe == "fp8":  # loaded as bf16, then cast
        gib["host"] += stored_gib(tensors["transformer"], "bf16")
    elif device == "cuda" and "offload" not in recipe:  # one file after another, on its way
        gib["host"] += FILE
    return gib


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
