"""How fast a model can be at best, from bandwidth, arithmetic and communication: predictions.

Decoding reads every weight once a step, so memory bandwidth bounds it; prefill and training
multiply matrices, so FLOP/s bound them (roofline model, Williams et al. 2009). Communication is
alpha + bytes / beta for each message (Thakur et al. 2005). Real engines reach a part of these
bounds: modules/03_vllm/08_batch_one.py measures which. Rates are per card, in bytes/s and FLOP/s;
times in seconds.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from lab import ROOT
from lab.planner import cache, weights
from lab.planner.config import Model
from lab.planner.constants import width
from lab.planner.serving import kv_number
from lab.planner.states import Training, sent_bytes, trained_parameters

CARD = "RTX 4090"  # what is predicted for where no card is


@dataclass(frozen=True)
class Machine:
    """Nominal rates of a cluster of equal cards.

    The defaults are two RTX 4090s (configs/cards.yaml: dense bf16 with fp32 accumulation) in
    PCIe 4.0 slots without peer-to-peer, so that every message passes through host memory.
    """

    gpus: int = 2
    bandwidth: float = 1008e9
    flops: float = 165.2e12
    link: float = 12e9  # beta of a link between two cards of one machine
    latency: float = 20e-6  # its alpha
    gpus_per_node: int = 8
    network: float = 12.5e9  # beta between machines: 100 Gbit/s
    network_latency: float = 30e-6


class DecodeSpeed(NamedTuple):
    decode_tok_per_s: float
    step_ms: float
    communication_ratio: float
    bound: str


class PrefillSpeed(NamedTuple):
    prefill_tok_per_s: float
    ttft_ms: float


class TrainSpeed(NamedTuple):
    train_tok_per_s: float
    step_s: float
    communication_ratio: float


def nominal(gpus: int = 2, cards: tuple[str, ...] = (CARD,)) -> Machine | None:
    """`gpus` cards of these names, as fast as the slowest; None where cards.yaml lacks one."""
    from lab.profile import read_yaml

    known = read_yaml(ROOT / "configs" / "cards.yaml")
    if not set(cards) <= known.keys():
        return None
    return Machine(
        gpus=gpus,
        bandwidth=min(known[card]["bandwidth"] for card in cards) * 1e9,
        flops=min(known[card]["bf16"] for card in cards) * 1e12,
    )


# -----------------------------------------------------------------------------
# Communication


def collective(kind: str, size: float, n: int, machine: Machine) -> float:
    """Seconds of an `all_reduce`, `all_gather` or `reduce_scatter` of `size` bytes over `n` cards.

    `size` is that of the whole tensor.
    The better of a ring, (n-1) steps of size/n bytes (twice for all_reduce), and a tree, log2(n)
    steps of all bytes, which NCCL takes for short messages. The slowest link on the way counts.
    Source: Thakur, Rabenseifner, Gropp 2005; NCCL tests, PERFORMANCE.md.

    >>> round(collective("all_reduce", 1.2e9, 2, Machine()), 3)  # 2 * (2-1)/2 * 1.2 GB / 12 GB/s
    0.1
    """
    if n < 2 or size <= 0:
        return 0.0
    if n <= machine.gpus_per_node:
        alpha = machine.latency
        beta = machine.link
    else:
        alpha = machine.network_latency
        beta = min(machine.link, machine.network)
    trips = 2 if kind == "all_reduce" else 1
    ring = trips * (n - 1) * (alpha + size / n / beta)
    tree = trips * (math.ceil(math.log2(n)) * alpha + size / beta)
    return min(ring, tree)


def tensor_parallel(model: Model, machine: Machine, tokens: int, tp: int, dtype: str) -> float:
    """Seconds of a forward pass's all-reduces: two a layer, of tokens x hidden numbers.

    Source: arXiv 1909.08053.

    >>> round(tensor_parallel(QWEN_7B, Machine(), 1, 2, "bfloat16") * 1e3, 2)  # ms: latency
    2.27
    """
    message = tokens * model.hidden * width(dtype)
    return 2 * model.layers * collective("all_reduce", message, tp, machine)


# -----------------------------------------------------------------------------
# Serving


def read_weights(model: Model, dtype: str, batch: int) -> float:
    """Bytes of weights that one step of `batch` requests reads.

    Of the embedding only a row each, of a MoE no more experts than batch x experts_per_token.

    >>> read_weights(QWEN_7B, "bfloat16", 1) / 1e9  # 15.2 GB less the embedding
    14.141238272
    """
    awake = min(1, batch * model.experts_per_token / max(1, model.experts))
    total = 0.0
    for weight in model.weights:
        rows_only = weight.part == "embedding" and not model.tied
        if rows_only or weight.part == "vision":
            continue
        read = awake if weight.part == "experts" else 1
        total += read * weight.count * weights.number_bytes(model, weight, dtype)
    return total


def decode(
    model: Model,
    machine: Machine,
    *,
    tp: int = 1,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    batch: int = 1,
    context: int = 1024,
) -> DecodeSpeed:
    """Upper bound of generated tokens/s with `batch` requests of `context` tokens each.

    A step reads the weights and the keys and values once. Says also what bounds it.

    >>> round(decode(QWEN_7B, Machine()).decode_tok_per_s)  # 1008 GB/s / 14.2 GB
    71
    """
    dtype = model.dtype if dtype == "auto" else dtype
    number = kv_number(kv_dtype, dtype)
    kept = batch * cache.request_bytes(model.caches, context, number, tp)
    reading = (read_weights(model, dtype, batch) / tp + kept) / machine.bandwidth
    computing = 2 * batch * weights.active(model) / tp / machine.flops
    moving = tensor_parallel(model, machine, batch, tp, dtype)
    step = max(reading, computing) + moving
    return DecodeSpeed(
        decode_tok_per_s=batch / step,
        step_ms=step * 1e3,
        communication_ratio=moving / step,
        bound="memory bandwidth" if reading > computing else "arithmetic",
    )


def prefill_flop(model: Model, tokens: int) -> float:
    """FLOP to read a prompt.

    2 for a weight and a token (the output layer: for the last token); 4 for a pair of positions
    and a number of the queries, half of them masked. Source: arXiv 2001.08361, section 2.1.

    >>> round(prefill_flop(QWEN_7B, 1024) / 1e12, 2)  # 2 * 6.5e9 * 1024 and 0.2 of attention
    13.58
    """
    decoder = 2 * tokens * (weights.active(model) - weights.embedding(model))
    attention = 2 * model.layers * tokens**2 * model.query_width
    return decoder + 2 * weights.embedding(model) + attention


def prefill(
    model: Model, machine: Machine, *, tp: int = 1, dtype: str = "auto", tokens: int = 1024
) -> PrefillSpeed:
    """Lower bound of the seconds to read a prompt of `tokens`.

    >>> round(prefill(QWEN_7B, Machine()).ttft_ms)  # 13.58e12 / 165.2e12
    82
    """
    dtype = model.dtype if dtype == "auto" else dtype
    computing = prefill_flop(model, tokens) / tp / machine.flops
    seconds = computing + tensor_parallel(model, machine, tokens, tp, dtype)
    return PrefillSpeed(prefill_tok_per_s=tokens / seconds, ttft_ms=seconds * 1e3)


# -----------------------------------------------------------------------------
# Training


def train_flop(model: Model, setup: Training) -> float:
    """FLOP of a card's step: 6 for a weight and a token (forward 2, backward 4).

    8 with checkpointing, 2 less for frozen weights; and the attention's. Source: arXiv 2001.08361.

    >>> round(train_flop(QWEN_7B, Training(seq_len=1024)) / 1e12, 1)  # 6 * 7.07e9 * 1024, 0.6
    44.1
    """
    passes = 3 + setup.checkpointing - (not setup.full)
    attention = 2 * model.layers * setup.seq_len * model.query_width
    per_token = 2 * weights.active(model) + attention
    return passes * setup.accumulate * setup.tokens * per_token


def train_messages(model: Model, setup: Training, machine: Machine) -> float:
    """Seconds of a step's messages: gradients once a step, 2 bytes each (ZeRO-2: every micro-step).

    ZeRO-3 and FSDP gather the parameters twice a micro-step, as wide as they are computed with,
    packed ones packed. Source: arXiv 1910.02054, section 7; FSDP2's reshard_after_forward.

    >>> round(train_messages(QWEN_7B, Training(zero=2), Machine()), 2)  # 15.2 GB / 2, twice
    1.27
    """
    n = machine.gpus
    gradients = 2 * trained_parameters(model, setup)
    if setup.engine == "fsdp":
        seconds = collective("reduce_scatter", gradients, n, machine)
    elif setup.zero < 2:
        seconds = collective("all_reduce", gradients, n, machine)
    else:
        seconds = setup.accumulate * collective("reduce_scatter", gradients, n, machine)
    if setup.zero in (1, 2):
        seconds += collective("all_gather", gradients, n, machine)
    if setup.zero == 3 or setup.engine == "fsdp":
        everything = sent_bytes(model, setup)
        seconds += 2 * setup.accumulate * collective("all_gather", everything, n, machine)
    return seconds


def train(model: Model, setup: Training, machine: Machine) -> TrainSpeed:
    """Upper bound of trained tokens/s over all cards.

    Communication is counted as not hidden behind the computation.

    >>> round(train(QWEN_7B, Training(zero=2), Machine()).train_tok_per_s)  # 2048 in 0.27 + 1.27 s
    1333
    """
    computing = train_flop(model, setup) / machine.flops
    moving = train_messages(model, setup, machine)
    step = computing + moving
    return TrainSpeed(
        train_tok_per_s=machine.gpus * setup.accumulate * setup.tokens / step,
        step_s=step,
        communication_ratio=moving / step,
    )
