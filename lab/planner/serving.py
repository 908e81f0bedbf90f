"""What vLLM 0.26 needs of each card.

vLLM takes gpu_memory_utilization of a card, loads the weights, runs the largest batch once, and
gives the KV cache what is left of its share. CUDA context and CUDA graphs come on top.
Source: vllm/v1/worker/gpu_worker.py, determine_available_memory.
"""

import math
from dataclasses import dataclass, replace

from lab import fail
from lab.planner import weights
from lab.planner.config import Model
from lab.planner.constants import (
    CARD_GIB,
    CONTEXT,
    GIB,
    HOST_PROCESS_GIB,
    LINEAR_BYTES,
    NCCL,
    gib,
    width,
)

UTILIZATIONS = (0.9, 0.85, 0.8, 0.75)  # shares of a card to try, where none is asked for
KV_BLOCK = 16  # tokens of a block of vLLM's cache
LIBRARIES = 0.22 * GIB  # what vLLM's libraries take within its share (fit)
GRAPH_LAYER = 0.00025 * GIB  # a CUDA graph of one layer (fit)
GRAPH_NCCL = 0.4 * GIB  # NCCL's part in CUDA graphs: 1.2 on H100s, scaled as NCCL itself


@dataclass(frozen=True)
class Serving:
    """What is asked for, by the names of vLLM's own flags."""

    gpus: int = 2
    gpu_memory_gib: float = CARD_GIB
    gpu_memory_utilization: float | None = None  # None: the largest of UTILIZATIONS that fits
    tp: int | None = None  # None: as many cards as pp leaves and the heads allow
    pp: int = 1
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_model_len: int | None = None  # None: the model's own limit
    concurrency: int = 1  # requests of that length to hold at once
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False


@dataclass(frozen=True)
class ServePlan:
    """What the server needs; `kv_tokens` is how many tokens its cache holds."""

    fits: bool
    per_gpu_gib: dict[str, float]  # {part: GiB on the card that needs most, ..., "total"}
    budget_gib: float  # gpu_memory_utilization of the card
    gpu_memory_utilization: float
    host_gib: float  # over all processes of this machine
    kv_tokens: int
    kv_bytes_per_token: int
    max_concurrency: float  # requests of full length
    max_model_len: int


# -----------------------------------------------------------------------------
# KV cache


def kv_bytes_per_token(
    model: Model, kv_dtype: str = "auto", tp: int = 1, pp: int = 1, dtype: str = "bfloat16"
) -> int:
    """Bytes of keys and values of one token on one card (arXiv 2309.06180).

    With more cards than KV heads, vLLM keeps copies.

    >>> kv_bytes_per_token(QWEN_7B)  # 2 * 28 layers * 4 heads * 128 * 2 bytes = 56 KiB
    57344
    """
    layers = math.ceil(model.layers / pp)
    heads = max(1, math.ceil(model.kv_heads / tp))
    number = 1 if kv_dtype == "fp8" else width(dtype)
    return 2 * layers * heads * model.head_dim * number


def tokens_in(room: float, per_token: int) -> int:
    """Tokens that a cache of `room` bytes holds, in whole blocks.

    >>> tokens_in(4 * GIB, 57344)
    74896
    """
    blocks = math.floor(room / per_token / KV_BLOCK)
    return max(0, blocks * KV_BLOCK)


# -----------------------------------------------------------------------------
# Division over cards


def splits(model: Model, tp: int) -> bool:
    """Whether tensor parallelism over `tp` cards divides the heads.

    The KV heads are divided too, or copied. Source: vllm/config/model.py.

    >>> [cards for cards in range(1, 9) if splits(QWEN_7B, cards)]
    [1, 2, 4]
    """
    return model.heads % tp == 0 and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0)


def filled(model: Model, setup: Serving) -> Serving:
    """`setup` with the size of the tensor parallel group and the length it leaves open."""
    cards = max(1, min(setup.gpus // setup.pp, model.heads))
    largest = max(tp for tp in range(1, cards + 1) if splits(model, tp))
    return replace(
        setup,
        tp=setup.tp or largest,
        max_model_len=setup.max_model_len or model.max_len,
    )


def check(model: Model, setup: Serving) -> None:
    """Exit code 2 where the engine would refuse the division."""
    share = setup.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        fail(
            "--gpu-memory-utilization is a share of the card, above 0 and at most 1: "
            f"it is {share:g}"
        )
    cards = setup.tp * setup.pp
    if cards > setup.gpus:
        fail(f"--tp {setup.tp} x --pp {setup.pp} needs {cards} cards, there are {setup.gpus}")
    if not splits(model, setup.tp):
        fail(
            f"--tp {setup.tp} does not divide the model: it has {model.heads} heads and "
            f"{model.kv_heads} KV heads, and each card takes as many"
        )
    if setup.pp > model.layers:
        fail(f"--pp {setup.pp} is more than the model's {model.layers} layers")


# -----------------------------------------------------------------------------
# What stands beside the cache


def card_weights(model: Model, dtype: str, tp: int = 1, pp: int = 1) -> float:
    """Bytes of weights on the card that has most.

    Its share of its layers (arXiv 1909.08053), and of the embedding and the output layer.

    >>> round(card_weights(QWEN_7B, "bfloat16", tp=2) / GIB, 2)  # half of 14.19 GiB
    7.09
    """
    layers = math.ceil(model.layers / pp)
    copies = max(1, tp / model.kv_heads)  # of each key and value head
    linear = weights.linear(model) / model.layers * layers / tp
    linear += layers * 2 * model.hidden * model.kv_width / tp * (copies - 1)
    # A pipeline's first card has the embedding, its last the output layer.
    ends = weights.embedding(model) if pp > 1 else weights.embeddings(model)
    other = weights.other(model) / model.layers * layers
    return linear * LINEAR_BYTES[dtype] + (ends / tp + other) * width(dtype)


def flow_bytes_per_token(model: Model, dtype: str, tp: int = 1) -> float:
    """Bytes that are alive at once in a layer for each token of a batch.

    Six numbers for each of the hidden size and three for each of the MLP's width (fit).

    >>> flow_bytes_per_token(QWEN_7B, "bfloat16")  # (6 * 3584 + 3 * 18944) * 2
    156672.0
    """
    return (6 * model.hidden + 3 * model.mlp_width / tp) * width(dtype)


def compiling_bytes(model: Model, dtype: str, tokens: int, tp: int = 1) -> float:
    """Bytes while torch.compile runs at a first start; not with --enforce-eager.

    One more copy of the embedding, and two hidden states of the batch: seen with every model.

    >>> round(compiling_bytes(QWEN_7B, "bfloat16", 2048) / GIB, 2)  # (545e6 + 2 * 2048 * 3584) * 2
    1.04
    """
    return (weights.embedding(model) / tp + 2 * tokens * model.hidden) * width(dtype)


def captured_sizes(largest: int) -> int:
    """How many batch sizes vLLM captures a CUDA graph for.

    1, 2, 4, then every 8th to 256, every 16th from there. Source: vllm/config/compilation.py.

    >>> captured_sizes(256), captured_sizes(512)
    (35, 51)
    """
    return 3 + min(largest, 255) // 8 + max(0, (largest - 240) // 16)


def graph_bytes(model: Model, setup: Serving, dtype: str) -> float:
    """Bytes of the CUDA graphs, captured when the cache has its share already.

    >>> round(graph_bytes(QWEN_7B, Serving(tp=1), "bfloat16") / GIB, 2)  # 51 graphs, a batch of 512
    0.43
    """
    if setup.enforce_eager:
        return 0
    largest = min(2 * setup.max_num_seqs, 512, setup.max_num_batched_tokens)
    layers = math.ceil(model.layers / setup.pp)
    graphs = GRAPH_LAYER * layers * captured_sizes(largest)
    batch = flow_bytes_per_token(model, dtype, setup.tp) * largest
    return graphs + batch + (GRAPH_NCCL if setup.tp > 1 else 0)


# -----------------------------------------------------------------------------
# The plan


def serve(model: Model, setup: Serving) -> ServePlan:
    """What vLLM's server needs of each card.

    It fits where the cache holds `concurrency` requests of `max_model_len` tokens and all of it
    stays on the card. Raises SystemExit(2) where the engine would refuse the division.

    >>> plan = serve(QWEN_7B, Serving(gpus=1))
    >>> plan.fits, plan.kv_tokens, plan.per_gpu_gib["weights"]
    (True, 108448, 14.185191)
    """
    setup = filled(model, setup)
    check(model, setup)
    if setup.gpu_memory_utilization is not None:
        return serve_with_share(model, setup)
    plans = [
        serve_with_share(model, replace(setup, gpu_memory_utilization=share))
        for share in UTILIZATIONS
    ]
    return next((plan for plan in plans if plan.fits), plans[0])


def serve_with_share(model: Model, setup: Serving) -> ServePlan:
    """`serve` for a `setup` that leaves nothing open."""
    tp = setup.tp
    pp = setup.pp
    dtype = model.stored if setup.dtype == "auto" else setup.dtype
    batch = flow_bytes_per_token(model, dtype, tp) * setup.max_num_batched_tokens
    compiling = compiling_bytes(model, dtype, setup.max_num_batched_tokens, tp)

    # 1. Inside vLLM's share: the cache takes what the others leave.
    parts = {
        "weights": card_weights(model, dtype, tp, pp),
        "activations": batch if setup.enforce_eager else max(batch, compiling),
        "libraries": LIBRARIES,
    }
    budget = setup.gpu_memory_gib * setup.gpu_memory_utilization * GIB
    room = budget - sum(parts.values())
    parts["kv_cache"] = max(0, room)

    # 2. Outside of it: graphs, and the context, taken before vLLM looks.
    parts["cuda_graphs"] = graph_bytes(model, setup, dtype)
    parts["cuda_context"] = CONTEXT + (NCCL if tp * pp > 1 else 0)

    per_gpu = gib(parts)
    per_token = kv_bytes_per_token(model, setup.kv_dtype, tp, pp, dtype)
    kv_tokens = tokens_in(room, per_token)
    cache_is_enough = kv_tokens >= setup.max_model_len * setup.concurrency
    return ServePlan(
        fits=cache_is_enough and per_gpu["total"] <= setup.gpu_memory_gib,
        per_gpu_gib=per_gpu,
        budget_gib=round(budget / GIB, 2),
        gpu_memory_utilization=setup.gpu_memory_utilization,
        host_gib=round(HOST_PROCESS_GIB * (tp * pp + 1), 1),
        kv_tokens=kv_tokens,
        kv_bytes_per_token=per_token,
        max_concurrency=round(kv_tokens / setup.max_model_len, 1),
        max_model_len=setup.max_model_len,
    )
