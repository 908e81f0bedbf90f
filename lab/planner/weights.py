"""How many weights a model has, and their bytes. Exact: tests/test_memory.py counts them in models
that transformers builds.
"""

from lab.planner.config import Model
from lab.planner.constants import LINEAR_BYTES, width


def attention(model: Model) -> int:
    """Weights in the linear layers of one attention: q and o are hidden x queries, k and v
    hidden x keys (arXiv 2305.13245).

    >>> attention(QWEN_7B)  # 2 * 3584 * (3584 + 512)
    29360128
    """
    return 2 * model.hidden * (model.query_width + model.kv_width)


def mlp(model: Model, intermediate: int) -> int:
    """Weights of a gated MLP of that width: gate, up and down (arXiv 2002.05202).

    >>> mlp(QWEN_7B, 18944)  # 3 * 3584 * 18944
    203685888
    """
    return 3 * model.hidden * intermediate


def linear(model: Model) -> int:
    """Weights in all linear layers of the decoder: what quantisation packs and LoRA adapts.

    >>> linear(QWEN_7B)  # 28 * (29360128 + 203685888)
    6525288448
    """
    dense_layers = model.layers - model.expert_layers
    dense = dense_layers * mlp(model, model.intermediate)
    width_of_all = model.experts * model.expert_intermediate + model.shared_intermediate
    sparse = model.expert_layers * mlp(model, width_of_all)
    return model.layers * attention(model) + dense + sparse


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
    return embedding(model) * (1 if model.tied else 2)


def other(model: Model) -> int:
    """Norms, biases and routers.

    >>> other(QWEN_7B)  # 28 layers * (2 norms * 3584 + 4608 biases) + the last norm
    333312
    """
    norms = 2 * model.hidden + 2 * model.head_dim * model.qk_norm
    qkv_biases = (model.query_width + 2 * model.kv_width) * model.qkv_bias
    biases = qkv_biases + model.hidden * model.o_bias
    has_shared = model.shared_intermediate > 0  # its gate is one more column of the router
    routers = model.expert_layers * model.hidden * (model.experts + has_shared)
    return model.layers * (norms + biases) + model.hidden + routers


def parameters(model: Model) -> int:
    """All weights, each once: the psi of the papers.

    >>> parameters(QWEN_7B)  # as the model card says
    7615616512
    """
    return linear(model) + other(model) + embeddings(model)


def active(model: Model) -> int:
    """Weights in linear layers that one token passes, the output layer included.

    >>> active(QWEN_7B)  # dense: all of them, and the output layer
    7070285824
    """
    idle_experts = model.experts - model.experts_per_token
    idle = model.expert_layers * mlp(model, idle_experts * model.expert_intermediate)
    return linear(model) - idle + embedding(model)


def stored_bytes(model: Model, dtype: str = "auto") -> float:
    """Bytes of all weights, stored as `dtype` ("auto": as the checkpoint has them).

    >>> stored_bytes(QWEN_7B)
    15231233024
    >>> round(stored_bytes(QWEN_7B, "int4") / 1e9, 2)  # embeddings stay in 16 bits
    5.57
    """
    dtype = model.stored if dtype == "auto" else dtype
    rest = parameters(model) - linear(model)
    return linear(model) * LINEAR_BYTES[dtype] + rest * width(dtype)


def lora(model: Model, rank: int) -> int:
    """Trained weights of LoRA on every linear layer: rank x (inputs + outputs) each (arXiv
    2106.09685). Experts are left alone, as peft does.

    >>> lora(QWEN_7B, 16)
    40370176
    """
    query_and_output = 2 * (model.hidden + model.query_width)
    key_and_value = 2 * (model.hidden + model.kv_width)
    per_dense = 3 * (model.hidden + model.intermediate)
    per_shared = 3 * (model.hidden + model.shared_intermediate)
    ends = model.layers * (query_and_output + key_and_value)  # inputs + outputs, all layers
    ends += (model.layers - model.expert_layers) * per_dense
    if model.shared_intermediate:
        ends += model.expert_layers * per_shared
    return rank * ends
