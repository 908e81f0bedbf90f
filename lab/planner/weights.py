"""How many weights a model has, and their bytes.

Exact: tests/test_memory.py counts them in models that transformers builds.
"""

from lab.planner.config import Model
from lab.planner.constants import LINEAR_BYTES, width


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
    """Weights in all linear layers of the decoder: what quantisation packs and LoRA adapts.

    >>> linear(QWEN_7B)  # 28 * (29360128 + 203685888)
    6525288448
    """
    attentions = model.layers * attention(model)
    dense_layers = model.layers - model.expert_layers
    dense = dense_layers * mlp(model, model.intermediate)
    experts = model.experts * mlp(model, model.expert_intermediate)
    shared = mlp(model, model.shared_intermediate)
    sparse = model.expert_layers * (experts + shared)
    return attentions + dense + sparse


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
    copies = 1 if model.tied else 2
    return copies * embedding(model)


def other(model: Model) -> int:
    """Norms, biases and routers.

    >>> other(QWEN_7B)  # 28 layers * (2 norms * 3584 + 4608 biases) + the last norm
    333312
    """
    norms = 2 * model.hidden
    if model.qk_norm:
        norms += 2 * model.head_dim
    biases = 0
    if model.qkv_bias:
        biases += model.query_width + 2 * model.kv_width
    if model.o_bias:
        biases += model.hidden

    columns = model.experts
    if model.shared_intermediate:
        columns += 1  # the gate of the expert that every token passes
    routers = model.expert_layers * model.hidden * columns
    last_norm = model.hidden
    return model.layers * (norms + biases) + last_norm + routers


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
    idle_of_layer = idle_experts * mlp(model, model.expert_intermediate)
    idle = model.expert_layers * idle_of_layer
    return linear(model) - idle + embedding(model)


def stored_bytes(model: Model, dtype: str = "auto") -> float:
    """Bytes of all weights, stored as `dtype` ("auto": as the checkpoint has them).

    >>> stored_bytes(QWEN_7B)
    15231233024
    >>> round(stored_bytes(QWEN_7B, "int4") / 1e9, 2)  # embeddings stay in 16 bits
    5.57
    """
    if dtype == "auto":
        dtype = model.stored
    packed = linear(model)
    rest = parameters(model) - packed
    return packed * LINEAR_BYTES[dtype] + rest * width(dtype)


def lora(model: Model, rank: int) -> int:
    """Trained weights of LoRA on every linear layer: rank x (inputs + outputs) of each.

    Experts are left alone, as peft does. Source: arXiv 2106.09685.

    >>> lora(QWEN_7B, 16)  # 16 * 28 layers * (2 * 7168 + 2 * 4096 + 3 * 22528)
    40370176
    """
    query_and_output = 2 * (model.hidden + model.query_width)
    key_and_value = 2 * (model.hidden + model.kv_width)
    inputs_and_outputs = model.layers * (query_and_output + key_and_value)

    dense_layers = model.layers - model.expert_layers
    inputs_and_outputs += dense_layers * 3 * (model.hidden + model.intermediate)
    if model.shared_intermediate:
        shared = 3 * (model.hidden + model.shared_intermediate)
        inputs_and_outputs += model.expert_layers * shared
    return rank * inputs_and_outputs


def experts(model: Model) -> int:
    """Weights of the experts that a router chooses from.

    transformers 5.6 keeps those of a layer in two 3-d parameters.

    >>> experts(QWEN_7B)
    0
    """
    of_a_layer = model.experts * mlp(model, model.expert_intermediate)
    return model.expert_layers * of_a_layer


def tensors(model: Model) -> list[tuple[int, int, bool]]:
    """Sizes of the tensors with two and three dimensions: (weights, how many, whether packed).

    Packed are the matrices of linear layers in the decoder: what bitsandbytes replaces.

    >>> sum(weights * count for weights, count, _ in tensors(QWEN_7B)) == 7615616512 - 333312
    True
    """
    query = model.hidden * model.query_width
    key = model.hidden * model.kv_width
    dense_layers = model.layers - model.expert_layers
    sizes = [
        (embedding(model), 1 if model.tied else 2, False),
        (query, 2 * model.layers, True),  # and the output
        (key, 2 * model.layers, True),  # and the value
        (model.hidden * model.intermediate, 3 * dense_layers, True),
        (model.hidden * model.shared_intermediate, 3 * model.expert_layers, True),
    ]
    down = model.experts * model.hidden * model.expert_intermediate
    sizes += [(2 * down, model.expert_layers, False), (down, model.expert_layers, False)]
    return [size for size in sizes if size[0] and size[1]]
