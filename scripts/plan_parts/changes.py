"""The cheapest change that makes a plan fit, as flags of scripts/plan.py.

Each option of the command has changes, a cost with each. They are tried alone and together, the
cheapest first. Costs order the changes and mean no more.
"""

import itertools
import json
from dataclasses import replace
from typing import NamedTuple

from lab import models
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
        if isinstance(self.value, tuple):
            return f"{name} {','.join(map(str, self.value))}"
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
            checkpoint = "" if request.task == "train" else in_four_bits(request.model)
            flags = []
            for change in combination:
                is_checkpoint = checkpoint and change.value == "int4"
                flags.append(f"--model {checkpoint}" if is_checkpoint else change.flag)
            if request.engine and new_setup.engine != request.engine:
                flags.insert(0, f"--engine {new_setup.engine}")
            return " ".join(flags)
    return NOTHING


def in_four_bits(name: str) -> str:
    """The model's checkpoint in 4 bits, if configs/models.yaml has one: no flag makes it."""
    key = models.entry(name)[0]
    for other, entry in models.catalogue().items():
        quantization = json.dumps(entry.get("config", {}).get("quantization_config", {}))
        is_int4 = '"bits": 4' in quantization or '"num_bits": 4' in quantization
        if other.startswith(f"{key}-") and is_int4:
            return other
    return ""


# -----------------------------------------------------------------------------
# What there is to try: a list of changes for each option


def halved(option: str, value: int, least: int) -> list[Change]:
    """Half of `value`, a quarter ... down to a 32nd, but no less than `least`."""
    changes = []
    for times in range(1, 6):
        part = value // 2**times
        if part >= least:
            changes.append(Change(2 + times, option, part))
    return changes


def where(needed: bool, *changes: Change) -> list[Change]:
    """These changes where they are needed, or none."""
    return list(changes) if needed else []


def serve_changes(
    model: Model, setup: Serving, kv_tokens: int, fp8_cards: bool
) -> list[list[Change]]:
    """What to try when a server does not fit; its cache holds `kv_tokens`."""
    held = max(1, kv_tokens // setup.max_model_len)  # requests that the cache does hold
    fp8_cache = setup.kv_dtype != "fp8" and fp8_cards
    return [
        wider(model, setup),
        longer(setup),
        uneven(model, setup),
        other_shares(setup),
        halved("max_num_seqs", setup.max_num_seqs, least=8) if model.has_state else [],
        where(setup.concurrency > 1, Change(2, "concurrency", held)),
        where(fp8_cache, Change(2, "kv_dtype", "fp8")),
        halved("max_model_len", setup.max_model_len, least=1024),
        smaller_weights(model, setup),
    ]


def wider(model: Model, setup: Serving) -> list[Change]:
    """Tensor parallelism over as many cards as the model allows."""
    if setup.memories_gib:
        return where(setup.tp > 1, Change(0.5, "tp", 1))  # unlike cards are stages
    cards = min(setup.gpus // setup.pp, model.heads)
    for tp in range(cards, setup.tp, -1):
        if not serving.obstacle(model, tp):
            return [Change(1, "tp", tp)]
    return []


def longer(setup: Serving) -> list[Change]:
    """A pipeline over the cards that tensor parallelism leaves."""
    stages = setup.gpus // (1 if setup.memories_gib else setup.tp)
    return where(setup.pp == 1 < stages, Change(1.5, "pp", stages))


def uneven(model: Model, setup: Serving) -> list[Change]:
    """On cards of unlike size, stages with as many layers as each card has memory for."""
    sizes = setup.memories_gib
    if not sizes or setup.pp_layers:
        return []
    layers = [int(model.layers * size / sum(sizes)) for size in sizes]
    layers[-1] += model.layers - sum(layers)
    return [Change(0.5, "pp_layers", tuple(layers))]


def other_shares(setup: Serving) -> list[Change]:
    """Another share of the card, where the question names one."""
    asked = setup.gpu_memory_utilization
    if not asked:
        return []
    shares = (0.95, *serving.UTILIZATIONS)
    return [Change(1, "gpu_memory_utilization", share) for share in shares if share != asked]


def smaller_weights(model: Model, setup: Serving) -> list[Change]:
    """Fewer bits: vLLM makes FP8 of a checkpoint in 16 bits; int4 is another checkpoint."""
    if model.quantised:
        return []
    dtype = model.stored if setup.dtype == "auto" else setup.dtype
    bytes_now = constants.LINEAR_BYTES[dtype]
    changes = [Change(8, "dtype", "fp8"), Change(10, "dtype", "int4")]
    return [change for change in changes if constants.LINEAR_BYTES[change.value] < bytes_now]


def train_changes(setup: Training) -> list[list[Change]]:
    """What to try when a training does not fit."""
    shortest = max(512, setup.image_tokens)
    # QLoRA comes whole unless its loader is another: that is no flag of an engine.
    comes_whole = setup.load == "whole" and setup.method != "qlora"
    return [
        where(not setup.checkpointing, Change(1, "checkpointing", True)),
        smaller_batches(setup),
        halved("seq_len", setup.seq_len, least=shortest),
        where(setup.dtype == "float32", Change(1, "dtype", "bfloat16")),
        divisions(setup),
        offloads(setup),
        where(comes_whole, Change(0.5, "load", "divided")),
        smaller_methods(setup),
    ]


def smaller_methods(setup: Training) -> list[Change]:
    lora = Change(12, "method", "lora")
    qlora = Change(14, "method", "qlora")
    methods = {"full": [lora, qlora], "lora": [qlora], "qlora": []}
    return methods[setup.method]


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
    stages_of = {"full": (1, 2, 3), "lora": (3,), "qlora": ()}
    stages = stages_of[setup.method]
    return [Change(stage, "zero", stage) for stage in stages if stage > setup.zero]


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
    with_none = [[None, *changes] for changes in options]
    chosen = []
    for choice in itertools.product(*with_none):
        chosen.append(tuple(change for change in choice if change))
    return sorted(chosen, key=cost_and_number)


def cost_and_number(changes: tuple[Change, ...]) -> tuple[float, int]:
    cost = sum(change.cost for change in changes)
    return cost, len(changes)


def changed(model: Model, setup: Setup, combination: tuple[Change, ...]) -> Setup | None:
    """`setup` with these changes; None where no engine does that together."""
    values = {change.option: change.value for change in combination}
    new = replace(setup, **values)
    if isinstance(new, Serving):
        stages = len(new.pp_layers) or new.pp
        return new if new.tp * new.pp <= new.gpus and stages == new.pp else None
    if "method" in values and ("zero" in values or "offload" in values):
        return None
    if new.engine != "fsdp" and (new.zero or new.offloads):
        new = replace(new, engine="deepspeed")
    return None if states.refusal(model, new) else new
