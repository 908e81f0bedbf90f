"""What pictures cost a training: the activations that a frozen vision tower keeps all the same.

LLaMA-Factory freezes the tower, so one expects a forward pass that keeps nothing. But under
gradient checkpointing peft asks the input embeddings for gradients, so that they reach the first
layer's adapters, and transformers 5.6 takes a tower's patches for such embeddings
(PreTrainedModel.enable_input_require_grads). LLaMA-Factory in turn checkpoints only blocks with
trained weights. The tower then keeps everything, for gradients that nobody wants.
tests/test_trainings.py counts it in a running graph. Qwen3-VL and Qwen3.5 are not concerned: their
towers name no input embeddings. Nor is QLoRA: peft leaves 4-bit models alone.
"""

from lab.planner.config import Model
from lab.planner.states import Training
from lab.planner.tensors import Weight

QWEN = "visual.merger.ln_q.weight"  # in towers of Qwen2-VL and Qwen2.5-VL
SIGLIP = "layer_norm1.weight"  # in Gemma 3's
GEMMA_PATCHES = 16  # for a token, pooled: 4096 for 256
HEADS = 16  # of each of these towers
QWEN_HEAD = 80  # numbers of one head of Qwen's


def part_of_tower(model: Model, ending: str) -> Weight | None:
    """The tower's weight with this ending of its name."""
    tower = [weight for weight in model.weights if weight.part == "vision"]
    return next((weight for weight in tower if weight.name.endswith(ending)), None)


def kept_bytes_per_patch(model: Model) -> int:
    """Bytes that the blocks of a tower keep for each patch; 0 where they keep none.

    Of Qwen2.5-VL-7B, in each of 32 blocks: 2 x (4 h + 4) for the norms' inputs in fp32, 12 h for
    q, k, v and the output of attention, 6 x 3420 for the MLP, 704 for angles and log-sum-exp.

    >>> kept_bytes_per_patch(QWEN_7B)
    0
    >>> 32 * (2 * (4 * 1280 + 4) + 12 * 1280 + 6 * 3420 + 704)
    1498624
    """
    is_qwen = part_of_tower(model, QWEN) is not None
    first_norm = part_of_tower(model, "norm1.weight" if is_qwen else SIGLIP)
    if first_norm is None:
        return 0
    width = first_norm.shape[0]
    log_sum_exp = 4 * HEADS
    if is_qwen:
        # v is a view of q, k and v together, which stay; q and k are turned, in fp32 angles.
        attention = 12 * width + 2 * 4 * QWEN_HEAD + log_sum_exp
    else:
        attention = 8 * width + log_sum_exp
    gate = part_of_tower(model, "mlp.gate_proj.weight")
    if gate is not None:  # gate, silu(gate), up; norms without bias, RMSNorm, cast to fp32
        norms = 2 * (4 * width + 4)
        mlp = 6 * gate.shape[0]
    else:  # of quick_gelu the input and the sigmoid, of gelu the input
        norms = 2 * (2 * width + 4)
        mlp = (4 if is_qwen else 2) * part_of_tower(model, "mlp.fc1.weight").shape[0]
    return first_norm.times * (norms + attention + mlp)


def patches_per_token(model: Model) -> int:
    """How many patches become one token of the decoder.

    >>> patches_per_token(QWEN_7B)  # no tower
    0
    """
    merger = part_of_tower(model, "merger.mlp.0.weight")
    first_norm = part_of_tower(model, "norm1.weight")
    if merger is None or first_norm is None:
        return GEMMA_PATCHES if part_of_tower(model, SIGLIP) else 0
    return merger.shape[1] // first_norm.shape[0]


def tower_bytes(model: Model, setup: Training) -> float:
    """What the tower keeps of a micro-step's pictures until the end of the backward pass.

    >>> tower_bytes(QWEN_7B, Training(method="lora", checkpointing=True, image_tokens=324))
    0
    """
    if setup.method != "lora" or not setup.checkpointing:
        return 0
    patches = setup.micro_batch * setup.image_tokens * patches_per_token(model)
    return patches * kept_bytes_per_patch(model)
