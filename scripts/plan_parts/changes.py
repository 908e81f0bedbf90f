"""The cheapest change that makes a plan fit, as flags of scripts/plan.py.

Each option of the command has changes, a cost with each. They are tried alone and together, the
cheapest first. Costs order the changes and mean no more.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

from lab.planner import constants, serving, training
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
        new_setup = changed(setup, combination)
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
    batches = [(1 + times / 10, setup.micro_batch // 2**times) for times in range(1, 6)]
    options = [
        [] if setup.checkpointing else [Change(1, "checkpointing", True)],
        [Change(cost, "micro_batch", batch) for cost, batch in batches if batch],
        halved("seq_len", setup.seq_len, least=512),
        [Change(1, "dtype", "bfloat16")] if setup.dtype == "float32" else [],
    ]
    if setup.full and setup.engine != "fsdp":
        if setup.gpus > 1:
            options.append([Change(z, "zero", z) for z in (1, 2, 3) if z > setup.zero])
        if not setup.offloads:
            optimizer = Change(5, "offload", "optimizer")
            parameters_too = Change(7, "offload", "optimizer+param")
            options.append([optimizer, parameters_too])
    lora = Change(12, "method", "lora")
    qlora = Change(14, "method", "qlora")
    smaller_methods = {"full": [lora, qlora], "lora": [qlora], "qlora": []}
    options.append(smaller_methods[setup.method])
    return options


# -----------------------------------------------------------------------------
# Alone and together


def combinations(options: list[list[Change]]) -> list[tuple[Change, ...]]:
    """Every choice of at most one change of each option, the cheapest and shortest first."""
    choices = itertools.product(*([None, *changes] for changes in options))
    chosen = [tuple(change for change in choice if change) for choice in choices]
    return sorted(chosen, key=lambda changes: (sum(c.cost for c in changes), len(changes)))


def changed(
    setup: Serving | Training, combination: tuple[Change, ...]
) -> Serving | Training | None:
    """`setup` with these changes; None where no engine does that together."""
    new = replace(setup, **{change.option: change.value for change in combination})
    if isinstance(new, Serving):
        return new if new.tp * new.pp <= new.gpus else None
    options = {change.option for change in combination}
    if "method" in options and options & {"zero", "offload"}:
        return None
    if new.offloads and new.zero < (3 if new.offloads_parameters else 1):
        return None
    if new.zero or new.offloads:
        return replace(new, engine="deepspeed")
    return new
