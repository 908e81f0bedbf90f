"""What fine-tuning with AdamW needs of each card at its fullest moment.

    buffers       what the engine keeps beside the states (lab/planner/states.py)
    activations   what a forward pass keeps for the backward pass
    moments       a step is five moments, and loading is one; each adds up what is alive then;
                  DPO and KTO have one more, the reference's forward
    peak          the fullest decides whether it fits

Every function takes the model and the `Training` that is asked for, and returns bytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lab import fail
from lab.planner import weights
from lab.planner.config import Model
from lab.planner.constants import CONTEXT, GIB, NCCL, gib
from lab.planner.host import host
from lab.planner.states import (
    COMPARED,
    Training,
    gradient_bytes,
    packed,
    packs,
    reference_bytes,
    refusal,
    scale_bytes,
    states,
    trained_parameters,
    whole_bytes,
)
from lab.planner.tower import tower_bytes

WORKSPACE = 0.064 * GIB  # what PyTorch holds for cuBLAS (fit)
# Bytes of a number of the logits. LLaMA-Factory's get_batch_logps holds them in fp32, a copy
# without the last token, and its log-softmax; the first and the third wait for the backward pass.
# KTO's reference answers twice, and its first logits wait for the second ones.
PREFERENCE_LOGITS = 4 + 4 + 4
REFERENCE_LOGITS = {"dpo": 4 + 4 + PREFERENCE_LOGITS, "kto": 4 + 4 + PREFERENCE_LOGITS + 4}
ZERO3_LIVE = 1e9  # parameters gathered at once: stage3_max_live_parameters


class Moment(NamedTuple):
    """A moment of a step, and the bytes of what comes and goes then."""

    name: str
    parts: dict[str, float]


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
    left_behind = scale_bytes(model, setup)
    return {
        "weights": left_behind if setup.offloads_parameters else on_card.parameters,
        "optimizer": 0 if setup.offloads else on_card.optimizer,
        "reference_model": reference_bytes(model, setup),
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

    Two layers and the embeddings (FSDP), at most ZERO3_LIVE (ZeRO-3), and beside it the output
    layer's gradient where that layer is trained. Packed weights travel packed.

    >>> round(gathered_bytes(QWEN_7B, Training(engine="deepspeed", zero=3)) / GIB, 2)
    2.88
    >>> round(gathered_bytes(QWEN_7B, Training(engine="fsdp")) / GIB, 2)
    2.9
    """
    saved = 0  # by packing, in numbers of the computation
    if setup.method == "qlora":
        saved = packed(model) * (1 - 0.5 / setup.computed)
    if setup.engine == "fsdp":
        two_layers = 2 * (weights.linear(model) - saved) / model.layers
        return setup.computed * (two_layers + weights.embeddings(model))
    if setup.zero == 3:
        output_layer = weights.embedding(model) if setup.full and not model.tied else 0
        numbers = weights.parameters(model) - saved
        return setup.computed * min(numbers, ZERO3_LIVE + output_layer)
    return 0


def unpacked_bytes(model: Model, setup: Training) -> float:
    """The one matrix that QLoRA multiplies with, in 16 bits.

    >>> round(unpacked_bytes(QWEN_7B, Training(method="qlora")) / GIB, 3)
    0.126
    """
    if setup.method != "qlora":
        return 0
    matrices = [weight.each for weight in model.weights if packs(weight)]
    return setup.computed * max(matrices, default=0)


# -----------------------------------------------------------------------------
# The moments of a step, in their order; and loading


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
    supervised = 8 if setup.precision == "fp32" else 10
    return Moment(
        "end of forward",
        {
            "activations": activation_bytes(model, setup),
            "gradients": earlier_gradients(model, setup),
            "pictures": tower_bytes(model, setup),
            "logits": (supervised if setup.loss == "sft" else PREFERENCE_LOGITS) * numbers,
            "working_copies": cast_bytes(model, setup) + gathered_bytes(model, setup),
        },
    )


def reference_forward(model: Model, setup: Training) -> Moment:
    """The reference answers the same rows without gradients; the policy's graph waits meanwhile.

    Source: LLaMA-Factory, train/dpo/trainer.py, train/kto/trainer.py, get_batch_logps.

    >>> dpo = Training(loss="dpo", method="lora")
    >>> round(reference_forward(QWEN_7B, dpo).parts["logits"] / GIB, 2)  # 152064 * 2 * 1024 * 20
    5.8
    """
    waiting = begin_of_backward(model, setup).parts
    own = gathered_bytes(model, setup) if setup.copies_reference else 0
    return Moment(
        "reference forward",
        waiting
        | {
            "logits": REFERENCE_LOGITS[setup.loss] * model.vocab * setup.tokens,
            "working_copies": waiting["working_copies"] + own,
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
            "pictures": tower_bytes(model, setup),
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
            "pictures": tower_bytes(model, setup),
            "working_copies": gathered_bytes(model, setup) + unpacked_bytes(model, setup),
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
        # What is larger than a bucket: autograd's own, the one that is sent, and its sum. The 3
        # was fixed on z1-0.5b and z2-0.5b, whose embedding is (extra_large_param_to_reduce).
        on_the_way = 2 * bucket_bytes(model, setup) + 3 * head
    # ZeRO-3 has their place already; what is offloaded by it or by FSDP goes as it comes.
    sends_all = setup.zero == 3 or (setup.engine == "fsdp" and setup.offloads)
    gradients = 0 if sends_all else gradient_bytes(model, setup)
    return Moment(
        "end of backward",
        {
            "activations": recomputed_bytes(model, setup) or layer_bytes(model, setup),
            "gradients": gradients + on_the_way,
            "pictures": tower_bytes(model, setup),
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


def loading(model: Model, setup: Training) -> Moment:
    """The whole model on each card, before ZeRO-3 or FSDP divides it; 4-bit weights packed there.

    >>> zero3 = Training(engine="deepspeed", zero=3, load="whole")
    >>> round(loading(QWEN_7B, zero3).parts["weights"] / GIB, 2)
    14.19
    """
    return Moment(
        "loading",
        {
            "weights": whole_bytes(model, setup),
            "working_copies": unpacked_bytes(model, setup),
        },
    )


MOMENTS = (end_of_forward, begin_of_backward, layer_backward, end_of_backward, optimizer_step)


def moments(model: Model, setup: Training) -> list[Moment]:
    """Each with what lies on the card all the time; and loading, where it is one.

    >>> [round(sum(moment.parts.values()) / GIB) for moment in moments(QWEN_7B, Training(gpus=1))]
    [107, 107, 94, 116, 142]
    """
    always = resident(model, setup)
    step = [moment(model, setup) for moment in MOMENTS]
    if setup.loss in COMPARED:
        step.insert(1, reference_forward(model, setup))
    whole = [loading(model, setup)] if setup.loads_whole else []
    return whole + [Moment(name, always | parts) for name, parts in step]


# -----------------------------------------------------------------------------
# The plan


def train(model: Model, setup: Training) -> TrainPlan:
    """What fine-tuning needs; it fits where the fullest moment fits the card (and the host).

    Raises SystemExit(2) with one sentence for what no engine does.

    >>> plan = train(QWEN_7B, Training(gpus=1, method="qlora", checkpointing=True))
    >>> plan.fits, plan.moment, plan.per_gpu_gib["total"]
    (True, 'begin of backward', 8.437915)
    """
    refused = refusal(model, setup)
    if refused:
        fail(refused)
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
