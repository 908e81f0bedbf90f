"""Gemma 4: full layers with wider heads than sliding ones, and a tower of its own.

Names and shapes are those of transformers 5.6, modeling_gemma4.py. Models with per-layer inputs,
experts or sound are built instead: see lab/planner/counted.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from lab.planner.families import SANDWICH_NORMS
from lab.planner.tensors import INPUTS, KV_HEADS, OUTPUTS, Decoder, Weight, linear, of_layers
from lab.planner.values import Values
from lab.planner.vision import layer, norm


def needs_building(config: Values, top: Values) -> bool:
    """Whether this one has what the formulas here leave out."""
    per_layer = config.number("hidden_size_per_layer_input", default=256, least=0)
    return bool(per_layer) or top.has("audio_config") or config.flag("enable_moe_block")


def attentions(decoder: Decoder, config: Values, place: str) -> Iterator[Weight]:
    """The attentions of all layers."""
    kinds = decoder.kinds
    full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    sliding = [number for number in range(decoder.layers) if number not in full]
    one_value = config.flag("attention_k_eq_v")
    kv_heads = decoder.kv_heads
    if one_value:
        kv_heads = config.number("num_global_key_value_heads", default=kv_heads)
    wide = replace(decoder, head_dim=config.number("global_head_dim"), kv_heads=kv_heads)
    yield from of_layers(attention(decoder), sliding, place)
    yield from of_layers(attention(wide, one_value), full, place)


def attention(decoder: Decoder, one_value: bool = False) -> Iterator[Weight]:
    """One attention; with `one_value` the keys are the values too."""
    query = decoder.heads * decoder.head_dim
    key = decoder.kv_heads * decoder.head_dim
    yield from linear("self_attn.q_proj", query, decoder.hidden, OUTPUTS)
    yield from linear("self_attn.k_proj", key, decoder.hidden, KV_HEADS)
    if not one_value:
        yield from linear("self_attn.v_proj", key, decoder.hidden, KV_HEADS)
    yield from linear("self_attn.o_proj", decoder.hidden, query, INPUTS)
    yield Weight("self_attn.q_norm.weight", (decoder.head_dim,))
    yield Weight("self_attn.k_norm.weight", (decoder.head_dim,))


def tower(vision: Values, hidden: int) -> Iterator[Weight]:
    """The tower, which ends in the decoder's `hidden` size.

    >>> of_e4b = tower(Values({}, "Gemma 4 E4B"), hidden=2560)
    >>> sum(weight.count for weight in of_e4b) / 1e6
    169.330688
    """
    width = vision.number("hidden_size", default=768)
    depth = vision.number("num_hidden_layers", default=16)
    inner = vision.number("intermediate_size", default=3072)
    head = vision.number("head_dim", default=64)
    heads = vision.number("num_attention_heads", default=12)
    kv_heads = vision.number("num_key_value_heads", default=heads)
    positions = vision.number("position_embedding_size", default=10240)
    side = vision.number("patch_size", default=16)
    embedder = "model.vision_tower.patch_embedder."
    table = (2, positions, width)
    yield Weight(f"{embedder}position_embedding_table", table, part="vision")
    yield from layer(f"{embedder}input_proj", width, 3 * side * side, bias=False)
    block = "model.vision_tower.encoder.layers.*."
    sizes = {
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, heads * head),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for name, (outputs, inputs) in sizes.items():
        yield from layer(f"{block}{name}.linear", outputs, inputs, depth, bias=False)
    yield from norm(f"{block}self_attn.q_norm", head, depth, bias=False)
    yield from norm(f"{block}self_attn.k_norm", head, depth, bias=False)
    for name in SANDWICH_NORMS:
        yield from norm(f"{block}{name}", width, depth, bias=False)
    yield from layer("model.embed_vision.embedding_projection", hidden, width, bias=False)
