"""Every weight of a model of a known family: its name, its shape, and how vLLM divides it.

Names and shapes are those of transformers 5.6; a `*` in a name stands for the number of a layer.
Shapes are outputs x inputs, as PyTorch's linear layers have them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lab.planner.families import Family
from lab.planner.values import Values

# How tensor parallelism divides a weight (arXiv 1909.08053): by its outputs, by its inputs, by
# its KV heads (which are copied where there are more cards), or not at all.
OUTPUTS = "outputs"
INPUTS = "inputs"
KV_HEADS = "kv heads"
WHOLE = "whole"

PACKED = ("linear", "experts")  # the parts of a model that quantisation packs


@dataclass(frozen=True)
class Weight:
    """A weight, once for each of its layers."""

    name: str  # model.layers.*.self_attn.q_proj.weight
    shape: tuple[int, ...]
    layers: tuple[int, ...] = ()  # of the decoder; () for a weight outside of it
    part: str = "other"  # linear, experts, embedding, head, vision or other
    split: str = WHOLE
    times: int = 1  # in a tower: in how many of its layers
    stored: str = ""  # the checkpoint's format; "" for 16 or 32 bits
    number: float | None = None  # bytes of one number in that format
    group: tuple[int, int] = (1, 1)  # outputs x inputs that share a scale

    @property
    def each(self) -> int:
        """Numbers in one layer's."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        """Outputs of the matrix, or of each of the matrices that lie together.

        >>> Weight("experts", (8, 64, 32), part="experts").outputs
        64
        """
        return self.shape[-2 if self.part == "experts" else 0]

    @property
    def count(self) -> int:
        """Numbers over all layers.

        >>> Weight("q", (8, 4), layers=(0, 1, 2)).count
        96
        """
        return self.each * max(len(self.layers), self.times)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, by the names of config.json, and what each of its layers is."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    tied: bool
    kinds: tuple[str, ...]  # of each layer: full_attention, sliding_attention, linear_attention
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of the experts that every token passes, together
    sparse: tuple[bool, ...] = ()  # of each layer: whether it has experts


def decides(family_field: bool | str, config: Values) -> bool:
    """Whether the family has it, or the key of config.json that it names says so."""
    return config.flag(family_field) if isinstance(family_field, str) else family_field


def linear(
    name: str, outputs: int, inputs: int, split: str, bias: bool = False, part: str = "linear"
) -> Iterator[Weight]:
    """A linear layer and its bias, which is divided as its outputs are."""
    yield Weight(f"{name}.weight", (outputs, inputs), part=part, split=split)
    if bias:
        bias_split = WHOLE if split == INPUTS else split
        yield Weight(f"{name}.bias", (outputs,), split=bias_split)


# -----------------------------------------------------------------------------
# The blocks of a layer


def attention(decoder: Decoder, family: Family, config: Values) -> Iterator[Weight]:
    """Attention with grouped KV heads (arXiv 2305.13245)."""
    hidden = decoder.hidden
    query = decoder.heads * decoder.head_dim
    key = decoder.kv_heads * decoder.head_dim
    bias = decides(family.qkv_bias, config)
    if family.qkv_fused:
        yield from linear("self_attn.qkv_proj", query + 2 * key, hidden, OUTPUTS, bias)
    else:
        queries_and_gate = 2 * query if family.gated else query
        yield from linear("self_attn.q_proj", queries_and_gate, hidden, OUTPUTS, bias)
        yield from linear("self_attn.k_proj", key, hidden, KV_HEADS, bias)
        yield from linear("self_attn.v_proj", key, hidden, KV_HEADS, bias)
    yield from linear("self_attn.o_proj", hidden, query, INPUTS, decides(family.o_bias, config))
    if has_qk_norm(family, config):
        over_all = family.qk_norm == "all"
        yield Weight("self_attn.q_norm.weight", (query if over_all else decoder.head_dim,))
        yield Weight("self_attn.k_norm.weight", (key if over_all else decoder.head_dim,))
    if family.sinks:
        yield Weight("self_attn.sinks", (decoder.heads,), split=OUTPUTS)


def has_qk_norm(family: Family, config: Values) -> bool:
    if family.qk_norm in ("", "head", "all"):
        return bool(family.qk_norm)
    return config.flag(family.qk_norm)


def latent_attention(decoder: Decoder, family: Family, config: Values) -> Iterator[Weight]:
    """DeepSeek-V2's: keys and values from one short vector a token (arXiv 2405.04434)."""
    hidden = decoder.hidden
    content = config.number("qk_nope_head_dim")
    position = config.number("qk_rope_head_dim")
    value = config.number("v_head_dim")
    latent = config.number("kv_lora_rank")
    queries = decoder.heads * (content + position)
    bias = decides(family.qkv_bias, config)
    if config.has("q_lora_rank"):
        rank = config.number("q_lora_rank")
        yield from linear("self_attn.q_a_proj", rank, hidden, WHOLE, bias)
        yield Weight("self_attn.q_a_layernorm.weight", (rank,))
        yield from linear("self_attn.q_b_proj", queries, rank, OUTPUTS)
    else:
        yield from linear("self_attn.q_proj", queries, hidden, OUTPUTS)
    yield from linear("self_attn.kv_a_proj_with_mqa", latent + position, hidden, WHOLE, bias)
    yield Weight("self_attn.kv_a_layernorm.weight", (latent,))
    keys_and_values = decoder.heads * (content + value)
    yield from linear("self_attn.kv_b_proj", keys_and_values, latent, OUTPUTS)
    yield from linear("self_attn.o_proj", hidden, decoder.heads * value, INPUTS, bias)


def linear_attention(decoder: Decoder, family: Family, config: Values) -> Iterator[Weight]:
    """A gated delta net: a state of constant size instead of keys and values (arXiv 2412.06464)."""
    hidden = decoder.hidden
    value_heads = config.number("linear_num_value_heads")
    head = config.number("linear_value_head_dim")
    key = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
    value = value_heads * head
    mixed = 2 * key + value
    block = "linear_attn"
    yield Weight(f"{block}.dt_bias", (value_heads,), split=OUTPUTS)
    yield Weight(f"{block}.A_log", (value_heads,), split=OUTPUTS)
    kernel = config.number("linear_conv_kernel_dim")
    yield Weight(f"{block}.conv1d.weight", (mixed, 1, kernel), split=OUTPUTS)
    yield Weight(f"{block}.norm.weight", (head,))
    yield from linear(f"{block}.out_proj", hidden, value, INPUTS)
    if family.linear == "next":
        yield from linear(f"{block}.in_proj_qkvz", mixed + value, hidden, OUTPUTS)
        yield from linear(f"{block}.in_proj_ba", 2 * value_heads, hidden, OUTPUTS)
    else:
        yield from linear(f"{block}.in_proj_qkv", mixed, hidden, OUTPUTS)
        yield from linear(f"{block}.in_proj_z", value, hidden, OUTPUTS)
        yield from linear(f"{block}.in_proj_b", value_heads, hidden, OUTPUTS)
        yield from linear(f"{block}.in_proj_a", value_heads, hidden, OUTPUTS)


def mlp(
    name: str, hidden: int, intermediate: int, bias: bool = False, fused: bool = False
) -> Iterator[Weight]:
    """A gated MLP (arXiv 2002.05202)."""
    if fused:
        yield from linear(f"{name}.gate_up_proj", 2 * intermediate, hidden, OUTPUTS, bias)
    else:
        yield from linear(f"{name}.gate_proj", intermediate, hidden, OUTPUTS, bias)
        yield from linear(f"{name}.up_proj", intermediate, hidden, OUTPUTS, bias)
    yield from linear(f"{name}.down_proj", hidden, intermediate, INPUTS, bias)


def experts(decoder: Decoder, family: Family) -> Iterator[Weight]:
    """A router, its experts in two tensors of three dimensions, and those that all tokens pass."""
    hidden = decoder.hidden
    count = decoder.experts
    width = decoder.expert_intermediate
    is_gpt_oss = family.moe == "gpt_oss"
    router = "mlp.router" if is_gpt_oss else "mlp.gate"
    yield from linear(router, count, hidden, WHOLE, bias=is_gpt_oss, part="other")
    gate_and_up = (count, 2 * width, hidden)
    down = (count, hidden, width)
    if is_gpt_oss:
        gate_and_up = (count, hidden, 2 * width)
        down = (count, width, hidden)
        yield Weight("mlp.experts.gate_up_proj_bias", (count, 2 * width), split=OUTPUTS)
        yield Weight("mlp.experts.down_proj_bias", (count, hidden))
    yield Weight("mlp.experts.gate_up_proj", gate_and_up, part="experts", split=OUTPUTS)
    yield Weight("mlp.experts.down_proj", down, part="experts", split=INPUTS)
    if not decoder.shared_intermediate:
        return
    if family.moe == "deepseek":
        yield from mlp("mlp.shared_experts", hidden, decoder.shared_intermediate)
    else:
        yield from mlp("mlp.shared_expert", hidden, decoder.shared_intermediate)
        yield from linear("mlp.shared_expert_gate", 1, hidden, WHOLE, part="other")


# -----------------------------------------------------------------------------
# The decoder


def of_layers(weights: Iterator[Weight], layers: list[int], decoder: str) -> Iterator[Weight]:
    """These weights in these layers."""
    if not layers:
        return
    for weight in weights:
        name = f"{decoder}layers.*.{weight.name}"
        yield Weight(name, weight.shape, tuple(layers), weight.part, weight.split)


def wide_attentions(decoder: Decoder, family: Family, config: Values) -> Iterator[Weight]:
    """Gemma 4's: full layers with wider heads than sliding ones, and keys that may be values too.

    Source: modeling_gemma4.py.
    """
    everywhere = range(decoder.layers)
    full = [number for number in everywhere if decoder.kinds[number] == "full_attention"]
    sliding = [number for number in everywhere if number not in full]
    one_value = config.flag("attention_k_eq_v")
    kv_heads = decoder.kv_heads
    if one_value:
        kv_heads = config.number("num_global_key_value_heads", default=kv_heads)
    wide = replace(decoder, head_dim=config.number("global_head_dim"), kv_heads=kv_heads)
    of_full = attention(wide, family, config)
    if one_value:
        of_full = (weight for weight in of_full if "v_proj" not in weight.name)
    yield from of_layers(attention(decoder, family, config), sliding, family.decoder)
    yield from of_layers(of_full, full, family.decoder)


def decoder_weights(decoder: Decoder, family: Family, config: Values) -> Iterator[Weight]:
    """All weights of the decoder, with embedding and output layer."""
    everywhere = range(decoder.layers)
    linear_layers = [n for n in everywhere if decoder.kinds[n] == "linear_attention"]
    others = [n for n in everywhere if decoder.kinds[n] != "linear_attention"]
    sparse = [n for n in everywhere if decoder.sparse[n]]
    dense = [n for n in everywhere if not decoder.sparse[n]]
    place = family.decoder

    if family.wide:
        yield from wide_attentions(decoder, family, config)
    else:
        block = latent_attention if family.mla else attention
        yield from of_layers(block(decoder, family, config), others, place)
    if linear_layers:
        yield from of_layers(linear_attention(decoder, family, config), linear_layers, place)
    bias = decides(family.mlp_bias, config)
    gated_mlp = mlp("mlp", decoder.hidden, decoder.intermediate, bias, family.gate_fused)
    yield from of_layers(gated_mlp, dense, place)
    yield from of_layers(experts(decoder, family), sparse, place)
    norms = (Weight(f"{norm}.weight", (decoder.hidden,)) for norm in family.norms)
    yield from of_layers(norms, list(everywhere), place)

    shape = (decoder.vocab, decoder.hidden)
    yield Weight(f"{place}embed_tokens.weight", shape, part="embedding", split=OUTPUTS)
    yield Weight(f"{place}norm.weight", (decoder.hidden,))
    if not decoder.tied:
        yield Weight("lm_head.weight", shape, part="head", split=OUTPUTS)
