"""What a training is, and what its parameters, gradients and optimizer states cost for good.

    Training      what is asked for, and what follows from it
    frozen        weights under an adapter: in 16 bits, in 4, or as the checkpoint has them
    reference     the start of a preference training, once more, where all weights are trained
    states        bytes of a card's part, wherever it lies: exact (arXiv 1910.02054)
    refusal       what no engine does, in one sentence

psi is the number of parameters, n the number of cards.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lab.planner import weights
from lab.planner.config import Model
from lab.planner.constants import CARD_GIB, GIB, LINEAR_BYTES
from lab.planner.tensors import Weight

PAIRED = ("dpo", "simpo", "orpo")  # a row is two sequences: the chosen answer and the rejected one
COMPARED = ("dpo", "kto")  # with a reference model
UNPACKED = ("fp8", "mxfp4")  # LLaMA-Factory loads these with dequantize=True


@dataclass(frozen=True)
class Training:
    """What is asked for.

    `engine` ddp: PyTorch as in module 04 (trained weights in fp32, computed with in bf16 by
    autocast); fsdp: the same, divided (FSDP2); deepspeed: bf16 weights, an fp32 master copy and
    moments, divided from ZeRO stage `zero` on. LoRA and QLoRA freeze the weights, in bf16 or nf4.
    `offload` moves optimizer states (ZeRO-1 on) and parameters (ZeRO-3) to the host or to NVMe;
    FSDP moves both, and the gradients, to the host.
    `loss` other than sft: preferences, as LLaMA-Factory 0.9.5 trains them; `micro_batch` is rows.
    `load` whole: each card holds the whole model before ZeRO-3 or FSDP divides it.
    """

    gpus: int = 2
    gpu_memory_gib: float = CARD_GIB
    method: str = "full"  # full, lora, qlora
    loss: str = "sft"  # sft, dpo, kto, simpo, orpo
    engine: str = "ddp"  # ddp, fsdp, deepspeed
    zero: int = 0
    offload: str = "none"  # none, optimizer, optimizer+param
    offload_device: str = "cpu"  # cpu, nvme
    pin_memory: bool = True  # of what DeepSpeed offloads: page-locked, in powers of two
    load: str | None = None  # divided, whole; None: as transformers 5.6 does it
    dtype: str = "bfloat16"  # of the computation
    seq_len: int = 1024
    image_tokens: int = 0  # of a sequence's
    micro_batch: int = 1
    accumulate: int = 1
    checkpointing: bool = False
    bucket: float = 1e8  # reduce_bucket_size, in elements
    lora_rank: int = 16
    host_memory_gib: float | None = None  # None: not checked

    @property
    def tokens(self) -> int:
        """Tokens of one card and micro-step."""
        sequences = 2 if self.loss in PAIRED else 1
        return sequences * self.micro_batch * self.seq_len

    @property
    def full(self) -> bool:
        """Whether all weights are trained."""
        return self.method == "full"

    @property
    def copies_reference(self) -> bool:
        """Whether the reference model is a second one: under an adapter it is the same one without.

        Source: LLaMA-Factory, trainer_utils.create_ref_model; LlamaFactory#10175.
        """
        return self.full and self.loss in COMPARED

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

    @property
    def loads_whole(self) -> bool:
        """Whether each card holds the whole model before its engine takes most of it away.

        transformers 5.6 packs 4-bit weights on the card, all of them on each one
        (Bnb4BitHfQuantizer.update_device_map). Other weights come divided by ZeRO-3's zero.Init,
        unless Accelerate's zero3_init_flag is false, and are dealt out by FSDP's first process.
        """
        divides = self.zero == 3 or self.engine == "fsdp"
        default = "whole" if self.method == "qlora" else "divided"
        return divides and (self.load or default) == "whole"


class States(NamedTuple):
    """Bytes of one card's part of what a weight costs for good, wherever it lies."""

    parameters: float
    gradients: float
    optimizer: float


# -----------------------------------------------------------------------------
# Weights: trained ones, and those frozen under an adapter


def trained_parameters(model: Model, setup: Training) -> int:
    """Weights that get a gradient: no vision tower, which LLaMA-Factory freezes.

    >>> trained_parameters(QWEN_7B, Training())
    7615616512
    >>> trained_parameters(QWEN_7B, Training(method="lora"))
    40370176
    """
    if setup.full:
        return weights.parameters(model) - weights.vision(model)
    return weights.lora(model, setup.lora_rank)


def packs(weight: Weight) -> bool:
    """Whether bitsandbytes packs it: it replaces nn.Linear, in a vision tower too.

    Source: transformers, replace_with_bnb_linear. transformers 5.6 keeps the experts of a layer in
    3-d parameters, which are none: they stay in 16 bits.

    >>> packs(Weight("mlp.experts.down_proj", (8, 64, 48), part="experts"))
    False
    """
    of_tower = weight.part == "vision" and len(weight.shape) == 2
    is_linear = weight.name.endswith(".weight") and "embed" not in weight.name
    return weight.part == "linear" or (of_tower and is_linear)


def packed(model: Model) -> int:
    """Weights that bitsandbytes packs.

    >>> packed(QWEN_7B) / 1e9
    6.525288448
    """
    return sum(weight.count for weight in model.weights if packs(weight))


def scale_bytes(model: Model, setup: Training) -> float:
    """QLoRA's scales, which each card holds whole: they lie beside the packed parameters.

    FSDP and ZeRO-3 divide parameters; bitsandbytes keeps the scales in their QuantState.

    >>> round(scale_bytes(QWEN_7B, Training(method="qlora")) / GIB, 3)
    0.096
    """
    if setup.method != "qlora":
        return 0
    return packed(model) * (LINEAR_BYTES["nf4"] - 0.5)


def frozen_bytes(model: Model, setup: Training) -> float:
    """Weights under an adapter, as they are stored: of a quantised checkpoint as it has them.

    >>> round(frozen_bytes(QWEN_7B, Training(method="qlora")) / GIB, 2)
    5.17
    >>> round(frozen_bytes(QWEN_7B, Training(method="lora")) / GIB, 2)
    14.19
    """
    if setup.full:
        return weights.vision(model) * setup.computed
    if setup.method == "qlora":
        unpacked = weights.parameters(model) - packed(model)
        return packed(model) * LINEAR_BYTES["nf4"] + unpacked * setup.computed
    if model.quantised and model.stored not in UNPACKED:
        return weights.stored_bytes(model)
    return weights.parameters(model) * setup.computed


def whole_bytes(model: Model, setup: Training) -> float:
    """All weights once, as a process that loads them has them.

    >>> round(whole_bytes(QWEN_7B, Training(engine="deepspeed", zero=3)) / GIB, 2)
    14.19
    """
    trained = trained_parameters(model, setup) * setup.held
    return frozen_bytes(model, setup) + trained


def reference_bytes(model: Model, setup: Training) -> float:
    """The frozen start that DPO and KTO compare with, as wide as computed with.

    Divided where parameters are; DDP, ZeRO-1 and ZeRO-2 have it whole on each card.
    Source: trl, models/utils.prepare_deepspeed, which gives it stage 3 or 0.

    >>> reference_bytes(QWEN_7B, Training(loss="dpo")) / 1e9  # 7.6e9 * 2
    15.231233024
    >>> reference_bytes(QWEN_7B, Training(loss="dpo", engine="deepspeed", zero=3)) / 1e9
    7.615616512
    """
    if not setup.copies_reference:
        return 0
    return weights.parameters(model) * setup.computed / setup.parameter_shares


def sent_bytes(model: Model, setup: Training) -> float:
    """All weights as cards send them to each other: as wide as computed with, packed ones packed.

    >>> sent_bytes(QWEN_7B, Training(engine="fsdp")) / 1e9  # 7.6e9 * 2
    15.231233024
    """
    trained = trained_parameters(model, setup) * setup.computed
    return trained + frozen_bytes(model, setup) - scale_bytes(model, setup)


# -----------------------------------------------------------------------------
# States: 16 bytes a weight, or 12 + 4, or a share of that


def parameter_bytes(model: Model, setup: Training) -> float:
    """psi x 4 (ddp, fsdp) or psi x 2 (deepspeed), divided by FSDP and ZeRO-3.

    >>> parameter_bytes(QWEN_7B, Training()) / 1e9  # 7.6e9 * 4
    30.462466048
    """
    undivided = scale_bytes(model, setup)
    divided = whole_bytes(model, setup) - undivided
    return divided / setup.parameter_shares + undivided


def gradient_bytes(model: Model, setup: Training) -> float:
    """One number for each trained weight, of the weight's own type.

    Divided by FSDP and from ZeRO-2 on; by ZeRO-1 too, unless micro-steps accumulate.

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
# What no engine does, and what one should know


def refusal(model: Model, setup: Training) -> str:
    """Why no engine does this, and what to give instead; "" where one does.

    >>> refusal(QWEN_7B, Training(zero=3))
    "--zero 3 is DeepSpeed's: leave out --engine ddp"
    """
    if setup.zero and setup.engine != "deepspeed":
        return f"--zero {setup.zero} is DeepSpeed's: leave out --engine {setup.engine}"
    return (
        refused_offload(setup) or refused_pictures(model, setup) or refused_checkpoint(model, setup)
    )


def refused_offload(setup: Training) -> str:
    if setup.offload_device == "nvme" and not setup.offloads:
        return "--offload-device nvme moves nothing without --offload optimizer or optimizer+param"
    if setup.offload_device == "nvme" and setup.zero in (1, 2):
        return (
            f"at stage {setup.zero} DeepSpeed keeps in host memory what is offloaded, whatever the "
            "device: --offload-device nvme needs --zero 3"
        )
    if setup.engine == "fsdp":
        if setup.offload == "optimizer":
            return (
                "FSDP moves parameters, gradients and optimizer states together "
                "(fsdp_offload_params): give --offload optimizer+param"
            )
        if setup.offload_device == "nvme":
            return "FSDP offloads to the host only: leave out --offload-device nvme"
        return ""
    if setup.offloads_parameters and setup.copies_reference:
        return f"where {setup.loss}'s reference model lies with offloaded parameters is not planned"
    if setup.offloads_parameters and setup.zero < 3:
        return f"--offload {setup.offload} needs --zero 3, or --engine fsdp"
    if setup.offloads and setup.zero < 1:
        return f"--offload {setup.offload} needs --zero 1, 2 or 3"
    return ""


def refused_pictures(model: Model, setup: Training) -> str:
    if setup.image_tokens and not weights.vision(model):
        return "--image-tokens is for models with a vision tower, and this one has none"
    if setup.image_tokens > setup.seq_len:
        return (
            f"--image-tokens {setup.image_tokens} are more than --seq-len {setup.seq_len}, "
            "which counts the tokens of pictures too"
        )
    return ""


def refused_checkpoint(model: Model, setup: Training) -> str:
    """A quantised checkpoint, where LLaMA-Factory 0.9.5 refuses it.

    model_utils/quantization.py:97 and adapter.py:308.
    """
    if not model.quantised:
        return ""
    checkpoint = f"the checkpoint is quantised already ({model.stored})"
    if setup.method == "qlora":
        return (
            f"{checkpoint}, and bitsandbytes packs 16-bit weights only: "
            "give --method lora, or the 16-bit checkpoint"
        )
    if model.stored in UNPACKED:
        return ""
    if setup.full:
        return (
            f"{checkpoint}, and quantised weights cannot be trained: "
            "give --method lora, or the 16-bit checkpoint"
        )
    if setup.zero == 3 or setup.engine == "fsdp":
        return (
            f"{checkpoint}, and LLaMA-Factory divides none of those by ZeRO-3 or FSDP: "
            "leave out --engine fsdp and --zero 3, or give the 16-bit checkpoint"
        )
    return ""


def notes(model: Model, setup: Training) -> list[str]:
    """What one should know of this training, a sentence each."""
    written = []
    experts_gib = weights.experts(model) * setup.computed / GIB
    if setup.method == "qlora" and experts_gib:
        written.append(
            f"bitsandbytes packs nn.Linear only: the experts, 3-d parameters in transformers 5.6, "
            f"stay in 16 bits ({experts_gib:.1f} GiB)"
        )
    if not setup.full and experts_gib:
        written.append("LoRA leaves the experts alone: peft adapts them by target_parameters only")
    if model.quantised and model.stored in UNPACKED:
        written.append(f"the {model.stored} checkpoint is trained in 16 bits (dequantize=True)")
    if any("linear_attn" in weight.name or "kv_a_proj" in weight.name for weight in model.weights):
        written.append(
            "activations of linear and of latent attention are counted as of full attention: "
            "nobody has measured them here"
        )
    if weights.vision(model):
        written.append(
            "--seq-len counts the tokens of pictures too, as cutoff_len does; "
            f"{setup.image_tokens} of them are pictures here (--image-tokens)"
        )
    if setup.engine == "fsdp" and not setup.full and setup.dtype != "float32":
        frozen = frozen_bytes(model, setup) - scale_bytes(model, setup)
        place = "of host memory for" if setup.offloads else "on"
        written.append(
            "Accelerate 1.11 with fsdp_version: 2 casts frozen weights to fp32: "
            f"{frozen / setup.gpus / GIB:.1f} GiB more {place} each card; with fsdp_version: 1 it "
            "does not"
        )
    if setup.loads_whole:
        whole_gib = whole_bytes(model, setup) / GIB
        reason = (
            "transformers 5.6 packs 4-bit weights on the card before they are divided; a loader "
            "that packs and divides layer by layer is --load divided"
            if setup.method == "qlora"
            else "Accelerate's zero3_init_flag: true, or fsdp_cpu_ram_efficient_loading: true with "
            "FSDP, divides it first"
        )
        written.append(f"loading puts all {whole_gib:.1f} GiB on each card: {reason}")
    return written
