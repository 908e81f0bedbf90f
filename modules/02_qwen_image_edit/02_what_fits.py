"""What each recipe of 01_edit.py needs on each card and on the host, and whether it fits here.

    python modules/02_qwen_image_edit/02_what_fits.py                  # Qwen/Qwen-Image-Edit
    python modules/02_qwen_image_edit/02_what_fits.py --size 512
    python modules/02_qwen_image_edit/02_what_fits.py --model FOLDER   # another of this pipeline

Look at: where the 57.7 GB are, and what of them each recipe leaves on a card. It is arithmetic on
names and shapes (lab/planner/images.py), nothing is loaded.
"""

import argparse
import math
from pathlib import Path

import recipes

from lab import fail, results
from lab.planner.images import stored_gib
from lab.profile import load_profile
from lab.table import table


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of a QwenImageEditPipeline (default: the shapes of Qwen/Qwen-Image-Edit)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=1024,
        help="the output has about SIZE x SIZE pixels (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.size < 64:
        fail("--size must be at least 64")

    # -----------------------------------------------------------------------------
    # 1. The weights, by how they are stored

    tensors = recipes.tensors_of(args.model) if args.model else recipes.published()
    total_gb = recipes.weights_gb(tensors)
    metrics = {}
    rows = []
    for component in recipes.COMPONENTS:
        count = sum(math.prod(shape) for shape in tensors[component].values())
        kinds = ("bf16", "fp8", "nf4")
        gb = [stored_gib(tensors[component], kind) * 2**30 / 1e9 for kind in kinds]
        rows.append([component, f"{count / 1e9:.3f} B", *(f"{value:.2f} GB" for value in gb)])
        metrics[f"{component}_parameters_count"] = count
        metrics[f"{component}_bf16_gb"] = round(gb[0], 3)
    metrics["weights_gb"] = round(total_gb, 2)
    rows.append(["all", None, f"{total_gb:.2f} GB", None, None])
    table(["component", "parameters", "bf16", "fp8", "nf4"], rows)

    # -----------------------------------------------------------------------------
    # 2. What each recipe needs of them, and where

    free = recipes.free_memory(profile.device)
    here = ", ".join(f"{gib:.1f} GiB on {place}" for place, gib in free.items())
    print(f"\nfree here: {here}; GiB needed for a picture of {args.size} x {args.size}:\n")
    rows = []
    for recipe in recipes.RECIPES:
        need = recipes.needs(recipe, tensors, args.size)
        lack = recipes.lacking(recipe, tensors, args.size, free)
        places = ("cuda:0", "cuda:1", "host")
        cells = [f"{need[place]:.1f}" if place in need else "-" for place in places]
        rows.append([recipe, *cells, "does not fit here" if lack else "fits here"])
        for place, gib in need.items():
            metrics[f"{recipe.replace('-', '_')}_{place.replace(':', '')}_gib"] = round(gib, 1)
    table(["recipe", "cuda:0", "cuda:1", "host", ""], rows)
    results.finish(__file__, metrics, {key: str(value) for key, value in vars(args).items()})


if __name__ == "__main__":
    main()
