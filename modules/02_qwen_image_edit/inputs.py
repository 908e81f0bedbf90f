"""What 01_edit.py is given: settings and a model, each refused with one sentence."""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import random_model
import recipes

from lab import RUNS, fail, models, shown


def check(args: argparse.Namespace, profile) -> None:
    """Refuse what no edit can be made of, before anything is loaded."""
    if args.recipe not in recipes.RECIPES:
        fail(f"unknown recipe {args.recipe}: choose one of {', '.join(recipes.RECIPES)}")
    if profile.device == "cpu" and args.recipe != "plain":
        fail(
            f"recipe {args.recipe} needs a GPU, and profile {profile.name} computes on the CPU: "
            "use --recipe plain"
        )
    if args.recipe == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        fail("recipe nf4 needs the package bitsandbytes of locks/gpu.txt: run 'make setup'")
    if not args.prompt.strip():
        fail("the prompt is empty: say what to change, such as --prompt 'make the circle green'")
    if args.steps < 2:
        fail("--steps must be at least 2: the first one warms up and is not timed")
    if not 64 <= args.size <= 2048:
        fail("--size must be 64 to 2048")
    if args.true_cfg_scale < 1:
        fail("--true-cfg-scale must be at least 1")


def output_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot write to the folder {shown(folder)}: {e.strerror}")
    return folder


# -----------------------------------------------------------------------------
# The model


def model_folder(name: str | None) -> Path:
    """The pipeline's folder; without a name that of the tiny model, which is built once."""
    if name is None:
        folder = RUNS / "models" / "qwen-image-edit-tiny"
        if not (folder / "model_index.json").is_file():
            doing = f"building a tiny model with random weights in {shown(folder)} (once)"
            print(doing, file=sys.stderr, flush=True)
            random_model.build("tiny", folder)
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = models.model_folder(name)
    index = folder / "model_index.json"
    kind = "no pipeline"
    if index.is_file():
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind != "QwenImageEditPipeline":
        fail(f"the folder {shown(folder)} holds {kind}, not a QwenImageEditPipeline")
    return folder


@contextlib.contextmanager
def a_whole_model(folder: Path):
    """Refuse a model that the libraries cannot load."""
    try:
        yield
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0][:200]
        fail(f"the model in {shown(folder)} cannot be loaded: {reason} -- get it again")


def what_it_needs(recipe: str, tensors: dict, size: int, device: str) -> dict[str, float]:
    """{place: GiB} that the recipe needs, which this machine has free."""
    free = recipes.free_memory(device)
    lack = recipes.lacking(recipe, tensors, size, free, device)
    if lack:
        others = recipes.RECIPES if device == "cuda" else ()
        fitting = [name for name in others if not recipes.lacking(name, tensors, size, free)]
        advice = f"use --recipe {fitting[0]}" if fitting else "no recipe fits this machine"
        fail(f"recipe {recipe} does not fit: it needs {lack}; {advice}")
    return recipes.needs(recipe, tensors, size, device)
