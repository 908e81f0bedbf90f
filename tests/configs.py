"""Configs for the tests of the planner: real shapes, and wrong ones made of them."""

import copy
import random
from functools import cache

from lab import models

MESS = (
    *(None, True, False, "", "many", "4096", "-3", "nan", "1e400", [], {}, [[]], [None], {"a": 1}),
    *(0, -1, 1, 7, 2**31, 10**18, 10**400, -0.5, 3.5, 4096.0, float("inf"), float("nan")),
    *(["full_attention"] * 3, ["mamba", "full_attention"], [3, "x"], {"factor": "two"}),
    *("é" * 300, "{" * 50, "../../etc/passwd", ["Qwen3ForCausalLM", 5], {"rope_type": 7}),
)


@cache
def bases() -> list[dict]:
    """One config of each kind of model in the catalogue."""
    names = ("qwen2.5-7b-instruct", "qwen3-30b-a3b-gptq-int4", "qwen3.5-27b-fp8", "gpt-oss-20b")
    more = ("gemma-3-12b-it-w4a16", "qwen2.5-vl-7b-instruct", "deepseek-v2-lite-chat")
    return [models.config(name) for name in (*names, *more)]


def places(config: dict, way: tuple = ()) -> list[tuple]:
    """Every key of a config, as the way that leads to it."""
    ways = []
    for key, value in config.items():
        ways.append((*way, key))
        if isinstance(value, dict):
            ways += places(value, (*way, key))
    return ways


def wrong(seed: int) -> dict:
    """A config with one to three values missing, of a wrong type, huge, negative or nested."""
    dice = random.Random(seed)
    config = copy.deepcopy(dice.choice(bases()))
    for _ in range(dice.randint(1, 3)):
        *way, key = dice.choice(places(config))
        section = config
        for step in way:
            section = section.get(step, {})
        if not isinstance(section, dict):
            continue
        kind = dice.random()
        if kind < 0.25:
            section.pop(key, None)
        elif kind < 0.85:
            section[key] = copy.deepcopy(dice.choice(MESS))
        else:
            section[key] = {key: section.get(key)}
    return config
