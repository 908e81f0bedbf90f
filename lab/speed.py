"""How fast a model can be at best: predictions from bandwidth, arithmetic and communication, no measurement.

Decoding reads every weight once a step, so memory bandwidth bounds it; prefill and training multiply matrices, so FLOP/s bound them
(roofline model, Williams et al. 2009). Communication is alpha + bytes / beta for each message (Thakur et al. 2005). Real engines reach
a part of these bounds; modules/01_single_gpu_smoke/planner.md shows which. Rates are per card, in bytes/s and FLOP/s; times in seconds.
"""

import math
from dataclasses import dataclass

from lab import ROOT, memory

CARD = "RTX 4090"  # what is predicted for where no card is


@dataclass(frozen=True)
class Machine:
    """Nominal rates of a cluster of equal cards. The defaults are two RTX 4090s (configs/cards.yaml: dense bf16
    with fp32 accumulation) in PCIe 4.0 slots without peer-to-peer, so that every message passes through host memory."""

    gpus: int = 2
    bandwidth: float = 1008e9
    flops: float = 165.2e12
    link: float = 12e9  # beta of a link between two cards of one machine
    latency: float = 20e-6  # its alpha
    gpus_per_node: int = 8
    network: float = 12.5e9  # beta between machines: 100 Gbit/s
    network_latency: float = 30e-6


def nominal(gpus: int = 2, cards: tuple[str, ...] = (CARD,)) -> Machine | None:
    """`gpus` cards of these names, as fast as the slowest; None where configs/cards.yaml lacks one."""
    from lab.profile import read_yaml

    known = read_yaml(ROOT / "configs" / "cards.yaml")
    if not set(cards) <= known.keys():
        return None
    bandwidth, flops = (min(known[card][rate] for card in cards) for rate in ("bandwidth", "bf16"))
    return Machine(gpus=gpus, bandwidth=bandwidth * 1e9, flops=flops * 1e12)


def collective(kind: str, size: float, n: int, machine: Machine) -> float:
    """Seconds of an `all_reduce`, `all_gather` or `reduce_scatter` of `size` bytes (the whole tensor) over `n` cards.

    The better of a ring, (n-1) steps of size/n bytes (twice for all_reduce), and a tree, log2(n) steps of all bytes, which NCCL takes
    for short messages. The slowest link on the way counts. Source: Thakur, Rabenseifner, Gropp 2005; NCCL tests, PERFORMANCE.md.
    """
    if n < 2 or size <= 0:
        return 0.0
    within = n <= machine.gpus_per_node
    alpha, beta = (machine.latency, machine.link) if within else (machine.network_latency, min(machine.link, machine.network))
    trips = 2 if kind == "all_reduce" else 1
    ring = trips * (n - 1) * (alpha + size / n / beta)
    tree = trips * (math.ceil(math.log2(n)) * alpha + size / beta)
    return min(ring, tree)


def decode(model: memory.Model, machine: Machine, *, tp: int = 1, dtype: str = "auto", kv_dtype: str = "auto", batch: int = 1, context: int = 1024) -> dict:
    """Upper bound of generated tokens/s with `batch` requests of `context` tokens each, and what bounds it.

    A step reads the weights and the keys and values once, and adds 2 all-reduces of batch x hidden numbers a layer (arXiv 1909.08053).
    A MoE step reads no more experts than batch x experts_per_token.
    """
    dtype = model.stored if dtype == "auto" else dtype
    experts = model.expert_layers * 3 * model.hidden * model.expert_intermediate
    idle = experts * max(0, model.experts - batch * model.experts_per_token)
    weights = memory.weight_bytes(model, dtype) - idle * memory.LINEAR_BYTES[dtype] - (0 if model.tied else model.embedding * memory.width(dtype))
    cache = batch * context * memory.kv_bytes_per_token(model, kv_dtype, tp, dtype=dtype)
    reading = (weights / tp + cache) / machine.bandwidth
    computing = 2 * batch * model.active / tp / machine.flops
    moving = 2 * model.layers * collective("all_reduce", batch * model.hidden * memory.width(dtype), tp, machine)
    step = max(reading, computing) + moving
    return {"decode_tok_per_s": batch / step, "step_ms": step * 1e3, "communication_ratio": moving / step, "bound": "memory bandwidth" if reading > computing else "arithmetic"}


def prefill(model: memory.Model, machine: Machine, *, tp: int = 1, dtype: str = "auto", tokens: int = 1024) -> dict:
    """Lower bound of the seconds to read a prompt of `tokens`: 2 FLOP for a weight and a token, 4 for a pair of positions and a number of
    the queries (half of them masked), and the all-reduces (arXiv 2001.08361, section 2.1)."""
    work = 2 * tokens * (model.active - model.embedding) + 2 * model.embedding + 2 * model.layers * tokens**2 * model.q
    computing = work / tp / machine.flops
    moving = 2 * model.layers * collective("all_reduce", tokens * model.hidden * memory.width(model.stored if dtype == "auto" else dtype), tp, machine)
    return {"prefill_tok_per_s": tokens / (computing + moving), "ttft_ms": (computing + moving) * 1e3}


def train(model: memory.Model, machine: Machine, *, tokens: int, seq_len: int = 1024, method: str = "full", zero: int = 0, checkpointing: bool = False, accumulate: int = 1) -> dict:
    """Upper bound of trained tokens/s over all cards, `tokens` on each card and micro-step.

    6 FLOP for a weight and a token (forward 2, backward 4), 8 with checkpointing, a third less for frozen weights (arXiv 2001.08361);
    gradients travel once a step as 2 bytes a parameter (ZeRO-2: every micro-step), and ZeRO-3 gathers the parameters twice a micro-step
    (arXiv 1910.02054, section 7). Communication is counted as not hidden behind the computation.
    """
    passes = 3 + checkpointing - (method != "full")
    work = passes * accumulate * tokens * (2 * model.active + 2 * model.layers * seq_len * model.q)
    computing = work / machine.flops
    n = machine.gpus
    trained = model.parameters if method == "full" else memory.lora_parameters(model, 16)
    gradients = collective("all_reduce" if zero < 2 else "reduce_scatter", 2 * trained, n, machine) * (accumulate if zero >= 2 else 1)
    gathers = {1: 1, 2: 1, 3: 2 * accumulate}.get(zero, 0) * collective("all_gather", 2 * (model.parameters if zero == 3 else trained), n, machine)
    moving = gradients + gathers
    return {"train_tok_per_s": n * accumulate * tokens / (computing + moving), "step_s": computing + moving, "communication_ratio": moving / (computing + moving)}
