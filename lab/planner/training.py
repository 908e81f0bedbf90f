"""What fine-tuning with AdamW needs of each card at its fullest moment, and of the host.

    states        parameters, gradients and optimizer states: exact (arXiv 1910.02054)
    activations   what a forward pass keeps for the backward pass
    moments       a step is five moments; each adds up what is alive then
    peak          the fullest of the five decides whether it fits
    host          what offloading moves there (arXiv 2101.06840)

Every function takes the model and the `Training` that is asked for, and returns bytes.
psi is the number of parameters, n the number of cards.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from lab import fail
from lab.planner import weights
from lab.planner.config import Model
from lab.planner.constants import CARD_GIB, CONTEXT, GIB, HOST_PROCESS_GIB, NCCL, gib

WORKSPACE = 0.064 * GIB  # what PyTorch holds for cuBLAS (fit)
ZERO3_LIVE = 1e9  # parameters gathered at once: stage3_max_live_parameters
ZERO3_SUB_GROUP = 1e9  # numbers that ZeRO-3 updates at a time: sub_group_size


@dataclass(frozen=True)
class Training:
    """What is asked for.

    `engine` ddp: PyTorch as in module 04 (trained weights in fp32, computed with in bf16 by
    autocast); fsdp: the same, divided (FSDP2); deepspeed: bf16 weights, an fp32 master copy and
    moments, divided from ZeRO stage `zero` on. LoRA and QLoRA freeze the weights, in bf16 or nf4.
    `offload` moves optimizer states (ZeRO-1 on) and parameters (ZeRO-3) to the host or to NVMe.
    """

    gpus: int = 2
    gpu_memory_gib: float = CARD_GIB
    method: str = "full"  # full, lora, qlora
    engine: str = "ddp"  # ddp, fsdp, deepspeed
    zero: int = 0
    offload: str = "none"  # none, optimizer, optimizer+param
    offload_device: str = "cpu"  # cpu, nvme
    dtype: str = "bfloat16"  # of the computation
    seq_len: int = 1024
    micro_batch: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    bucket: float = 1e8  # reduce_bucket_size, in elements
    lora_rank: int = 16
    host_memory_gib: float | None = None  # None: not checked

    @property
    def tokens(self) -> int:
        """Tokens of one card and micro-step."""
        return self.micro_batch * self.seq_len

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.method == "full"

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's states lie on the host."""
        return self.offload != "none"

    @property
    def offloads_parameters(self) -> bool:
        return self.offload == "optimizer+param"

    @property
    def precision(self) -> str:
        """fp32; bf16 (weights held in bf16); autocast (held in fp32, computed with in bf16)."""
        if self.dtype == "float32":
            return "fp32"
        return "autocast" if self.engine == "ddp" else "bf16"

    @property
    def computed(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.dtype == "float32" else 2

    @property
    def held(self) -> int:
        """Bytes of a trained weight where it lies, and of its gradient."""
        return self.computed if self.engine == "deepspeed" else 4

    @property
    def parameter_shares(self) -> int:
        """Over how many cards the parameters are divided."""
        return self.gpus if self.zero == 3 or self.engine == "fsdp" else 1

    @property
    def optimizer_shares(self) -> int:
        return self.gpus if self.zero or self.engine == "fsdp" else 1

    @property
    def gradient_shares(self) -> int:
        """ZeRO-1 divides them too, where each micro-step is a step."""
        divided = self.zero >= 2 or (self.zero == 1 and self.accumulate == 1)
        return self.gpus if divided or self.engine == "fsdp" else 1


class States(NamedTuple):
    """Bytes of one card's part of what a weight costs for good, wherever it lies."""

    parameters: float
    gradients: float
    optimizer: float


class Moment(NamedTuple):
    """A moment of a step, and the bytes of what comes and goes then."""

    name: str
    parts: dict[str, float]


class Host(NamedTuple):
    """Bytes over all processes of this machine."""

    memory: dict[str, float]
    nvme: float


@dataclass(frozen=True)
class TrainPlan:
    """What a training needs."""

    fits: bool
    per_gpu_gib: dict[str, float]  # {part: GiB on a card at the fullest moment, ..., "total"}
    moment: str  # the fullest
    moments_gib: dict[str, float]  # of each moment, without the CUDA context
    states_gib: dict[str, float]
    host_gib: float
    host_parts_gib: dict[str, float]
    trained_parameters: int
    nvme_gib: float | None = None


# -----------------------------------------------------------------------------
# States: 16 bytes a weight, or 12 + 4, or a share of that


def trained_parameters(model: Model, setup: Training) -> int:
    """Weights that get a gradient.

    >>> trained_parameters(QWEN_7B, Training())
    7615616512
    >>> trained_parameters(QWEN_7B, Training(method="lora"))
    40370176
    """
    return weights.parameters(model) if setup.full else weights.lora(model, setup.lora_rank)


def frozen_bytes(model: Model, setup: Training) -> float:
    """Weights under an adapter, as they are stored.

    >>> round(frozen_bytes(QWEN_7B, Training(method="qlora")) / GIB, 2)
    5.17
    """
    if setup.full:
        return 0
    if setup.method == "qlora":
        return weights.stored_bytes(model, "nf4")
    return weights.stored_bytes(model, setup.dtype)


def parameter_bytes(model: Model, setup: Training) -> float:
    """psi x 4 (ddp, fsdp) or psi x 2 (deepspeed), divided by FSDP and ZeRO-3.

    >>> parameter_bytes(QWEN_7B, Training()) / 1e9  # 7.6e9 * 4
    30.462466048
    """
    trained = trained_parameters(model, setup) * setup.held
    return (frozen_bytes(model, setup) + trained) / setup.parameter_shares


def gradient_bytes(model: Model, setup: Training) -> float:
    """One number for each trained weight, of the weight's own type; divided from ZeRO-2 on.

    >>> gradient_bytes(QWEN_7B, Training(engine="deepspeed", zero=2)) / 1e9  # 7.6e9 * 2 / 2 cards
    7.615616512
    """
    return trained_parameters(model, setup) * setup.held / setup.gradient_shares


def optimizer_bytes(model: Model, setup: Training) -> float:
    """Two fp32 moments of AdamW (8 bytes), and DeepSpeed's fp32 master copy of the weights (4).

    >>> optimizer_bytes(QWEN_7B, Training()) / 1e9  # 7.6e9 * 8
    60.924932096
    >>> optimizer_bytes(QWEN_7B, Training(engine="deepspeed", zero=1)) / 1e9  # 12 / 2 cards
    45.693699072
    """
    has_master = setup.engine == "deepspeed" and (setup.zero or setup.dtype != "float32")
    each = 12 if has_master else 8
    return trained_parameters(model, setup) * each / setup.optimizer_shares


def states(model: Model, setup: Training) -> States:
    """The three together; an offloaded optimizer gets its gradients in fp32.

    >>> sum(states(QWEN_7B, Training(gpus=1))) / 1e9  # psi * 16: the 112 GB of "7B", exactly
    121.849864192
    """
    gradients = gradient_bytes(model, setup)
    if setup.offloads:
        gradients *= 4 / setup.held
    return States(parameter_bytes(model, setup), gradients, optimizer_bytes(model, setup))


# -----------------------------------------------------------------------------
# What else lies on the card all the time


def head_bytes(model: Model, setup: Training) -> float:
    """One gradient of the embedding or of the output layer, the largest tensors of a model.

    >>> round(head_bytes(QWEN_7B, Training()) / GIB, 2)
    2.03
    """
    return weights.embedding(model) * setup.held if setup.full else 0


def bucket_bytes(model: Model, setup: Training) -> float:
    """Gradients that one message of DeepSpeed carries.

    >>> bucket_bytes(QWEN_7B, Training(engine="deepspeed", zero=2)) / 1e6
    200.0
    """
    return min(setup.bucket, trained_parameters(model, setup)) * setup.computed


def buffer_bytes(model: Model, setup: Training) -> float:
    """What the engine keeps for good beside the states.

    >>> round(buffer_bytes(QWEN_7B, Training(gpus=2)) / GIB, 2)  # DDP: every gradient once more
    28.43
    """
    total = WORKSPACE
    if setup.engine == "ddp" and setup.gpus > 1:
        total += trained_parameters(model, setup) * 4  # DDP's buckets: every gradient once more
    if setup.zero == 3:
        total += bucket_bytes(model, setup)
        if not setup.offloads:
            total += gradient_bytes(model, setup)  # one flat buffer, never freed
    if setup.zero in (1, 2) and setup.offloads:
        total += head_bytes(model, setup)  # the last gradient that was larger than a bucket
    return total


def resident(model: Model, setup: Training) -> dict[str, float]:
    """Bytes that lie on the card through the whole step."""
    on_card = states(model, setup)
    return {
        "weights": 0 if setup.offloads_parameters else on_card.parameters,
        "optimizer": 0 if setup.offloads else on_card.optimizer,
        "buffers": buffer_bytes(model, setup),
    }


# -----------------------------------------------------------------------------
# Activations


def saved_bytes_per_token(
    model: Model, method: str = "full", precision: str = "bf16", rank: int = 16
) -> float:
    """Bytes that one decoder layer of transformers 5.6 keeps for the backward pass, for each token.

    Counted from modeling_llama.py with sdpa attention, tensor by tensor; tests/test_memory.py
    counts them in a running graph. The often quoted 34 x hidden (arXiv 2205.05198) is for a fused
    fp16 GPT with dropout and a 4 x hidden MLP. Of a MoE, the experts' part is not measured.

    >>> round(saved_bytes_per_token(QWEN_7B, precision="autocast") / QWEN_7B.hidden, 1)  # x hidden
    72.9
    """
    hidden = model.hidden
    number = 4 if precision == "fp32" else 2
    trained = method == "full"
    inputs = max(1, model.experts_per_token)  # of the MLP, one for each expert a token passes

    # Each norm keeps its input in fp32 and, for its weight's gradient, the normalised values.
    normed = (2 if precision == "bf16" else 4) if trained else 0
    norms = 2 * hidden * (4 + normed) + 4 * 2
    if model.qk_norm:
        normed = number if trained else 0
        norms += (model.query_width + model.kv_width) * (4 + normed)
        norms += 4 * (model.heads + model.kv_heads)

    # Autocast casts the input of every linear layer anew; otherwise q, k, v share one, and gate
    # and up.
    copies = 3 + 2 * inputs if precision == "autocast" else 1 + inputs
    linears = number * hidden * copies
    if not trained:
        linears += 2 * 7 * rank  # what lora_B reads, in each of seven linear layers
        if precision == "autocast":
            linears += 2 * model.query_width  # a cast copy for o_proj's lora_A

    # q, k, v and the output; the log-sum-exp in fp32.
    attention = number * (2 * model.query_width + 2 * model.kv_width) + 4 * model.heads
    mlp = number * 4 * model.mlp_width  # gate, silu(gate), up, their product
    return norms + linears + attention + mlp


def layer_bytes(model: Model, setup: Training) -> float:
    """What one layer keeps of a micro-step.

    >>> round(layer_bytes(QWEN_7B, Training(seq_len=1024)) / GIB, 3)
    0.249
    """
    each = saved_bytes_per_token(model, setup.method, setup.precision, setup.lora_rank)
    return each * setup.tokens


def activation_bytes(model: Model, setup: Training) -> float:
    """What all layers keep; with checkpointing, only their inputs (arXiv 1604.06174).

    >>> round(activation_bytes(QWEN_7B, Training()) / GIB, 2)
    6.98
    >>> round(activation_bytes(QWEN_7B, Training(checkpointing=True)) / GIB, 2)
    0.38
    """
    if not setup.checkpointing:
        return model.layers * layer_bytes(model, setup)
    in_fp32 = setup.precision == "fp32" or (setup.precision == "autocast" and setup.full)
    layer_input = (4 if in_fp32 else 2) * model.hidden * setup.tokens
    return model.layers * layer_input


def recomputed_bytes(model: Model, setup: Training) -> float:
    """With checkpointing: the one layer that is computed again, and its MLP's gradients.

    >>> round(recomputed_bytes(QWEN_7B, Training(checkpointing=True)) / GIB, 3)
    0.358
    """
    if not setup.checkpointing:
        return 0
    gradients = 3 * setup.computed * model.mlp_width * setup.tokens
    return layer_bytes(model, setup) + gradients


def cast_bytes(model: Model, setup: Training) -> float:
    """Autocast's 16-bit copies of the trained weights that are multiplied with.

    >>> round(cast_bytes(QWEN_7B, Training()) / GIB, 2)
    13.17
    """
    if setup.precision != "autocast":
        return 0
    multiplied = weights.linear(model) + weights.embedding(model)
    return setup.computed * (multiplied if setup.full else trained_parameters(model, setup))


def gathered_bytes(model: Model, setup: Training) -> float:
    """Parameters that are whole on a card while they are used.

    Two layers and the embeddings (FSDP), at most ZERO3_LIVE and what is larger than that (ZeRO-3).

    >>> round(gathered_bytes(QWEN_7B, Training(engine="deepspeed", zero=3)) / GIB, 2)
    2.88
    >>> round(gathered_bytes(QWEN_7B, Training(engine="fsdp")) / GIB, 2)
    2.9
    """
    if setup.engine == "fsdp":
        two_layers = 2 * weights.linear(model) / model.layers
        return setup.computed * (two_layers + weights.embeddings(model))
    if setup.zero == 3:
        output_layer = 0 if model.tied else weights.embedding(model)
        return setup.computed * min(weights.parameters(model), ZERO3_LIVE + output_layer)
    return 0


# -----------------------------------------------------------------------------
# The five moments of a step, in their order


def earlier_gradients(model: Model, setup: Training) -> float:
    """Gradients of the micro-steps before. ZeRO-3 has counted them as a buffer."""
    kept = setup.accumulate > 1 and setup.zero < 3 and not setup.offloads
    return gradient_bytes(model, setup) if kept else 0


def end_of_forward(model: Model, setup: Training) -> Moment:
    """All activations; logits in 16 bits, in fp32, and their log-softmax: 10 bytes each (fp32: 8).

    >>> round(end_of_forward(QWEN_7B, Training()).parts["logits"] / GIB, 2)  # 152064 * 1024 * 10
    1.45
    """
    numbers = model.vocab * setup.tokens
    return Moment(
        "end of forward",
        {
            "activations": activation_bytes(model, setup),
            "gradients": earlier_gradients(model, setup),
            "logits": (8 if setup.precision == "fp32" else 10) * numbers,
            "working_copies": cast_bytes(model, setup) + gathered_bytes(model, setup),
        },
    )


def begin_of_backward(model: Model, setup: Training) -> Moment:
    """The logits three times in fp32: themselves, their log-softmax, its gradient.

    With checkpointing only the output layer's cast copy is left.

    >>> round(begin_of_backward(QWEN_7B, Training()).parts["logits"] / GIB, 2)  # 152064 * 1024 * 12
    1.74
    """
    cast = cast_bytes(model, setup)
    if setup.checkpointing:
        cast = min(cast, setup.computed * weights.embedding(model))
    return Moment(
        "begin of backward",
        {
            "activations": activation_bytes(model, setup),
            "gradients": earlier_gradients(model, setup),
            "logits": 12 * model.vocab * setup.tokens,
            "working_copies": cast + gathered_bytes(model, setup),
        },
    )


def layer_backward(model: Model, setup: Training) -> Moment:
    """The last layer's backward pass.

    Its activations once more where they are recomputed, and the output layer's gradient.

    >>> round(layer_backward(QWEN_7B, Training()).parts["gradients"] / GIB, 2)
    2.03
    """
    first = min(gradient_bytes(model, setup), head_bytes(model, setup))
    return Moment(
        "a layer's backward",
        {
            "activations": activation_bytes(model, setup) + recomputed_bytes(model, setup),
            "gradients": earlier_gradients(model, setup) or first,
            "working_copies": gathered_bytes(model, setup),
        },
    )


def end_of_backward(model: Model, setup: Training) -> Moment:
    """All gradients, and what is on its way to other cards; one layer's activations are left.

    On its way are two buckets, and the gradients that are larger than one.

    >>> round(end_of_backward(QWEN_7B, Training()).parts["gradients"] / GIB, 2)  # psi * 4 + head
    30.4
    """
    head = head_bytes(model, setup)
    on_the_way = head
    if setup.zero in (1, 2):
        on_the_way = 2 * bucket_bytes(model, setup) + 3 * head
    # ZeRO-3 has their place already, or sends them to the host as they come.
    gradients = 0 if setup.zero == 3 else gradient_bytes(model, setup)
    return Moment(
        "end of backward",
        {
            "activations": recomputed_bytes(model, setup) or layer_bytes(model, setup),
            "gradients": gradients + on_the_way,
            "working_copies": gathered_bytes(model, setup),
        },
    )


def gradients_of_step(model: Model, setup: Training) -> float:
    """Gradients as the optimizer reads them: DeepSpeed makes fp32 ones of a card's part.

    >>> gradients_of_step(QWEN_7B, Training(engine="deepspeed", zero=2)) / 1e9  # 7.6e9 * 4 / 2
    15.231233024
    """
    if setup.offloads:
        return 0
    in_fp32 = trained_parameters(model, setup) * 4
    if setup.zero:
        return in_fp32 / setup.gpus
    has_copy = setup.engine == "deepspeed" and setup.dtype != "float32"
    return gradient_bytes(model, setup) + (in_fp32 if has_copy else 0)


def optimizer_step(model: Model, setup: Training) -> Moment:
    """AdamW's square roots: one more fp32 number for each weight that this card updates.

    >>> round(optimizer_step(QWEN_7B, Training()).parts["optimizer_step"] / GIB, 2)
    28.37
    """
    roots = trained_parameters(model, setup) * 4 / setup.optimizer_shares
    return Moment(
        "optimizer step",
        {
            "gradients": gradients_of_step(model, setup),
            "optimizer_step": 0 if setup.offloads else roots,
        },
    )


MOMENTS = (end_of_forward, begin_of_backward, layer_backward, end_of_backward, optimizer_step)


def moments(model: Model, setup: Training) -> list[Moment]:
    """The five, each with what lies on the card all the time.

    >>> [round(sum(moment.parts.values()) / GIB) for moment in moments(QWEN_7B, Training(gpus=1))]
    [107, 107, 94, 116, 142]
    """
    always = resident(model, setup)
    step = [moment(model, setup) for moment in MOMENTS]
    return [Moment(name, always | parts) for name, parts in step]


# -----------------------------------------------------------------------------
# The host


def pinned(size: float, largest: float) -> float:
    """Bytes that PyTorch page-locks for `size` bytes in tensors of at most `largest`.

    Each is rounded up to a power of two (CachingHostAllocator).

    >>> pinned(10, 4)  # 4 + 4 + 2
    10
    >>> pinned(11, 8)  # 8 + 4
    12
    """
    whole, rest = divmod(size, largest)
    rounded = whole * 2 ** math.ceil(math.log2(largest))
    return rounded + (2 ** math.ceil(math.log2(rest)) if rest >= 1 else 0)


def host(model: Model, setup: Training) -> Host:
    """What lies on the host, or on NVMe.

    Each process of an offloaded optimizer pins its part of the master copy and of the fp32
    gradients, and has two moments that are not pinned; while it starts it also holds the model's
    weights once. Offloaded parameters lie there twice.

    >>> offloaded = Training(engine="deepspeed", zero=3, offload="optimizer+param")
    >>> round(sum(host(QWEN_7B, offloaded).memory.values()) / GIB)  # 180 measured
    182
    """
    processes = {"processes": HOST_PROCESS_GIB * GIB * setup.gpus}
    if not setup.offloads:
        return Host(processes, 0.0)
    trained = trained_parameters(model, setup)
    part = 4 * trained / setup.gpus
    largest = 4 * ZERO3_SUB_GROUP if setup.zero == 3 else part
    master = setup.gpus * pinned(part, largest)
    staying = {"gradients": master, "start": setup.gpus * setup.computed * trained}
    moving = {
        "master_copy": master,
        "moments": 2 * setup.gpus * part,
        "parameters": 2 * setup.computed * trained if setup.offloads_parameters else 0,
    }
    if setup.offload_device == "nvme":
        return Host(processes | staying, sum(moving.values()))
    return Host(processes | staying | moving, 0.0)


# -----------------------------------------------------------------------------
# The plan


def check(setup: Training) -> None:
    """Exit code 2 for what no engine does."""
    if setup.zero and setup.engine != "deepspeed":
        fail(f"--zero {setup.zero} is DeepSpeed's: leave out --engine {setup.engine}")
    if setup.offloads_parameters and setup.zero < 3:
        fail(f"--offload {setup.offload} needs --zero 3")
    if setup.offloads and setup.zero < 1:
        fail(f"--offload {setup.offload} needs --zero 1, 2 or 3")


def train(model: Model, setup: Training) -> TrainPlan:
    """What fine-tuning needs; it fits where the fullest moment fits the card (and the host).

    >>> plan = train(QWEN_7B, Training(gpus=1, method="qlora", checkpointing=True))
    >>> plan.fits, plan.moment, plan.per_gpu_gib["total"]
    (True, 'begin of backward', 8.437915)
    """
    check(setup)
    step = moments(model, setup)
    fullest = max(step, key=lambda moment: sum(moment.parts.values()))
    context = CONTEXT + (NCCL if setup.gpus > 1 else 0)
    parts = fullest.parts | {"cuda_context": context}
    per_gpu = gib({name: size for name, size in parts.items() if size or name == "weights"})

    on_host = host(model, setup)
    host_parts = gib(on_host.memory)
    card_holds = per_gpu["total"] <= setup.gpu_memory_gib
    host_holds = setup.host_memory_gib is None or host_parts["total"] <= setup.host_memory_gib
    sums = {name: round(sum(parts.values()) / GIB, 2) for name, parts in step}
    return TrainPlan(
        fits=card_holds and host_holds,
        per_gpu_gib=per_gpu,
        moment=fullest.name,
        moments_gib=sums,
        states_gib=gib(states(model, setup)._asdict()),
        host_gib=round(host_parts["total"], 1),
        host_parts_gib=host_parts,
        trained_parameters=trained_parameters(model, setup),
        nvme_gib=round(on_host.nvme / GIB, 1) if on_host.nvme else None,
    )
