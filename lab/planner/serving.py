"""What vLLM 0.26 needs of each card.

vLLM takes gpu_memory_utilization of a card, loads the weights, runs the largest batch once, and
gives the KV cache what is left of its share. CUDA context and CUDA graphs come on top.
Source: vllm/v1/worker/gpu_worker.py, determine_available_memory.
"""

import math
from dataclasses import dataclass, replace

from lab import fail
from lab.planner import cache, weights
from lab.planner.config import Model
from lab.planner.constants import (
    CARD_GIB,
    CONTEXT,
    GIB,
    HOST_PROCESS_GIB,
    NCCL,
    gib,
    width,
)
from lab.planner.tensors import INPUTS, KV_HEADS, OUTPUTS, Weight

# Shares of a card to try, where none is asked for.
UTILIZATIONS = (0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
LIBRARIES = 0.22 * GIB  # what vLLM's libraries take within its share (fit)
LIBRARIES_TP = 0.07 * GIB  # with NCCL, which has taken some of it before vLLM looks (fit)
PROCESSORS = 128  # streaming multiprocessors of a 4090; each has a row of logits in the sampler
GRAPH_LAYER = 0.00025 * GIB  # a CUDA graph of one layer (fit)
NO_FLOAT16 = ("Gemma2", "Gemma3", "Glm4For")  # vllm/config/model.py
SECOND_RUNNER = ("DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "Qwen2MoeForCausalLM")
GRAPH_NCCL = 0.4 * GIB  # NCCL's part in CUDA graphs: 1.2 on H100s, scaled as NCCL itself


@dataclass(frozen=True)
class Serving:
    """What is asked for.

    By the names of vLLM's own flags; `dtype` is its --dtype and its --quantization, `kv_dtype` its
    --kv-cache-dtype, `pp_layers` its VLLM_PP_LAYER_PARTITION.
    """

    gpus: int = 2
    gpu_memory_gib: float = CARD_GIB  # of the smallest card
    memories_gib: tuple[float, ...] = ()  # of each card, where they differ
    free_memory_gib: float | None = None  # what others have left of a card; None: all of it
    gpu_memory_utilization: float | None = None  # None: the largest of UTILIZATIONS that fits
    tp: int | None = None  # None: as many cards as pp leaves and the model allows
    pp: int = 1
    pp_layers: tuple[int, ...] = ()  # VLLM_PP_LAYER_PARTITION
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_model_len: int | None = None  # None: the model's own limit
    concurrency: int = 1  # requests of that length to hold at once
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = cache.KV_BLOCK
    enforce_eager: bool = False
    language_model_only: bool = False  # a vision-language model without its tower


@dataclass(frozen=True)
class ServePlan:
    """What the server needs; `kv_tokens` is how many tokens its cache holds, as vLLM reports it."""

    fits: bool
    per_gpu_gib: dict[str, float]  # {part: GiB on the card that holds least, ..., "total"}
    budget_gib: float  # gpu_memory_utilization of the card
    gpu_memory_utilization: float
    host_gib: float  # over all processes of this machine
    kv_tokens: int
    kv_bytes_per_token: int  # of one token on that card, over all layers that keep it
    kv_bytes_per_request: int  # of one request of max_model_len tokens there, in whole blocks
    max_concurrency: float  # requests of full length
    max_model_len: int
    tp: int
    pp: int


# -----------------------------------------------------------------------------
# KV cache


def kv_number(kv_dtype: str, dtype: str) -> int:
    """Bytes of one number in the cache.

    >>> kv_number("auto", "bfloat16"), kv_number("fp8", "bfloat16")
    (2, 1)
    """
    return 1 if kv_dtype == "fp8" else width(dtype)


def kv_bytes_per_token(
    model: Model, kv_dtype: str = "auto", tp: int = 1, pp: int = 1, dtype: str = "bfloat16"
) -> int:
    """Bytes of keys and values of one token on one card (arXiv 2309.06180).

    Sliding layers are counted as if the token were in their window.

    >>> kv_bytes_per_token(QWEN_7B)  # 2 * 28 layers * 4 heads * 128 * 2 bytes = 56 KiB
    57344
    """
    caches = model.caches[: math.ceil(model.layers / pp)]
    return int(cache.token_bytes(caches, kv_number(kv_dtype, dtype), tp))


def kv_bytes_per_request(model: Model, tokens: int, dtype: str = "bfloat16") -> int:
    """Bytes that a request of so many tokens keeps, before vLLM rounds them to blocks.

    >>> kv_bytes_per_request(QWEN_7B, 1000)  # 1000 * 57344
    57344000
    """
    return int(cache.request_bytes(model.caches, tokens, width(dtype)))


# -----------------------------------------------------------------------------
# Division over cards


def obstacle(model: Model, tp: int) -> str:
    """Why vLLM refuses tensor parallelism over `tp` cards; "" where it does not.

    The KV heads are divided, or copied where there are more cards. Source: vllm/config/model.py,
    vllm/model_executor/layers/quantization.

    >>> [cards for cards in range(1, 9) if not obstacle(QWEN_7B, cards)]
    [1, 2, 4]
    """
    copied = tp % model.kv_heads == 0
    if model.heads % tp or (model.kv_heads % tp and not copied):
        return (
            f"it has {model.heads} heads and {model.kv_heads} KV heads, and each card takes as many"
        )
    reasons = (obstacle_of(weight, tp, model.kv_heads) for weight in model.weights)
    return next((reason for reason in reasons if reason), "")


def obstacle_of(weight: Weight, tp: int, kv_heads: int) -> str:
    """Why this weight cannot be divided over `tp` cards; "" where it can."""
    is_vocabulary = weight.part in ("embedding", "head")  # which vLLM pads
    if weight.split == KV_HEADS and weight.stored:
        part = weight.shape[0] // kv_heads * max(1, kv_heads // tp)
        if part % weight.group[0]:
            return split_scale(weight, part, weight.group[0])
    if tp == 1 or is_vocabulary or weight.split not in (OUTPUTS, INPUTS):
        return ""
    size = weight.shape[-1] if weight.split == INPUTS else weight.outputs
    of_scale = weight.group[weight.split == INPUTS]
    if size % tp:
        return f"{weight.name} has {size} {weight.split}, and each card takes as many"
    if weight.part == "experts" and weight.stored in ("int4", "int8"):
        of_scale = min(of_scale, 32)  # vLLM cuts their groups in halves, down to 32 (moe_wna16.py)
    pads = weight.stored == "mxfp4"
    if weight.stored and not pads and size // tp % of_scale:
        return split_scale(weight, size // tp, of_scale)
    return ""


def split_scale(weight: Weight, part: int, of_scale: int) -> str:
    return (
        f"each card would take {part} {weight.split} of {weight.name}, and in this "
        f"{weight.stored} checkpoint {of_scale} share a scale"
    )


def stages(model: Model, setup: Serving) -> list[range]:
    """The layers of each stage of the pipeline.

    What is left over goes to the stages before the last. Source: vllm/distributed/utils.py,
    get_pp_indices.

    >>> stages(QWEN_7B, Serving(gpus=3, pp=3))
    [range(0, 9), range(9, 19), range(19, 28)]
    """
    sizes = list(setup.pp_layers)
    if not sizes:
        sizes = [model.layers // setup.pp] * setup.pp
        for stage in range(2, model.layers % setup.pp + 2):
            sizes[-stage] += 1
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def filled(model: Model, setup: Serving) -> Serving:
    """`setup` with the size of the tensor parallel group and the length it leaves open."""
    cards = max(1, min(setup.gpus // setup.pp, model.heads))
    largest = max(tp for tp in range(1, cards + 1) if not obstacle(model, tp))
    return replace(
        setup,
        tp=setup.tp or largest,
        max_model_len=setup.max_model_len or model.max_len,
    )


def check(model: Model, setup: Serving) -> None:
    """Exit code 2 where the engine would refuse."""
    share = setup.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        fail(
            "--gpu-memory-utilization is a share of the card, above 0 and at most 1: "
            f"it is {share:g}"
        )
    cards = setup.tp * setup.pp
    if cards > setup.gpus:
        fail(f"--tp {setup.tp} x --pp {setup.pp} needs {cards} cards, there are {setup.gpus}")
    reason = obstacle(model, setup.tp)
    if reason:
        fail(f"--tp {setup.tp} does not divide the model: {reason}")
    if setup.pp > model.layers:
        fail(f"--pp {setup.pp} is more than the model's {model.layers} layers")
    of_stages = setup.pp_layers
    if of_stages and (len(of_stages) != setup.pp or sum(of_stages) != model.layers):
        fail(
            f"--pp-layers {','.join(map(str, of_stages))} must be {setup.pp} numbers (--pp) "
            f"that make {model.layers} layers together"
        )
    if setup.max_model_len > model.max_len:
        fail(
            f"--max-model-len {setup.max_model_len} is more than the {model.max_len} tokens that "
            f"{model.name} was made for: vLLM refuses it"
        )
    if setup.max_num_batched_tokens < setup.max_num_seqs:
        fail(
            f"--max-num-batched-tokens {setup.max_num_batched_tokens} is less than --max-num-seqs "
            f"{setup.max_num_seqs}: vLLM refuses it, for each request needs a token of the batch"
        )
    in_half = setup.dtype == "float16" and model.dtype == "bfloat16"
    if in_half and (model.architecture.startswith(NO_FLOAT16) or model.stored == "mxfp4"):
        fail(f"vLLM computes no {model.architecture} in float16: leave out --dtype float16")
    if setup.block_size % cache.KV_BLOCK:
        fail(f"--block-size {setup.block_size}: vLLM's attention takes multiples of 16 on a GPU")
    if model.quantised and setup.dtype == "float32":
        fail(f"{model.name} is stored as {model.stored}, which vLLM computes in 16 bits only")
    if model.quantised and setup.dtype not in ("auto", "bfloat16", "float16", model.stored):
        fail(
            f"{model.name} is stored as {model.stored}, and vLLM quantises no checkpoint twice: "
            f"leave out --dtype {setup.dtype}"
        )


# -----------------------------------------------------------------------------
# What stands beside the cache


def card_weights(
    model: Model, dtype: str, tp: int = 1, layers: range | None = None, last: bool = True
) -> float:
    """Bytes of weights on one card of a stage that has these layers (None: all).

    Its share of each weight (arXiv 1909.08053). A pipeline's first stage has the embedding and the
    tower, its last one (`last`) the output layer, for which a tied model has a copy. vLLM counts
    the tables of RoPE as weights.

    >>> round(card_weights(QWEN_7B, "bfloat16", tp=2) / GIB, 2)  # half of 14.19 GiB
    7.1
    """
    first = layers is None or layers.start == 0
    total = float(model.rope * width(dtype))
    for weight in model.weights:
        times = max(len(weight.layers), weight.times)
        if weight.layers and layers is not None:
            times = len(set(weight.layers) & set(layers))
        elif weight.part == "embedding":
            times = int(first or (last and model.tied))
        elif weight.part == "head":
            times = int(last)
        elif not weight.layers and not first:
            times = 0
        number = weights.number_bytes(model, weight, dtype)
        if "kv_b_proj" in weight.name and number < width(dtype):
            number += width(dtype)  # MLA multiplies queries with a copy in 16 bits
        total += times * weight.each * number * share_of_card(model, weight, tp)
    return total


def share_of_card(model: Model, weight: Weight, tp: int) -> float:
    """The part of a weight that one of `tp` cards holds."""
    if weight.split == KV_HEADS:
        return max(1, math.ceil(model.kv_heads / tp)) / model.kv_heads
    return 1 / tp if weight.split in (OUTPUTS, INPUTS) else 1


def flow_bytes_per_token(model: Model, dtype: str, tp: int = 1) -> float:
    """Bytes that are alive at once in a layer for each token of a batch.

    Six numbers for each of the hidden size and three for each of the MLP's width (fit).

    >>> flow_bytes_per_token(QWEN_7B, "bfloat16")  # (6 * 3584 + 3 * 18944) * 2
    156672.0
    """
    return (6 * model.hidden + 3 * model.mlp_width / tp) * width(dtype)


def context_bytes(model: Model, setup: Serving, number: int) -> float:
    """Keys and values that MLA makes of the vectors of earlier tokens, for a long prompt's chunk.

    vLLM runs its largest batch with room for 8 requests of full length, at most 65,536 tokens.
    Source: vllm/model_executor/layers/attention/mla_attention.py.

    >>> context_bytes(QWEN_7B, Serving(), 2)  # no MLA
    0.0
    """
    length = setup.max_model_len or model.max_len
    tokens = min(65536, max(8 * length, 4 * setup.max_num_seqs * setup.block_size))
    return tokens * model.heads / (setup.tp or 1) * model.latent_head * number


def compiling_bytes(model: Model, dtype: str, tokens: int, tp: int = 1) -> float:
    """Bytes while torch.compile runs at a first start; not with --enforce-eager.

    One more copy of the embedding, and two hidden states of the batch: seen with every model that
    reads text alone. One that reads pictures too looks its tokens up before the compiled part.

    >>> round(compiling_bytes(QWEN_7B, "bfloat16", 2048) / GIB, 2)  # (545e6 + 2 * 2048 * 3584) * 2
    1.04
    """
    if model.has_tower:
        return 0
    return (weights.embedding(model) / tp + 2 * tokens * model.hidden) * width(dtype)


def sampler_bytes(model: Model, setup: Serving, dtype: str) -> float:
    """Bytes of the first runner's sampler, which it tries with as many requests as it may hold.

    Logits as computed, of this card and of all; in fp32; their probabilities, and noise for them.
    Source: vllm/v1/worker/gpu_model_runner.py, _dummy_sampler_run.

    >>> round(sampler_bytes(QWEN_7B, Serving(tp=1), "bfloat16") / GIB, 2)  # 256 * 152064 * 14 + ...
    0.58
    """
    tp = setup.tp or 1
    computed = width(dtype) * (1 + (1 / tp if tp > 1 else 0))
    rows = setup.max_num_seqs * (computed + 3 * 4) + PROCESSORS * 4
    return model.vocab * rows


def on_first_runner(model: Model) -> bool:
    """Whether vLLM's first model runner runs it: models with states, and most with experts.

    That one takes the CUDA graphs out of its share, before the cache; the second does not.
    Source: vllm/config/vllm.py, use_v2_model_runner.

    >>> on_first_runner(QWEN_7B)
    False
    """
    is_moe = model.experts > 0 and model.architecture not in SECOND_RUNNER
    return is_moe or model.has_state


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
    if model.largest_graph > 512:
        largest = model.largest_graph
    layers = math.ceil(model.layers / setup.pp)
    graphs = GRAPH_LAYER * layers * captured_sizes(largest)
    batch = flow_bytes_per_token(model, dtype, setup.tp) * largest
    return graphs + batch + (GRAPH_NCCL if setup.tp > 1 else 0)


# -----------------------------------------------------------------------------
# The plan


def serve(model: Model, setup: Serving) -> ServePlan:
    """What vLLM's server needs of each card.

    It fits where the cache holds `concurrency` requests of `max_model_len` tokens and all of it
    stays on the card; the CUDA graphs of a model with states need a block for each of
    max_num_seqs requests (vllm/config/compilation.py). Raises SystemExit(2) where the engine would
    refuse the division.

    >>> plan = serve(QWEN_7B, Serving(gpus=1))
    >>> plan.fits, plan.kv_tokens, plan.per_gpu_gib["weights"]
    (True, 108304, 14.193004)
    """
    setup = filled(model, setup)
    check(model, setup)
    if setup.language_model_only:
        model = replace(model, weights=weights.without_tower(model))
    if setup.gpu_memory_utilization is not None:
        return serve_with_share(model, setup)
    plans = [
        serve_with_share(model, replace(setup, gpu_memory_utilization=share))
        for share in UTILIZATIONS
    ]
    return next((plan for plan in plans if plan.fits), plans[0])


def serve_with_share(model: Model, setup: Serving) -> ServePlan:
    """`serve` for a `setup` that leaves only the cards open: the plan of the fullest of them."""
    plans = []
    for stage, layers in enumerate(stages(model, setup)):
        cards = range(stage * setup.tp, (stage + 1) * setup.tp)
        sizes = setup.memories_gib or (setup.gpu_memory_gib,) * setup.gpus
        smallest = min(sizes[card] for card in cards)
        plans.append(card_plan(model, setup, layers, smallest))
    fits = all(plan.fits for plan in plans)
    return replace(min(plans, key=lambda plan: (plan.fits, plan.kv_tokens)), fits=fits)


def card_plan(model: Model, setup: Serving, layers: range, memory_gib: float) -> ServePlan:
    """The plan of a card of `memory_gib` that has these layers."""
    tp = setup.tp
    dtype = model.dtype if setup.dtype == "auto" else setup.dtype
    batch = flow_bytes_per_token(model, dtype, tp) * setup.max_num_batched_tokens
    batch += context_bytes(model, setup, width(dtype))
    if not setup.enforce_eager:
        compiling = compiling_bytes(model, dtype, setup.max_num_batched_tokens, tp)
        batch = max(batch, compiling)
    if on_first_runner(model):
        batch = max(batch, sampler_bytes(model, setup, dtype))
    is_last = layers.stop == model.layers

    # 1. Inside vLLM's share: the cache takes what the others leave.
    graphs = graph_bytes(model, setup, dtype)
    parts = {
        "weights": card_weights(model, dtype, tp, layers, is_last),
        "activations": batch,
        "libraries": LIBRARIES if tp == 1 else LIBRARIES_TP,
    }
    budget = memory_gib * setup.gpu_memory_utilization * GIB
    room = budget - sum(parts.values()) - (graphs if on_first_runner(model) else 0)
    parts["kv_cache"] = max(0, room)

    # 2. Outside of it: graphs, and the context, taken before vLLM looks.
    parts["cuda_graphs"] = graphs
    parts["cuda_context"] = CONTEXT + (NCCL if tp * setup.pp > 1 else 0)
    per_gpu = gib(parts)
    free_gib = min(memory_gib, setup.free_memory_gib or memory_gib)

    # 3. The cache in vLLM's blocks.
    kv_dtype = model.cache_dtype if setup.kv_dtype == "auto" else setup.kv_dtype
    number = kv_number(kv_dtype, dtype)
    pool = cache.pool(model.caches, number, tp, setup.block_size, width(dtype))
    of_request = pool.blocks_of_request(setup.max_model_len, in_flight(setup))
    block_bytes = pool.block_bytes(layers)
    blocks = max(0, math.floor(room / block_bytes))
    requests = blocks / of_request
    graphs_have_states = setup.enforce_eager or not model.has_state or blocks >= setup.max_num_seqs
    here = model.caches[layers.start : layers.stop]
    return ServePlan(
        fits=requests >= setup.concurrency and per_gpu["total"] <= free_gib and graphs_have_states,
        per_gpu_gib=per_gpu,
        budget_gib=round(budget / GIB, 2),
        gpu_memory_utilization=setup.gpu_memory_utilization,
        host_gib=round(HOST_PROCESS_GIB * (tp * setup.pp + 1), 1),
        kv_tokens=int(requests * setup.max_model_len),
        kv_bytes_per_token=int(cache.token_bytes(here, number, tp)),
        kv_bytes_per_request=int(of_request * block_bytes),
        max_concurrency=round(requests, 1),
        max_model_len=setup.max_model_len,
        tp=tp,
        pp=setup.pp,
    )


def in_flight(setup: Serving) -> int:
    """Tokens of batches that are begun and not through: vLLM prepares one while another runs.

    >>> in_flight(Serving()), in_flight(Serving(pp=2))
    (4096, 4096)
    """
    return max(2, setup.pp) * setup.max_num_batched_tokens
