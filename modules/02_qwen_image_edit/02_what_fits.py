"""What each recipe of 01_edit.py needs on each card and on the host: arithmetic on names and shapes, nothing is loaded.

    python modules/02_qwen_image_edit/02_what_fits.py                  # Qwen/Qwen-Image-Edit, beside the memory of this machine
    python modules/02_qwen_image_edit/02_what_fits.py --size 512
    python modules/02_qwen_image_edit/02_what_fits.py --model FOLDER   # another folder of this pipeline

Look at: where the 57.7 GB are, and what of them each recipe leaves on a card. Weights are exact; working memory was measured at 1024 x 1024 and scaled.
"""

import argparse
import json
import math
import re
import struct
from pathlib import Path

from lab import fail, machine, results, shown
from lab.profile import load_profile

# Where the weights of each component lie, and how they are stored there; from the fastest recipe to the slowest.
RECIPES = {
    "plain": {"transformer": ("cuda:0", "bf16"), "text_encoder": ("cuda:0", "bf16"), "vae": ("cuda:0", "bf16")},
    "fp8": {"transformer": ("cuda:1", "fp8"), "text_encoder": ("cuda:0", "bf16"), "vae": ("cuda:0", "bf16")},
    "nf4": {"transformer": ("cuda:0", "nf4"), "text_encoder": ("cuda:0", "nf4"), "vae": ("cuda:0", "bf16")},
    "group-offload": {"transformer": ("host", "pinned"), "text_encoder": ("host", "bf16"), "vae": ("cuda:0", "bf16")},
}
# What diffusers can do besides, and 01_edit.py does not: the planner knows it (make plan), nobody has run it here.
PLANNED = {
    "gguf": {"transformer": ("cuda:0", "gguf"), "text_encoder": ("cuda:1", "bf16"), "vae": ("cuda:0", "bf16")},
    "model-offload": {c: ("in turn", "bf16") for c in ("transformer", "text_encoder", "vae")},
    "sequential-offload": {c: ("host", "bf16") for c in ("transformer", "text_encoder", "vae")},
}
COMPONENTS = ("transformer", "text_encoder", "vae")
# Working memory of a component at 1024 x 1024, GiB, from the peaks of fp8, nf4 and group-offload on an H100. They run one after another.
WORK = {"transformer": 0.9, "text_encoder": 1.1, "vae": 4.3}
FILE = 5.0  # GiB: the largest safetensors files of such models
LIBRARIES = 2.0  # GiB of host memory for Python, torch and the CUDA libraries


def tensors_of(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """{component: {tensor: shape}} from the headers of the safetensors files; exit code 2 where a file is missing or cut short."""
    found: dict[str, dict] = {}
    for component in COMPONENTS:
        for file in sorted((folder / component).glob("*.safetensors")):
            with file.open("rb") as f:
                length = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
                text = f.read(length) if length < 100e6 else b""
            try:
                header = {name: t for name, t in json.loads(text).items() if name != "__metadata__"}
                whole = file.stat().st_size == 8 + length + max(t["data_offsets"][1] for t in header.values())
            except ValueError:
                whole = False
            if not whole:
                fail(f"{shown(file)} is damaged or not fully downloaded: remove it and get the model again")
            found.setdefault(component, {}).update({name: tuple(t["shape"]) for name, t in header.items()})
        if component not in found:
            fail(f"the model folder {shown(folder)} has no weights in {component}/: get the model again")
    return found


def published() -> dict[str, dict[str, tuple[int, ...]]]:
    """tensors_of(Qwen/Qwen-Image-Edit) from shapes.json, where tensors of equal shape in repeated blocks are one line."""
    found: dict[str, dict] = {}
    for component, lines in json.loads(Path(__file__).with_name("shapes.json").read_text()).items():
        found[component] = {f"{name}#{line}.{i}": tuple(shape) for line, (name, number, shape) in enumerate(lines) for i in range(number)}
    return found


def stored_bytes(name: str, shape: tuple[int, ...], how: str) -> float:
    count = math.prod(shape)
    if how == "fp8" and not re.search(r"norm|proj_out", name):  # what enable_layerwise_casting leaves alone
        return count
    if how == "nf4" and len(shape) == 2 and not re.search(r"embed_tokens|lm_head", name):
        return count * (4 + 32 / 64) / 8  # 4 bits, and a float32 scale for 64 numbers
    if how == "gguf" and len(shape) == 2:
        return count * 13.1 / 20.43  # a Q4_K_M file of this transformer has 13.1 GB
    if how == "pinned":  # torch rounds page-locked host memory up to a power of two
        return 2 ** math.ceil(math.log2(2 * count))
    return count * (4 if how == "float32" else 2)


def needs(recipe: str, tensors: dict, size: int, device: str = "cuda") -> dict[str, float]:
    """{place: GiB}: weights and working memory of every card, and of the host the most it holds, also while loading."""
    lies = (RECIPES | PLANNED)[recipe] if device == "cuda" else dict.fromkeys(COMPONENTS, ("host", "float32"))
    work = {"transformer": WORK["transformer"] * (4096 + size**2 / 256) / 8192, "text_encoder": WORK["text_encoder"]}
    work["vae"] = WORK["vae"] * max(1, size**2 / 2**20)  # it encodes the input at 1 megapixel, whatever `size` is
    if recipe == "nf4":
        work["vae"] = WORK["vae"] / 4  # tiles of 512 x 512
    gib: dict[str, float] = {"host": LIBRARIES} | ({"cuda:0": 0} if device == "cuda" else {})
    for component, (place, how) in lies.items():
        size_gib = sum(stored_bytes(*item, how) for item in tensors[component].items()) / 2**30
        if place == "in turn":  # lies on the host, and whole on the card while it runs
            gib["cuda:0"] = max(gib["cuda:0"], size_gib + work[component])
            place = "host"
        gib[place] = gib.get(place, 0) + size_gib
    for place in gib.keys() - {"host"}:
        gib[place] += max((work[c] for c, (where, _) in lies.items() if where in (place, "host")), default=0)
    if recipe == "fp8":  # loaded as bf16, then cast
        gib["host"] += sum(stored_bytes(*item, "bf16") for item in tensors["transformer"].items()) / 2**30
    elif device == "cuda" and "offload" not in recipe:  # one file after another on its way to the card
        gib["host"] += FILE
    return gib


def lacking(recipe: str, tensors: dict, size: int, have: dict[str, float], device: str = "cuda") -> str:
    """What this machine lacks for the recipe; "" where it fits."""
    places = sorted(needs(recipe, tensors, size, device).items())
    return " and ".join(f"{gib:.1f} GiB on {place} ({have[place]:.1f} free)" if place in have else f"{gib:.1f} GiB on {place} (no such card)"
                        for place, gib in places if gib > have.get(place, 0))  # fmt: skip


def memory(device: str) -> dict[str, float]:
    """{place: GiB free} of the host and the cards, no more than MEMORY_CAP_GIB on a card where that is set."""
    import psutil
    import torch

    have = {"host": psutil.virtual_memory().available / 2**30}
    for i in range(torch.cuda.device_count() if device == "cuda" else 0):
        free = torch.cuda.mem_get_info(i)[0] / 2**30
        have[f"cuda:{i}"] = min(free, machine.memory_cap_gib() or free)
    return have


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a QwenImageEditPipeline (default: the shapes of Qwen/Qwen-Image-Edit)")
    parser.add_argument("--size", type=int, default=1024, help="the output has about SIZE x SIZE pixels (default: %(default)s)")
    args = parser.parse_args()
    if args.size < 64:
        fail("--size must be at least 64")
    tensors = tensors_of(args.model) if args.model else published()

    metrics, total = {}, 0
    print(f"{'component':14} {'parameters':>12} {'bf16':>9} {'fp8':>9} {'nf4':>9}")
    for name in COMPONENTS:
        count = sum(math.prod(shape) for shape in tensors[name].values())
        gb = {how: sum(stored_bytes(*item, how) for item in tensors[name].items()) / 1e9 for how in ("bf16", "fp8", "nf4")}
        print(f"{name:14} {count / 1e9:10.3f} B " + "".join(f"{value:7.2f} GB" for value in gb.values()))
        metrics |= {f"{name}_parameters_count": count, f"{name}_bf16_gb": round(gb["bf16"], 3)}
        total += gb["bf16"]
    metrics["weights_gb"] = round(total, 2)

    have = memory(profile.device)
    print(f"{'all':27} {total:7.2f} GB\n\nfree here: {', '.join(f'{gib:.1f} GiB on {place}' for place, gib in have.items())}")
    print(f"\nGiB needed     {'cuda:0':>8} {'cuda:1':>8} {'host':>8}   picture of {args.size} x {args.size}")
    for recipe in RECIPES:
        gib = needs(recipe, tensors, args.size)
        lack = lacking(recipe, tensors, args.size, have)
        print(f"{recipe:14} " + " ".join(f"{gib[p]:8.1f}" if p in gib else f"{'-':>8}" for p in ("cuda:0", "cuda:1", "host")) + f"   {'does not fit' if lack else 'fits'} here")
        metrics |= {f"{recipe.replace('-', '_')}_{place.replace(':', '')}_gib": round(value, 1) for place, value in gib.items()}
    results.finish(__file__, metrics, {key: str(value) for key, value in vars(args).items()})


if __name__ == "__main__":
    main()
