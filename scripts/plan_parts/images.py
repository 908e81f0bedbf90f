"""Plans of image editing: modules/02_qwen_image_edit/recipes.py has the arithmetic."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

from lab import ROOT, fail, models
from lab.planner import constants
from plan_parts import Editing


def plan(model: str, setup: Editing) -> dict:
    """What a recipe needs of these cards; where it does not fit, the fastest that does."""
    editing = SimpleNamespace(**runpy.run_path(ROOT / "modules/02_qwen_image_edit/recipes.py"))
    recipes = editing.RECIPES | editing.PLANNED
    if setup.recipe not in recipes:
        fail(f"unknown recipe {setup.recipe}: choose one of {', '.join(recipes)}")
    tensors = tensors_of(model, editing)

    # 1. Which recipes these cards hold. The host's memory is not asked for.
    usable = setup.gpu_memory_gib - constants.CONTEXT / constants.GIB
    free = {f"cuda:{index}": usable for index in range(setup.gpus)} | {"host": math.inf}
    fitting = [name for name in recipes if not editing.lacking(name, tensors, setup.size, free)]

    # 2. The fullest card, and what lies on it.
    need = editing.needs(setup.recipe, tensors, setup.size)
    cards = {place: round(gib, 2) for place, gib in need.items() if place != "host"}
    fullest = max(cards, key=cards.get)
    lying = 0.0
    in_turn = [0.0]  # on the host, and on the card while they run
    for component, (place, how) in recipes[setup.recipe].items():
        weights = editing.stored_gib(tensors[component], how) * constants.GIB
        if place == fullest:
            lying += weights
        elif place == "in turn":
            in_turn.append(weights)
    weights = lying + max(in_turn)
    parts = {
        "weights": weights,
        "working_memory": cards[fullest] * constants.GIB - weights,
        "cuda_context": constants.CONTEXT,
    }

    fits = setup.recipe in fitting
    return {
        "fits": fits,
        "per_gpu_gib": {name: round(gib, 2) for name, gib in constants.gib(parts).items()},
        "cards_gib": cards,
        "host_gib": round(need["host"], 1),
        "suggestion": "" if fits else suggestion(fitting),
    }


def suggestion(fitting: list[str]) -> str:
    if fitting:
        return f"--recipe {fitting[0]}"
    return "nothing the planner knows makes it fit: take larger cards"


def tensors_of(model: str, editing: SimpleNamespace) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, by component; exit code 2 where it is another model."""
    if Path(model).is_dir():
        return editing.tensors_of(Path(model))
    if models.entry(model)[0] == "qwen-image-edit":
        return editing.published()
    fail(
        f"{model} is no image editing model that the planner knows: "
        "give qwen-image-edit, or the folder of a QwenImageEditPipeline"
    )
