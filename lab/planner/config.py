"""The sizes in a config.json, under its own names."""

from dataclasses import dataclass
from functools import partial

from lab import fail
from lab.planner.constants import LINEAR_BYTES

# What the code of an architecture decides and its config.json does not say.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {"qkv_bias": True},
    "Qwen3MoeForCausalLM": {"qk_norm": True},
}


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer. `experts` 0 means a dense model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # width of a dense layer's MLP
    vocab: int
    max_len: int  # tokens it was made for
    tied: bool = False  # input and output embedding are one tensor
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of the expert that every token passes
    expert_layers: int = 0  # layers that have experts
    stored: str = "bfloat16"  # a key of LINEAR_BYTES: how the linear layers are stored

    @property
    def query_width(self) -> int:
        """Numbers in the queries of one token and layer.

        >>> QWEN_7B.query_width
        3584
        """
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in the keys (and in the values) of one token and layer.

        >>> QWEN_7B.kv_width
        512
        """
        return self.kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width of the MLP that one token passes: of all its experts together in a MoE.

        >>> QWEN_7B.mlp_width
        18944
        """
        if not self.experts:
            return self.intermediate
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate


# The model of every worked number in this package: Qwen2.5-7B-Instruct.
QWEN_7B = Model(
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab=152064,
    max_len=32768,
    qkv_bias=True,
)


def read(config: dict, name: str = "this model") -> Model:
    """The sizes in a config.json.

    Raises SystemExit(2) with one sentence for an architecture or a value that it cannot judge.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        fail(
            f"{name} has the architecture {architecture}, which the planner does not know: "
            f"it knows {', '.join(ARCHITECTURES)}"
        )
    number = partial(whole_number, config, name)
    hidden = number("hidden_size")
    heads = number("num_attention_heads")
    says_bias = architecture.startswith(("Llama", "Qwen3"))
    bias = says_bias and bool(config.get("attention_bias", False))
    has_experts = "Moe" in architecture or "Mixtral" in architecture
    sizes = {
        "layers": number("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": number("num_key_value_heads", default=heads),
        "head_dim": number("head_dim", default=hidden // heads),
        "intermediate": number("intermediate_size"),
        "vocab": number("vocab_size"),
        "max_len": number("max_position_embeddings", default=2048),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "stored": stored_as(config, name),
        "qkv_bias": bias,
        "o_bias": bias,
    }
    experts = expert_sizes(config, name) if has_experts else {}
    model = Model(**sizes | ARCHITECTURES[architecture] | experts)
    if model.heads % model.kv_heads:
        fail(
            f"the config.json of {name} has {model.heads} heads and {model.kv_heads} KV heads: "
            "the first must be a multiple of the second"
        )
    return model


def whole_number(config: dict, name: str, *keys: str, default: int | None = None) -> int:
    """The value of the first of `keys` that the config has; refused unless it counts something."""
    present = (config[key] for key in keys if config.get(key) is not None)
    value = next(present, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1e9:
        fail(
            f"the config.json of {name} says {keys[0]} = {value}: it must be a whole number above 0"
        )
    return value


def expert_sizes(config: dict, name: str) -> dict[str, int]:
    """The fields of `Model` that describe the experts. Not every layer must have some."""
    number = partial(whole_number, config, name)
    has_shared = bool(config.get("shared_expert_intermediate_size"))
    dense_layers = set(config.get("mlp_only_layers") or [])
    step = number("decoder_sparse_step", default=1)
    expert_layers = [
        layer
        for layer in range(number("num_hidden_layers"))
        if layer not in dense_layers and (layer + 1) % step == 0
    ]
    return {
        "experts": number("num_experts", "num_local_experts", default=1),
        "experts_per_token": number("num_experts_per_tok"),
        "expert_intermediate": number("moe_intermediate_size", "intermediate_size"),
        "shared_intermediate": number("shared_expert_intermediate_size") if has_shared else 0,
        "expert_layers": len(expert_layers),
    }


def stored_as(config: dict, name: str) -> str:
    """The key of LINEAR_BYTES for what config.json says of the checkpoint.

    >>> stored_as({"torch_dtype": "bfloat16"}, "a model")
    'bfloat16'
    >>> stored_as({"quantization_config": {"quant_method": "awq", "bits": 4}}, "a model")
    'int4'
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype = dtype.removeprefix("torch.")
        return dtype if dtype in LINEAR_BYTES else "bfloat16"
    method = quantization.get("quant_method")
    bits = quantization.get("bits")
    if method in ("awq", "gptq") and bits in (4, 8):
        return f"int{bits}"
    if method == "fp8":
        return "fp8"
    if method == "bitsandbytes":
        return "nf4" if quantization.get("load_in_4bit") else "int8"
    if method == "compressed-tensors":
        groups = list((quantization.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if groups else {}
        bits = weights.get("num_bits")
        is_fp8 = weights.get("type") == "float" and bits == 8
        kind = "fp8" if is_fp8 else f"int{bits}"
        if kind in LINEAR_BYTES:
            return kind
    fail(
        f"{name} is quantised by {method} ({bits} bits), which the planner does not know: "
        "it knows awq, gptq, fp8, bitsandbytes and compressed-tensors"
    )
