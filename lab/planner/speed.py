"""How fast a model is, from bandwidth, arithmetic, communication and what a host can launch.

Decoding reads every weight once a step, so memory bandwidth rules it; prefill and training
multiply matrices, so FLOP/s do (roofline model, Williams et al. 2009). What engines need besides
stands in the constants below. They were fixed on the lines of configs/calibration.yaml marked
`speed: fit`, on one kind of card; modules/03_vllm/speeds.md holds the other lines against
measurement. Rates are per card, in bytes/s and FLOP/s; times in seconds.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from lab import ROOT
from lab.planner import cache, weights
from lab.planner.config import Model
from lab.planner.constants import width
from lab.planner.serving import Serving, kv_number
from lab.planner.states import Training, sent_bytes, trained_parameters
from lab.planner.tensors import PACKED

CARD = "RTX 4090"  # what is predicted for where no card is

# A card that is measured reaches this share of its nominal rates (H100: a copy, a bf16 product).
REACHED_BANDWIDTH = 0.895
REACHED_FLOPS = 0.79

SIMPLE_WAITS = 2.7  # times a short message's wait: NCCL's protocol for long ones

# vLLM, decoding in CUDA graphs. Between the large products of a layer lie a dozen kernels that move
# next to nothing; between two steps the card samples. Meanwhile the host prepares the next step.
LAYER_S = 44e-6
STEP_S = 0.12e-3
REQUEST_S = 6e-6
STEP_LAUNCHES = 190
REQUEST_LAUNCHES = 2.1
# vLLM, reading prompts: without a graph, so the host launches.
PREFILL_LAUNCHES = 60  # a layer
PREFILL_BYTES = 10  # moved by what lies between two products, for each of their outputs

# PyTorch's eager training moves more for each output, and back; with adapters also theirs.
FORWARD_BYTES = {"full": 28, "lora": 43, "qlora": 43}
BACKWARD_BYTES = {"full": 50, "lora": 72, "qlora": 72}
LOGIT_BYTES = 35  # for each number of the logits: cast to fp32, softmax, and back
UPDATE_BYTES = 70  # for each trained weight: AdamW reads and writes what it keeps, several times
UNPACKED_BYTES = 4.5  # for each packed weight and pass: it is read, written and read in 16 bits
# What the host launches for a layer, forward and back; Python's own time counts as launches.
TRAIN_LAUNCHES = {"full": 610, "lora": 870, "qlora": 1100}
CHECKPOINTING_LAUNCHES = 1.9  # times as many
ZERO3_LAUNCHES = 3.5  # times as many: each module's weights are asked for, and let go
HIDDEN = 0.6  # of DDP's and FSDP's messages or computing, the shorter is done beside the other


@dataclass(frozen=True)
class Machine:
    """Rates of a cluster of equal cards.

    The defaults are the nominal ones of two RTX 4090s (configs/cards.yaml: dense bf16 with fp32
    accumulation) in PCIe 4.0 slots without peer-to-peer, so that every message passes through host
    memory.
    """

    gpus: int = 2
    bandwidth: float = 1008e9
    flops: float = 165.2e12
    fp8: bool = True  # multiplies it, twice as fast
    launch: float = 9.5e-6  # of a kernel, by Python
    link: float = 12e9  # beta of a link between two cards of one machine
    latency: float = 6e-6  # its alpha
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


def reached(nominal: Machine) -> Machine:
    """The same machine, as much of it as a copy and a product reach.

    >>> round(reached(Machine()).bandwidth / 1e9), round(reached(Machine()).flops / 1e12)
    (902, 131)
    """
    return replace(
        nominal,
        bandwidth=REACHED_BANDWIDTH * nominal.bandwidth,
        flops=REACHED_FLOPS * nominal.flops,
    )


def measured(roofline: dict[str, float], gpus: int) -> Machine:
    """A machine by its own roofline: the metrics of `make calibrate ARGS="--only roofline"`."""
    machine = Machine(
        gpus=gpus,
        bandwidth=roofline["copy_gb_per_s"] * 1e9,
        flops=roofline["matmul_tflop_per_s"] * 1e12,
        launch=roofline["launch_us"] * 1e-6,
    )
    if "link_us" not in roofline:
        return machine
    beta = roofline["link_gb_per_s"] * 1e9
    return replace(machine, link=beta, latency=roofline["link_us"] * 1e-6)


def unmeasured(model: Model, setup: Serving | Training) -> str:
    """Why nothing is known of how far a prediction would be off; "" where something is.

    >>> unmeasured(QWEN_7B, Training(dtype="float32"))
    'float32 was not measured'
    """
    kinds = {layer.kind for layer in model.caches} - {"full_attention"}
    stored = {setup.dtype, model.stored} - {"", "auto", "bfloat16", "float16", "fp8"}
    if model.experts or kinds or model.latent_head:
        return "only dense models with full attention were measured"
    if stored:
        return f"{min(stored)} was not measured"
    if isinstance(setup, Serving):
        return "without CUDA graphs nothing was measured" if setup.enforce_eager else ""
    if setup.loss != "sft":
        return "no training on preferences was measured"
    if setup.offloads:
        return "the host's memory and processor decide"
    return "no training with pictures was measured" if setup.image_tokens else ""


# -----------------------------------------------------------------------------
# Communication


def collective(kind: str, size: float, n: int, machine: Machine) -> float:
    """Seconds of an `all_reduce`, `all_gather` or `reduce_scatter` of `size` bytes over `n` cards.

    `size` is that of the whole tensor.
    The better of a ring, (n-1) steps of size/n bytes (twice for all_reduce), and a tree, log2(n)
    steps of all bytes. NCCL sends short messages by a protocol in which half of what travels are
    flags (LL), long ones by another (Simple), which waits longer. The slowest link on the way
    counts. Source: Thakur, Rabenseifner, Gropp 2005; NCCL tests, PERFORMANCE.md; NCCL's
    src/graph/tuning.cc.

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
    depth = math.ceil(math.log2(n))
    ways = []
    for wait, rate in ((alpha, beta / 2), (SIMPLE_WAITS * alpha, beta)):
        ring = trips * (n - 1) * (wait + size / n / rate)
        tree = trips * (depth * wait + size / rate)
        ways += [ring, tree]
    return min(ways)


def tensor_parallel(model: Model, machine: Machine, tokens: int, tp: int, dtype: str) -> float:
    """Seconds of a forward pass's all-reduces: two a layer, and one for the embedding.

    Of tokens x hidden numbers each. Source: arXiv 1909.08053.

    >>> round(tensor_parallel(QWEN_7B, Machine(), 1, 2, "bfloat16") * 1e3, 2)  # ms: latency
    0.75
    """
    message = tokens * model.hidden * width(dtype)
    return (2 * model.layers + 1) * collective("all_reduce", message, tp, machine)


def outputs(model: Model) -> int:
    """Numbers that the decoder's linear layers put out for a token: what lies between them.

    >>> outputs(QWEN_7B)  # 28 * (2 * 3584 + 2 * 512 + 2 * 18944 + 3584)
    1390592
    """
    total = 0
    for weight in model.weights:
        if weight.part in PACKED:
            times = model.experts_per_token if weight.part == "experts" else 1
            total += times * weight.outputs * len(weight.layers)
    return total


# -----------------------------------------------------------------------------
# Serving


def multiplied(model: Model, machine: Machine, dtype: str) -> float:
    """FLOP/s of the products: twice as many where weights and activations are FP8."""
    is_fp8 = machine.fp8 and "fp8" in (dtype, model.stored)
    return machine.flops * (2 if is_fp8 else 1)


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
    """Generated tokens/s with `batch` requests of `context` tokens each.

    A step reads the weights and the keys and values once. Says also what bounds it.

    >>> round(decode(QWEN_7B, Machine()).decode_tok_per_s)  # 14.2 GB / 1008 GB/s + 1.4 ms
    65
    """
    dtype = model.dtype if dtype == "auto" else dtype
    number = kv_number(kv_dtype, dtype)
    kept = batch * cache.request_bytes(model.caches, context, number, tp)
    reading = (read_weights(model, dtype, batch) / tp + kept) / machine.bandwidth
    flop = 2 * batch * weights.active(model) / tp
    computing = flop / multiplied(model, machine, dtype)
    moving = tensor_parallel(model, machine, batch, tp, model.dtype)
    between = LAYER_S * model.layers + STEP_S + REQUEST_S * batch
    preparing = (STEP_LAUNCHES + REQUEST_LAUNCHES * batch) * machine.launch
    step = max(max(reading, computing) + between + moving, preparing)
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


def reading_seconds(
    model: Model, machine: Machine, *, tp: int, dtype: str, tokens: int, prompts: int = 1
) -> float:
    """Seconds that the cards need to read `prompts` prompts of `tokens` each.

    >>> round(reading_seconds(QWEN_7B, Machine(), tp=1, dtype="bfloat16", tokens=1024), 3)
    0.096
    """
    everything = prompts * tokens
    computing = prompts * prefill_flop(model, tokens) / tp / multiplied(model, machine, dtype)
    computing = max(computing, read_weights(model, dtype, everything) / tp / machine.bandwidth)
    between = PREFILL_BYTES * everything * outputs(model) / tp / machine.bandwidth
    return computing + between + tensor_parallel(model, machine, everything, tp, model.dtype)


def prefill(
    model: Model,
    machine: Machine,
    *,
    tp: int = 1,
    dtype: str = "auto",
    tokens: int = 1024,
    prompts: int = 1,
    step_tokens: int = Serving.max_num_batched_tokens,
) -> PrefillSpeed:
    """How fast an idle server reads `prompts` prompts of `tokens` each, `step_tokens` a step.

    >>> round(prefill(QWEN_7B, Machine()).ttft_ms)  # 13.58e12 / 165.2e12, 14.2 GB / 1008 GB/s
    96
    """
    size = {"tokens": tokens, "prompts": prompts}
    on_card = reading_seconds(model, machine, tp=tp, dtype=dtype, **size)
    steps = math.ceil(prompts * tokens / step_tokens)
    seconds = max(on_card, steps * PREFILL_LAUNCHES * model.layers * machine.launch)
    return PrefillSpeed(prefill_tok_per_s=prompts * tokens / seconds, ttft_ms=seconds * 1e3)


def busy(
    model: Model,
    machine: Machine,
    *,
    requests: int,
    prompt: int,
    answer: int,
    tp: int = 1,
    dtype: str = "auto",
) -> float:
    """Generated tokens/s of a server with always `requests` in flight.

    While one has its `answer` tokens, one step each, as many prompts are read as are in flight,
    each within a step of the others.

    >>> round(busy(QWEN_7B, Machine(), requests=16, prompt=256, answer=128))
    853
    """
    context = prompt + answer // 2
    step = decode(model, machine, tp=tp, dtype=dtype, batch=requests, context=context).step_ms
    reading = reading_seconds(model, machine, tp=tp, dtype=dtype, tokens=prompt)
    return requests * answer / (answer * step / 1e3 + requests * reading)


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


def is_ddp(setup: Training) -> bool:
    """Whether PyTorch's own DDP trains.

    >>> is_ddp(Training()), is_ddp(Training(zero=2))
    (True, False)
    """
    return setup.engine == "ddp" and not setup.zero


def train_messages(model: Model, setup: Training) -> list[tuple[str, float, int]]:
    """(collective, bytes of the whole tensor, how often) of everything that a step sends.

    Gradients go once a step (ZeRO-2 and 3: every micro-step), as wide as they are held: in 4 bytes
    by DDP, as computed with by the others. DeepSpeed 0.19.8 sums whole buckets at stages 1 and 2:
    an all-reduce where the paper has a reduce-scatter (use_multi_rank_bucket_allreduce). ZeRO-3 and
    FSDP gather the parameters twice a micro-step, as wide as they are computed with, packed ones
    packed. Source: arXiv 1910.02054, section 7; FSDP2's reshard_after_forward.

    >>> [name for name, *_ in train_messages(QWEN_7B, Training(zero=2))]
    ['all_reduce', 'all_gather']
    """
    gradients = (4 if is_ddp(setup) else setup.computed) * trained_parameters(model, setup)
    divided = setup.zero == 3 or setup.engine == "fsdp"
    kind = "reduce_scatter" if divided else "all_reduce"
    times = setup.accumulate if setup.zero >= 2 else 1
    messages = [(kind, gradients, times)]
    if setup.zero in (1, 2):
        messages.append(("all_gather", gradients, 1))
    if divided:
        messages.append(("all_gather", sent_bytes(model, setup), 2 * setup.accumulate))
    return messages


def message_seconds(model: Model, setup: Training, machine: Machine) -> float:
    """Seconds of a step's messages.

    >>> round(message_seconds(QWEN_7B, Training(zero=2), Machine()), 2)  # 15.2 GB / 2, three times
    1.9
    """
    return sum(
        times * collective(kind, size, machine.gpus, machine)
        for kind, size, times in train_messages(model, setup)
    )


def train_bytes(model: Model, setup: Training) -> float:
    """Bytes that a card's step moves besides its products, by the constants above.

    >>> round(train_bytes(QWEN_7B, Training(seq_len=1024)) / 1e9)  # 111, logits 5, update 533
    650
    """
    forward = FORWARD_BYTES[setup.method]
    a_token = forward + BACKWARD_BYTES[setup.method] + forward * setup.checkpointing
    tokens = setup.accumulate * setup.tokens
    moved = tokens * (a_token * outputs(model) + LOGIT_BYTES * model.vocab)
    if setup.method == "qlora":
        passes = 2 + setup.checkpointing
        moved += setup.accumulate * passes * UNPACKED_BYTES * weights.linear(model)
    shares = setup.gpus if setup.zero or setup.engine == "fsdp" else 1
    return moved + UPDATE_BYTES * trained_parameters(model, setup) / shares


def launch_seconds(model: Model, setup: Training, machine: Machine) -> float:
    """Seconds in which the host launches a step.

    >>> round(launch_seconds(QWEN_7B, Training(), Machine()), 2)  # 610 * 28 * 9.5 us
    0.16
    """
    launches = TRAIN_LAUNCHES[setup.method] * model.layers * setup.accumulate
    if setup.checkpointing:
        launches *= CHECKPOINTING_LAUNCHES
    if setup.zero == 3:
        launches *= ZERO3_LAUNCHES
    return launches * machine.launch


def train(model: Model, setup: Training, machine: Machine) -> TrainSpeed:
    """Trained tokens/s over all cards; nothing is offloaded.

    DDP and FSDP hide a part of their messages behind the computation, DeepSpeed none.

    >>> round(train(QWEN_7B, Training(zero=2), Machine()).train_tok_per_s)  # 2048 in 0.65 + 1.9 s
    803
    """
    on_card = train_flop(model, setup) / machine.flops
    on_card += train_bytes(model, setup) / machine.bandwidth
    computing = max(on_card, launch_seconds(model, setup, machine))
    moving = message_seconds(model, setup, machine)
    overlaps = is_ddp(setup) or setup.engine == "fsdp"
    hidden = HIDDEN * min(computing, moving) if overlaps else 0
    step = computing + moving - hidden
    return TrainSpeed(
        train_tok_per_s=machine.gpus * setup.accumulate * setup.tokens / step,
        step_s=step,
        communication_ratio=(moving - hidden) / step,
    )
