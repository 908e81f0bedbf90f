"""Weights that are counted, not computed: a model built without memory, a checkpoint's headers.

transformers builds any architecture that it knows on PyTorch's meta device, where a tensor has a
shape and no numbers. A safetensors file begins with the name, type and shape of each tensor.
"""

import json
import math
import re
import struct
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from lab import fail
from lab.planner import cache, quantization
from lab.planner.families import Family
from lab.planner.tensors import INPUTS, KV_HEADS, OUTPUTS, PACKED, WHOLE, Weight
from lab.planner.values import Values

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
EMBEDDING = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
HEAD = re.compile(r"(lm_head|embed_out|output_layer)\.")
TOWER = re.compile(r"(^|[._])(visual|vision|image|audio|multi_modal|mm|embed_vision|embed_audio)")
NOT_PACKED = re.compile(r"(norm|router|conv|mlp\.gate\.weight|embed)")
COPIED = re.compile(r"\.(q_a|kv_a|in_a)_proj")
BY_INPUTS = re.compile(r"\.(o_proj|out_proj|down_proj|dense|c_proj|w2|dense_4h_to_h|fc2)\b")


def part_of(name: str, shape: tuple[int, ...]) -> str:
    """What a weight of this name belongs to: see `Weight.part`.

    >>> part_of("model.layers.0.mlp.experts.down_proj", (8, 64, 32))
    'experts'
    >>> part_of("model.layers.0.mlp.gate.weight", (8, 64))
    'other'
    """
    if TOWER.search(name):
        return "vision"
    if EMBEDDING.search(name):
        return "embedding"
    if HEAD.search(name):
        return "head"
    if "layers." not in name and ".h." not in name:
        return "other"
    if "experts" in name and len(shape) != 1 and "shared" not in name:
        return "experts"
    is_packed = len(shape) == 2 and not NOT_PACKED.search(name)
    return "linear" if is_packed else "other"


def split_of(name: str, part: str) -> str:
    """How vLLM divides it, which its name tells."""
    if part in ("embedding", "head"):
        return OUTPUTS
    if part not in ("linear", "experts", "vision") or COPIED.search(name):
        return WHOLE
    if re.search(r"\.[kv]_proj", name) and part == "linear":
        return KV_HEADS
    return INPUTS if BY_INPUTS.search(name) else OUTPUTS


# -----------------------------------------------------------------------------
# A model built without memory


def read(top: Values, config: Values, architecture: str):
    """The model of an architecture that transformers knows, as lab.planner.config.read gives it.

    Raises SystemExit(2) with one sentence where transformers does not know or refuses it.
    """
    from lab.planner import config as configs

    shapes, sizes = built(top, architecture)
    weights = grouped(shapes)
    measured = widths(weights)
    for key, value in (sizes | config.values).items():
        if value is not None and (key not in measured or isinstance(value, int)):
            measured[key] = value
    text = Values(measured, top.name)
    has_experts = any(weight.part == "experts" for weight in weights)
    family = Family(moe="qwen" if has_experts else "")
    decoder = configs.decoder_of(text, top, family)
    latent = config.has("kv_lora_rank")
    caches = cache.of_layers(decoder, text, latent)
    has_mixer = any(re.search(r"mamba|ssm|recurrent|A_log", name) for name in shapes)
    if has_mixer and not any(layer.is_state for layer in caches):
        fail(
            f"{top.name} ({architecture}) has layers with a state that its config.json does not "
            "list: how much of a request these keep, the planner does not know"
        )
    has_head = any(weight.part == "head" for weight in weights)
    if not has_head and not text.flag("tie_word_embeddings"):
        # The class ties by default; the checkpoint, and vLLM by the decoder's section, do not.
        shape = (decoder.vocab, decoder.hidden)
        weights.append(Weight("lm_head.weight", shape, part="head", split=OUTPUTS))
    return configs.model_of(decoder, quantization.stored(weights, top), caches, text, top, family)


def widths(weights: list[Weight]) -> dict[str, int]:
    """The sizes that each class has a name of its own for, from the weights themselves."""
    experts = [weight.shape for weight in weights if weight.part == "experts"]
    stacked = [shape for shape in experts if len(shape) == 3]
    linears = [max(weight.shape) for weight in weights if weight.part == "linear"]
    sizes = {"intermediate_size": max(linears, default=1)}
    if stacked:
        sizes["num_experts"] = stacked[0][0]
        sizes["moe_intermediate_size"] = min(min(shape[1:]) for shape in stacked)
    return sizes


def built(top: Values, architecture: str) -> tuple[dict[str, tuple[int, ...]], dict]:
    """{name of a parameter: its shape}, and the sizes that transformers fills in."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model_class = getattr(transformers, architecture, None)
    if model_class is None or not hasattr(model_class, "config_class"):
        fail(
            f"{top.name} has the architecture {architecture[:60]}, which neither the planner nor "
            f"transformers {transformers.__version__} knows"
        )
    print(
        f"the planner's table does not have {architecture}: transformers builds it without memory, "
        "which takes some seconds",
        file=sys.stderr,
    )
    values = {key: value for key, value in top.values.items() if key != "quantization_config"}
    try:
        settings = model_class.config_class.from_dict(values)
        with torch.device("meta"):
            model = model_class(settings)
    except Exception as e:  # what a class does with a wrong value is its own
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        fail(f"transformers cannot build {top.name} ({architecture}): {reason[:200]}")
    decoder = settings.get_text_config()
    sizes = {key: getattr(decoder, key, None) for key in SIZES}
    filled = {key: value for key, value in decoder.to_dict().items() if key not in SIZES}
    return {name: tuple(w.shape) for name, w in model.named_parameters()}, filled | sizes


def grouped(shapes: dict[str, tuple[int, ...]]) -> list[Weight]:
    """Weights that differ only in the number of their layer, together."""
    layers_of: dict[tuple, list[int]] = defaultdict(list)
    for name, shape in shapes.items():
        part = part_of(name, shape)
        layer = re.search(r"(?:layers|h)\.(\d+)\.", name)
        if layer and part != "vision":
            general = name[: layer.start(1)] + "*" + name[layer.end(1) :]
            layers_of[general, shape, part].append(int(layer[1]))
        else:
            layers_of[name, shape, part] = []
    return [
        Weight(name, shape, tuple(layers), part, split_of(name, part))
        for (name, shape, part), layers in layers_of.items()
    ]


# -----------------------------------------------------------------------------
# A checkpoint's headers

BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
LONGEST_HEADER = 100_000_000  # bytes: the format's own limit


def with_headers(config: dict, name: str, folder: Path):
    """The model of a config.json, whose linear layers take what the files in `folder` say.

    The bytes of all of them are divided evenly. A method of quantisation that the planner does not
    know is no obstacle then. Raises SystemExit(2) with one sentence for a file that is none.
    """
    from lab.planner import config as configs

    if not quantization.section_of(Values(config, name)).values:
        return configs.read(config, name)
    plain = {key: value for key, value in config.items() if key not in quantization.SECTIONS}
    model = configs.read(plain, name)
    packed = sum(weight.count for weight in model.weights if weight.part in PACKED)
    number = stored_in(folder, model.layers) / max(1, packed)
    if not number:
        return configs.read(config, name)
    label = "fp8" if number > 0.9 else "int4"
    weights = (
        replace(weight, number=number, stored=label) if weight.part in PACKED else weight
        for weight in model.weights
    )
    return replace(model, weights=tuple(weights), stored=label)


def stored_in(folder: Path, layers: int) -> int:
    """Bytes of the linear layers and experts of the decoder in these safetensors files."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, (dtype, shape) in header(file).items():
            layer = re.search(r"layers\.(\d+)\.", name)
            is_draft = name.startswith("mtp.") or (layer and int(layer[1]) >= layers)
            plain = re.sub(r"\.(qweight|qzeros|scales|g_idx|weight_\w+)$", ".weight", name)
            matrix = shape if len(shape) > 1 or plain == name else (1, *shape)
            if is_draft or part_of(plain, matrix) not in PACKED:
                continue
            total += math.prod(shape) * BYTES.get(dtype, 1)
    return total


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name of a tensor: (its type, its shape)} of a safetensors file."""
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LONGEST_HEADER:
                raise ValueError("its header is too long")
            tensors = json.loads(stream.read(length))
        return {
            name: (tensor["dtype"], tuple(tensor["shape"]))
            for name, tensor in tensors.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as e:
        fail(f"{file} is no safetensors file: {e}")
