"""The weights of a vision tower, and of what leads from it to the decoder.

Names and shapes are those of transformers 5.6. vLLM divides a tower's linear layers over the cards
of a tensor parallel group, as the decoder's.
"""

from collections.abc import Iterator

from lab.planner.families import SANDWICH_NORMS
from lab.planner.tensors import OUTPUTS, WHOLE, Weight
from lab.planner.values import Values


def tower_weights(family_vision: str, vision: Values, hidden: int) -> Iterator[Weight]:
    """All weights of the tower whose section of config.json is `vision`; it ends in `hidden`.

    >>> tower = tower_weights("qwen2_5_vl", Values({}, "Qwen2.5-VL-7B"), hidden=3584)
    >>> sum(weight.count for weight in tower) / 1e6
    676.550144
    """
    towers = {
        "qwen2_vl": qwen2_vl,
        "qwen2_5_vl": qwen2_5_vl,
        "qwen3_vl": qwen3_vl,
        "qwen3_5": qwen3_5,
        "siglip": siglip,
        "gemma4": gemma4,
    }
    yield from towers[family_vision](vision, hidden)


def layer(name: str, outputs: int, inputs: int, times: int = 1, bias: bool = True):
    """A linear layer and its bias, `times` times."""
    split = OUTPUTS if times > 1 else WHOLE
    yield Weight(f"{name}.weight", (outputs, inputs), part="vision", split=split, times=times)
    if bias:
        yield Weight(f"{name}.bias", (outputs,), part="vision", split=split, times=times)


def norm(name: str, size: int, times: int = 1, bias: bool = True) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (size,), part="vision", times=times)
    if bias:
        yield Weight(f"{name}.bias", (size,), part="vision", times=times)


def patches(name: str, width: int, vision: Values, patch: int, bias: bool) -> Iterator[Weight]:
    """The convolution that reads two frames' patches."""
    side = vision.number("patch_size", default=patch)
    frames = vision.number("temporal_patch_size", default=2)
    colours = vision.number("in_channels", "in_chans", default=3)
    yield Weight(f"{name}.weight", (width, colours, frames, side, side), part="vision")
    if bias:
        yield Weight(f"{name}.bias", (width,), part="vision")


def qwen2_vl(vision: Values, hidden: int) -> Iterator[Weight]:
    """Source: modeling_qwen2_vl.py. Its `hidden_size` is the decoder's."""
    width = vision.number("embed_dim", default=1280)
    depth = vision.number("depth", default=32)
    inner = int(width * vision.decimal("mlp_ratio", 4))
    block = "model.visual.blocks.*."
    yield from patches("model.visual.patch_embed.proj", width, vision, 14, bias=False)
    yield from norm(f"{block}norm1", width, depth)
    yield from norm(f"{block}norm2", width, depth)
    yield from layer(f"{block}attn.qkv", 3 * width, width, depth)
    yield from layer(f"{block}attn.proj", width, width, depth)
    yield from layer(f"{block}mlp.fc1", inner, width, depth)
    yield from layer(f"{block}mlp.fc2", width, inner, depth)
    yield from qwen_merger(width, vision, vision.number("hidden_size", default=hidden), True)


def qwen_merger(width: int, vision: Values, outputs: int, bias: bool) -> Iterator[Weight]:
    """Qwen2-VL's: four patches become one token."""
    merged = width * vision.number("spatial_merge_size", default=2) ** 2
    yield from norm("model.visual.merger.ln_q", width, bias=bias)
    yield from layer("model.visual.merger.mlp.0", merged, merged)
    yield from layer("model.visual.merger.mlp.2", outputs, merged)


def qwen2_5_vl(vision: Values, hidden: int) -> Iterator[Weight]:
    """Source: modeling_qwen2_5_vl.py."""
    width = vision.number("hidden_size", default=1280)
    depth = vision.number("depth", default=32)
    inner = vision.number("intermediate_size", default=3420)
    block = "model.visual.blocks.*."
    yield from patches("model.visual.patch_embed.proj", width, vision, 14, bias=False)
    yield from norm(f"{block}norm1", width, depth, bias=False)
    yield from norm(f"{block}norm2", width, depth, bias=False)
    yield from layer(f"{block}attn.qkv", 3 * width, width, depth)
    yield from layer(f"{block}attn.proj", width, width, depth)
    yield from layer(f"{block}mlp.gate_proj", inner, width, depth)
    yield from layer(f"{block}mlp.up_proj", inner, width, depth)
    yield from layer(f"{block}mlp.down_proj", width, inner, depth)
    outputs = vision.number("out_hidden_size", default=hidden)
    yield from qwen_merger(width, vision, outputs, bias=False)


def qwen3_5(vision: Values, hidden: int) -> Iterator[Weight]:
    """Source: modeling_qwen3_5.py."""
    width = vision.number("hidden_size", default=1152)
    depth = vision.number("depth", default=27)
    inner = vision.number("intermediate_size", default=4304)
    positions = vision.number("num_position_embeddings", default=2304)
    outputs = vision.number("out_hidden_size", default=hidden)
    merged = width * vision.number("spatial_merge_size", default=2) ** 2
    block = "model.visual.blocks.*."
    yield from patches("model.visual.patch_embed.proj", width, vision, 16, bias=True)
    yield Weight("model.visual.pos_embed.weight", (positions, width), part="vision")
    yield from norm(f"{block}norm1", width, depth)
    yield from norm(f"{block}norm2", width, depth)
    yield from layer(f"{block}attn.qkv", 3 * width, width, depth)
    yield from layer(f"{block}attn.proj", width, width, depth)
    yield from layer(f"{block}mlp.linear_fc1", inner, width, depth)
    yield from layer(f"{block}mlp.linear_fc2", width, inner, depth)
    yield from norm("model.visual.merger.norm", width)
    yield from layer("model.visual.merger.linear_fc1", merged, merged)
    yield from layer("model.visual.merger.linear_fc2", outputs, merged)


def qwen3_vl(vision: Values, hidden: int) -> Iterator[Weight]:
    """Qwen3.5's, and a merger for each layer whose output the decoder's first layers take too."""
    yield from qwen3_5(vision, hidden)
    width = vision.number("hidden_size", default=1152)
    outputs = vision.number("out_hidden_size", default=hidden)
    merged = width * vision.number("spatial_merge_size", default=2) ** 2
    depths = vision.numbers("deepstack_visual_indexes") or [8, 16, 24]
    for index in range(len(depths)):
        merger = f"model.visual.deepstack_merger_list.{index}"
        yield from norm(f"{merger}.norm", merged)
        yield from layer(f"{merger}.linear_fc1", merged, merged)
        yield from layer(f"{merger}.linear_fc2", outputs, merged)


def siglip(vision: Values, hidden: int) -> Iterator[Weight]:
    """Gemma 3's. Source: modeling_siglip.py, modeling_gemma3.py."""
    width = vision.number("hidden_size", default=768)
    depth = vision.number("num_hidden_layers", default=12)
    inner = vision.number("intermediate_size", default=3072)
    side = vision.number("patch_size", default=16)
    picture = vision.number("image_size", default=224)
    positions = (picture // side) ** 2
    tower = "model.vision_tower."
    block = f"{tower}encoder.layers.*."
    embedding = f"{tower}embeddings.patch_embedding"
    colours = vision.number("num_channels", default=3)
    yield Weight(f"{embedding}.weight", (width, colours, side, side), part="vision")
    yield Weight(f"{embedding}.bias", (width,), part="vision")
    yield Weight(f"{tower}embeddings.position_embedding.weight", (positions, width), part="vision")
    yield from norm(f"{block}layer_norm1", width, depth)
    yield from norm(f"{block}layer_norm2", width, depth)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from layer(f"{block}self_attn.{projection}", width, width, depth)
    yield from layer(f"{block}mlp.fc1", inner, width, depth)
    yield from layer(f"{block}mlp.fc2", width, inner, depth)
    yield from norm(f"{tower}post_layernorm", width)
    if vision.flag("vision_use_head", default=True):
        yield from siglip_head(f"{tower}head.", width, inner)
    projector = "model.multi_modal_projector."
    yield Weight(f"{projector}mm_input_projection_weight", (width, hidden), part="vision")
    yield from norm(f"{projector}mm_soft_emb_norm", width, bias=False)


def siglip_head(name: str, width: int, inner: int) -> Iterator[Weight]:
    """Pooling by attention, which a model that reads all patches does not have."""
    yield Weight(f"{name}probe", (1, 1, width), part="vision")
    yield Weight(f"{name}attention.in_proj_weight", (3 * width, width), part="vision")
    yield Weight(f"{name}attention.in_proj_bias", (3 * width,), part="vision")
    yield from layer(f"{name}attention.out_proj", width, width)
    yield from norm(f"{name}layernorm", width)
    yield from layer(f"{name}mlp.fc1", inner, width)
    yield from layer(f"{name}mlp.fc2", width, inner)


def gemma4(vision: Values, hidden: int) -> Iterator[Weight]:
    """Source: modeling_gemma4.py.

    >>> of_e4b = gemma4(Values({}, "Gemma 4 E4B"), hidden=2560)
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
