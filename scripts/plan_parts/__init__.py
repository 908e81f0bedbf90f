"""What is asked of the planner: a model, what is done with it, and the cards that do it."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lab import fail, machine, models
from lab.planner import config, constants, serving, speed
from lab.planner.config import Model
from lab.planner.serving import Serving
from lab.planner.training import Training

FP8 = (8, 9)  # compute capability from which on tensor cores multiply FP8
PROFILE_CARDS = {"4090x1": 1, "4090x2": 2}  # GPU profiles, and the cards that they take


@dataclass(frozen=True)
class Cards:
    """The cards of a GPU profile; RTX 4090s where nothing else is said."""

    profile: str = "4090x2"
    count: int = 2
    memory_gib: float = constants.CARD_GIB  # of the smallest, as CUDA sees it
    names: tuple[str, ...] = (speed.CARD,)
    fp8: bool = True  # whether all of them multiply it


TWO_4090S = Cards()


def cards_here() -> Cards:
    """The cards of this machine that its GPU profile takes, or RTX 4090s where there are none."""
    profile = os.environ.get("PROFILE", "")
    if profile not in PROFILE_CARDS:
        profile = "4090x1" if len(machine.gpus()) == 1 else "4090x2"
    count = PROFILE_CARDS[profile]
    taken = machine.gpus()[:count]
    if not taken:
        return Cards(profile, count)
    smallest = min(gpu["cuda_gib"] for gpu in taken)
    return Cards(
        profile,
        count,
        memory_gib=min(smallest, machine.memory_cap_gib() or smallest),
        names=tuple(dict.fromkeys(machine.short(gpu["name"]) for gpu in taken)),
        fp8=all(tuple(gpu["capability"]) >= FP8 for gpu in taken),
    )


@dataclass(frozen=True)
class Editing:
    """What is asked for of Qwen-Image-Edit; modules/02_qwen_image_edit/recipes.py has the rest."""

    gpus: int = 2
    gpu_memory_gib: float = constants.CARD_GIB
    recipe: str = "plain"
    size: int = 1024  # pixels of a side


Setup = Serving | Training | Editing
SETUPS: dict[str, type[Setup]] = {"serve": Serving, "train": Training, "image-edit": Editing}


class Request(NamedTuple):
    """One question to the planner."""

    model: str  # a name of configs/models.yaml, a hub id, a folder or a config.json
    setup: Setup
    cards: Cards
    engine: str = ""  # of a training, where the question names one

    @property
    def task(self) -> str:
        """serve, train or image-edit."""
        return next(task for task, kind in SETUPS.items() if isinstance(self.setup, kind))


def request(model: str, setup: Setup, cards: Cards = TWO_4090S) -> Request:
    """A question; what a server's setup leaves open, the model and the cards decide."""
    if isinstance(setup, Serving):
        setup = serving.filled(read_model(model), setup)
    return Request(model, setup, cards)


def read_model(name: str) -> Model:
    """The model of this name; what its safetensors files say goes before its config.json."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        fail(
            f"{name} is for llama.cpp: vLLM 0.26 and the trainings here load no GGUF. Give the "
            "folder or the hub id of the model in safetensors"
        )
    values = models.config(name)
    has_headers = path.is_dir() and any(path.glob("*.safetensors"))
    return model_of(name, json.dumps(values), path if has_headers else None)


@cache
def model_of(name: str, values: str, folder: Path | None) -> Model:
    """The model of a config.json; in a folder, the files' headers say what quantisation takes."""
    values = json.loads(values)
    if folder is None:
        return config.read(values, name)
    from lab.planner import counted

    return counted.with_headers(values, name, folder)
