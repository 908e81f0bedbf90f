"""How many weights a model has, and their bytes.

Exact: tests/test_memory.py counts them in models that transformers builds.
"""

from lab.planner.config import Model
from lab.planner.constants import LINEAR_BYTES, width
from lab.planner.tensors import PACKED, Weight


def of_parts(model: Model, *parts: str) -> int:
    """Weights in these parts: linear, experts, embedding, head, vision, other."""
    return sum(weight.count for weight in model.weights if weight.part in parts)


def attention(model: Model) -> int:
    """Weights in the linear layers q, k, v and o of one attention (arXiv 2305.13245).

    >>> attention(QWEN_7B)  # 2 * 3584 * 3584 + 2 * 3584 * 512
    29360128
    """
    query_and_output = 2 * model.hidden * model.query_width
    key_and_value = 2 * model.hidden * model.kv_width
    return query_and_output + key_and_value


def mlp(model: Model, intermediate: int) -> int:
    """Weights of a gated MLP of that width: gate, up and down (arXiv 2002.05202).

    >>> mlp(QWEN_7B, 18944)  # 3 * 3584 * 18944
    203685888
    """
    return 3 * model.hidden * intermediate


def linear(model: Model) -> int:
    """Weights in all linear layers and experts of the decoder: what quantisation packs.

    >>> linear(QWEN_7B)  # 28 * (29360128 + 203685888)
    6525288448
    """
    return of_parts(model, *PACKED)


def experts(model: Model) -> int:
    """Weights of the experts among them, which lie in tensors of three dimensions.

    >>> experts(QWEN_7B)  # a dense model
    0
    """
    return of_parts(model, "experts")


def vision(model: Model) -> int:
    """Weights of the tower that reads pictures, where there is one.

    >>> vision(QWEN_7B)
    0
    """
    return of_parts(model, "vision")


def without_tower(model: Model) -> tuple[Weight, ...]:
    """What is loaded of a model that reads no pictures."""
    return tuple(weight for weight in model.weights if weight.part != "vision")


def embedding(model: Model) -> int:
    """Weights of the embedding; the output layer has as many.

    >>> embedding(QWEN_7B)  # 152064 * 3584
    544997376
    """
    return model.vocab * model.hidden


def embeddings(model: Model) -> int:
    """Weights of embedding and output layer together, which a tied model has once.

    >>> embeddings(QWEN_7B)
    1089994752
    """
    return of_parts(model, "embedding", "head")


def other(model: Model) -> int:
    """Norms, biases and routers.

    >>> other(QWEN_7B)  # 28 layers * (2 norms * 3584 + 4608 biases) + the last norm
    333312
    """
    return of_parts(model, "other")


def parameters(model: Model) -> int:
    """All weights, each once: the psi of the papers.

    >>> parameters(QWEN_7B)  # as the model card says
    7615616512
    """
    return sum(weight.count for weight in model.weights)


def active(model: Model) -> int:
    """Weights in linear layers that one token passes, the output layer included.

    >>> active(QWEN_7B)  # dense: all of them, and the output layer
    7070285824
    """
    dense = linear(model) - experts(model)
    awake = experts(model) * model.experts_per_token // max(1, model.experts)
    return dense + awake + embedding(model)


def number_bytes(model: Model, weight: Weight, dtype: str) -> float:
    """Bytes of one number of this weight where the model is asked for as `dtype`.

    A quantised checkpoint stays as it is; "auto" also leaves the others as they are.
    """
    if weight.number is not None:
        return weight.number
    dtype = model.dtype if dtype == "auto" else dtype
    is_packed = weight.part in PACKED and not model.quantised
    return LINEAR_BYTES[dtype] if is_packed else width(dtype)


def stored_bytes(model: Model, dtype: str = "auto") -> float:
    """Bytes of all weights, stored as `dtype` ("auto": as the checkpoint has them).

    >>> stored_bytes(QWEN_7B)
    15231233024
    >>> round(stored_bytes(QWEN_7B, "int4") / 1e9, 2)  # embeddings stay in 16 bits
    5.57
    """
    return sum(weight.count * number_bytes(model, weight, dtype) for weight in model.weights)


def lora(model: Model, rank: int) -> int:
    """Trained weights of LoRA on every linear layer: rank x (inputs + outputs) of each.

    Experts are left alone, as peft does. Source: arXiv 2106.09685.

    >>> lora(QWEN_7B, 16)  # 16 * 28 layers * (2 * 7168 + 2 * 4096 + 3 * 22528)
    40370176
    """
    adapted = [weight for weight in model.weights if weight.part == "linear"]
    return rank * sum(sum(weight.shape) * len(weight.layers) for weight in adapted)
