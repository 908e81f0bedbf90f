"""The cheapest change that makes a plan fit, as flags of scripts/plan.py.

Each option of the command has changes, a cost with each. They are tried alone and together, the
cheapest first. Costs order the changes and mean no more.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

from lab.planner import constants, serving, states, training
from lab.planner.config import Model
from lab.planner.serving import Serving
from lab.planner.training import Training
from plan_parts import Request

NOTHING = "nothing the planner knows makes it fit: take a smaller model, or more or larger cards"
Setup = Serving | Training


class Change(NamedTuple):
    """One option of the command with another value."""

    cost: float
    option: str
    value: object

    @property
    def flag(self) -> str:
        name = f"--{self.option.replace('_', '-')}"
        return name if self.value is True else f"{name} {self.value}"


def fits(model: Model, setup: Setup) -> bool:
    plan_of = serving.serve if isinstance(setup, Serving) else training.train
    return plan_of(model, setup).fits


def suggestion(model: Model, request: Request, plan: dict) -> str:
    """The cheapest combination of changes that fits; a sentence where none does."""
    setup = request.setup
    if isinstance(setup, Serving):
        options = serve_changes(model, setup, plan["kv_tokens"], request.cards.fp8)
    else:
        options = train_changes(setup)
    for combination in combinations(options):
        new_setup = changed(model, setup, combination)
        if combination and new_setup and fits(model, new_setup):
            flags = [change.flag for change in combination]
            if request.engine and new_setup.engine != request.engine:
                flags.insert(0, f"--engine {new_setup.engine}")
            return " ".join(flags)
    return NOTHING


# -----------------------------------------------------------------------------
# What there is to try: a list of changes for each option


def halved(option: str, value: int, least: int) -> list[Change]:
    """Half of `value`, a quarter ... down to a 32nd, but no less than `least`."""
    smaller = [(2 + times, value // 2**times) for times in range(1, 6)]
    return [Change(cost, option, part) for cost, part in smaller if part >= least]


def serve_changes(
    model: Model, setup: Serving, kv_tokens: int, fp8_cards: bool
) -> list[list[Change]]:
    """What to try when a server does not fit; its cache holds `kv_tokens`."""
    cards = min(setup.gpus // setup.pp, model.heads)
    larger = range(setup.tp + 1, cards + 1)
    divisions = [tp for tp in larger if not serving.obstacle(model, tp)]
    stages = setup.gpus // setup.tp
    asked = setup.gpu_memory_utilization
    shares = [share for share in (0.95, *serving.UTILIZATIONS) if asked and share != asked]
    held = max(1, kv_tokens // setup.max_model_len)  # requests that the cache does hold
    bytes_now = constants.LINEAR_BYTES[model.stored if setup.dtype == "auto" else setup.dtype]
    # vLLM makes FP8 of a checkpoint in 16 bits as it loads it; int4 is another checkpoint.
    quantised = [Change(8, "dtype", "fp8"), Change(10, "dtype", "int4")]
    if model.quantised:
        quantised = []
    return [
        [Change(1, "tp", divisions[-1])] if divisions else [],
        [Change(1.5, "pp", stages)] if setup.pp == 1 < stages else [],
        [Change(1, "gpu_memory_utilization", share) for share in shares],
        [Change(2, "concurrency", held)] if setup.concurrency > 1 else [],
        [Change(2, "kv_dtype", "fp8")] if setup.kv_dtype != "fp8" and fp8_cards else [],
        halved("max_model_len", setup.max_model_len, least=1024),
        [change for change in quantised if constants.LINEAR_BYTES[change.value] < bytes_now],
    ]


def train_changes(setup: Training) -> list[list[Change]]:
    """What to try when a training does not fit."""
    options = [
        [] if setup.checkpointing else [Change(1, "checkpointing", True)],
        smaller_batches(setup),
        halved("seq_len", setup.seq_len, least=max(512, setup.image_tokens)),
        [Change(1, "dtype", "bfloat16")] if setup.dtype == "float32" else [],
        divisions(setup),
        offloads(setup),
    ]
    # QLoRA comes whole, unless its loader is another: no flag of an engine.
    if setup.load == "whole" and setup.method != "qlora":
        options.append([Change(0.5, "load", "divided")])
    lora = Change(12, "method", "lora")
    qlora = Change(14, "method", "qlora")
    smaller_methods = {"full": [lora, qlora], "lora": [qlora], "qlora": []}
    options.append(smaller_methods[setup.method])
    return options


def smaller_batches(setup: Training) -> list[Change]:
    """Half of the micro-batch, a quarter ... down to a 32nd, but at least one sequence."""
    changes = []
    for times in range(1, 6):
        batch = setup.micro_batch // 2**times
        if batch:
            changes.append(Change(1 + times / 10, "micro_batch", batch))
    return changes


def divisions(setup: Training) -> list[Change]:
    """Higher ZeRO stages; of frozen weights only stage 3 divides something."""
    if setup.engine == "fsdp" or setup.gpus == 1:
        return []
    stages = {"full": (1, 2, 3), "lora": (3,), "qlora": ()}
    return [Change(stage, "zero", stage) for stage in stages[setup.method] if stage > setup.zero]


def offloads(setup: Training) -> list[Change]:
    """What is not offloaded yet, and is worth it: of frozen weights the parameters are."""
    optimizer = Change(5, "offload", "optimizer")
    parameters_too = Change(7, "offload", "optimizer+param")
    if setup.offloads_parameters or setup.method == "qlora":
        return []
    if setup.engine == "fsdp" or setup.offloads or not setup.full:
        return [parameters_too]
    return [optimizer, parameters_too]


# -----------------------------------------------------------------------------
# Alone and together


def combinations(options: list[list[Change]]) -> list[tuple[Change, ...]]:
    """Every choice of at most one change of each option, the cheapest and shortest first."""
    choices = itertools.product(*([None, *changes] for changes in options))
    chosen = [tuple(change for change in choice if change) for choice in choices]
    return sorted(chosen, key=lambda changes: (sum(c.cost for c in changes), len(changes)))


def changed(model: Model, setup: Setup, combination: tuple[Change, ...]) -> Setup | None:
    """`setup` with these changes; None where no engine does that together."""
    values = {change.option: change.value for change in combination}
    new = replace(setup, **values)
    if isinstance(new, Serving):
        return new if new.tp * new.pp <= new.gpus else None
    if "method" in values and ("zero" in values or "offload" in values):
        return None
    if new.engine != "fsdp" and (new.zero or new.offloads):
        new = replace(new, engine="deepspeed")
    return None if states.refusal(model, new) else new
