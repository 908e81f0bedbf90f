"""How a checkpoint stores its weights: the quantization_config of a config.json, weight by weight.

Linear layers and experts are packed; embeddings, norms, biases, routers, the output layer and a
vision tower stay in 16 bits, as published checkpoints have them, and what a method's own list of
exceptions names.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from lab import fail
from lab.planner.constants import LINEAR_BYTES
from lab.planner.tensors import PACKED, Weight
from lab.planner.values import Values

SECTIONS = ("quantization_config", "compression_config")  # the second is of older checkpoints
# Keys under which the methods list modules that stay as they are.
EXCEPTIONS = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
SCALE = 2  # bytes of a 16-bit scale


class Format(NamedTuple):
    """How the numbers of a weight are stored; `label` is a key of LINEAR_BYTES, "" for 16 bits."""

    label: str = ""
    number: float | None = None  # bytes of one, with its share of scales and zero points
    group: tuple[int, int] = (1, 1)  # outputs x inputs that share a scale


KEPT = Format()


def integers(bits: int, group_size: int, symmetric: bool) -> Format:
    """Whole numbers with a 16-bit scale, and a zero point unless symmetric, for each group.

    >>> integers(4, 128, symmetric=False)  # AWQ: 0.5 + (2 + 0.5) / 128
    Format(label='int4', number=0.51953125, group=(1, 128))
    """
    of_group = SCALE + (0 if symmetric else bits / 8)
    one_a_row = group_size <= 0
    number = bits / 8 + (0 if one_a_row else of_group / group_size)
    return Format(f"int{bits}", number, (1, 1 if one_a_row else group_size))


def blocks_of_fp8(config: Values) -> Format:
    """FP8, with one scale for all, or a 32-bit one for each block.

    >>> blocks_of_fp8(Values({"weight_block_size": [128, 128]}, "a model"))
    Format(label='fp8', number=1.000244140625, group=(128, 128))
    """
    block = config.numbers("weight_block_size")
    if not block:
        return Format("fp8", 1.0)
    if len(block) != 2 or min(block) < 1:
        config.refuse("weight_block_size", "two whole numbers: outputs and inputs of a block")
    return Format("fp8", 1 + 4 / (block[0] * block[1]), (block[0], block[1]))


# -----------------------------------------------------------------------------
# The methods


def of_integers(config: Values) -> Callable[[str], Format]:
    """AWQ, GPTQ and auto-round, whose patterns are regular expressions or names of modules."""
    bits = config.number("bits", "w_bit", default=4)
    if bits not in (2, 3, 4, 8):
        config.refuse("bits", "2, 3, 4 or 8")
    group_size = config.number("group_size", "q_group_size", default=128, least=-1)
    # GPTQ checkpoints carry zero points even where they are symmetric.
    is_awq = config.text("quant_method") == "awq"
    symmetric = is_awq and not config.flag("zero_point", default=True)
    packed = integers(bits, group_size, symmetric)
    changes = config.section("dynamic").values | config.section("extra_config").values

    def format_of(module: str) -> Format:
        for pattern, change in changes.items():
            expression = pattern.removeprefix("-:").removeprefix("+:")
            if not (matches_one(module, f"re:{expression}") or matches_one(module, expression)):
                continue
            changed = Values(change if isinstance(change, dict) else {}, config.name)
            changed_bits = changed.number("bits", default=bits)
            if pattern.startswith("-:") or changed_bits == 16:
                return KEPT
            return integers(changed_bits, group_size, symmetric)
        return packed

    return format_of


def of_groups(config: Values) -> Callable[[str], Format]:
    """compressed-tensors: each group of targets its own format."""
    targets: list[tuple[list[str], Format]] = []
    for group in config.section("config_groups").values.values():
        if not isinstance(group, dict):
            config.refuse("config_groups", "an object of objects")
        section = Values(group, config.name)
        packed = of_group(section.section("weights"))
        targets.append((section.words("targets") or ["Linear"], packed))
    if not targets:
        config.refuse("config_groups", "an object with at least one group")

    def format_of(module: str) -> Format:
        names = [module, *names_of_experts(module)]
        named = [kind for patterns, kind in targets if any(matches(n, patterns) for n in names)]
        of_class = [kind for patterns, kind in targets if "Linear" in patterns]
        return (named or of_class or [KEPT])[0]

    return format_of


def names_of_experts(module: str) -> list[str]:
    """What a checkpoint calls the matrices that lie together in a tensor of three dimensions."""
    if not module.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return []
    place, _, name = module.rpartition(".")
    parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
    return [f"{place}.0.{part}" for part in parts]


def of_group(weights: Values) -> Format:
    """The format of one group of compressed-tensors."""
    if not weights.values:
        return KEPT
    bits = weights.number("num_bits", default=8)
    is_float = weights.text("type", default="int") == "float"
    group_size = weights.number("group_size", default=-1, least=-1)
    if is_float and bits == 8:
        block = weights.numbers("block_structure")
        return blocks_of_fp8(Values({"weight_block_size": block or None}, weights.name))
    if is_float and bits == 4:
        return NVFP4 if group_size == 16 else MXFP4
    if not 2 <= bits <= 8:
        weights.refuse("num_bits", "2 to 8")
    return integers(bits, group_size, weights.flag("symmetric", default=True))


NVFP4 = Format("nvfp4", LINEAR_BYTES["nvfp4"], (1, 16))
MXFP4 = Format("mxfp4", LINEAR_BYTES["mxfp4"], (1, 32))


def of_modelopt(config: Values) -> Callable[[str], Format]:
    """NVIDIA's: FP8 or NVFP4, named in quant_algo."""
    inner = config.section("quantization")
    algorithm = (config.text("quant_algo") or inner.text("quant_algo")).upper()
    if "FP4" in algorithm:
        return lambda module: NVFP4
    if algorithm.startswith("FP8"):
        return lambda module: Format("fp8", 1.0)
    refuse_method(config.name, f"modelopt with quant_algo {algorithm or 'missing'}")


def cache_dtype(config: Values) -> str:
    """What a modelopt checkpoint says of the KV cache: "fp8" or "auto".

    Source: vllm/utils/torch_utils.py, get_kv_cache_quant_algo_string.
    """
    quantization = section_of(config)
    if not quantization.text("quant_method").startswith("modelopt"):
        return "auto"
    for section in (quantization.section("quantization"), quantization):
        algorithm = section.values.get("kv_cache_quant_algo")
        scheme = section.values.get("kv_cache_scheme")
        eight_bits = isinstance(scheme, dict) and scheme.get("num_bits") == 8
        if eight_bits or "fp8" in f"{scheme} {algorithm}".lower():
            return "fp8"
    return "auto"


def of_bitsandbytes(config: Values) -> Callable[[str], Format]:
    label = "nf4" if config.flag("load_in_4bit") else "int8"
    return lambda module: Format(label, LINEAR_BYTES[label])


def of_mxfp4(config: Values) -> Callable[[str], Format]:
    """gpt-oss: only the experts."""
    return lambda module: MXFP4 if "experts" in module else KEPT


METHODS = {
    "awq": of_integers,
    "gptq": of_integers,
    "auto-round": of_integers,
    "compressed-tensors": of_groups,
    "modelopt": of_modelopt,
    "modelopt_fp4": of_modelopt,
    "fp8": lambda config: lambda module: blocks_of_fp8(config),
    "fbgemm_fp8": lambda config: lambda module: Format("fp8", 1.0),
    "mxfp4": of_mxfp4,
    "bitsandbytes": of_bitsandbytes,
}


def refuse_method(name: str, method: str) -> None:
    fail(
        f"{name} is quantised by {method}, which the planner does not know: it knows "
        f"{', '.join(METHODS)}. Give the folder with its safetensors files instead: "
        "their headers say what each weight takes"
    )


# -----------------------------------------------------------------------------
# From a method to the weights


def matches(module: str, patterns: list[str]) -> bool:
    """Whether one of the patterns names this module.

    "re:" begins a regular expression, `*` stands for anything; else a pattern names a module or
    one that it is part of. Checkpoints call the decoder's place by several names, so that names
    are compared from "layers." on.

    >>> module = "model.language_model.layers.1.linear_attn.in_proj_a"
    >>> matches(module, ["re:.*linear_attn.*"]), matches(module, ["model.layers.1.linear_attn"])
    (True, True)
    >>> matches(module, ["model.layers.10"]), matches(module, ["linear_attn", "lm_head"])
    (False, True)
    """
    return any(matches_one(module, pattern) for pattern in patterns)


def matches_one(module: str, pattern: str) -> bool:
    expression = compiled(pattern)
    if expression is None:
        return False
    if pattern.startswith("re:"):
        return expression.match(module) is not None
    return expression.search(from_layers(module)) is not None


@cache
def compiled(pattern: str) -> re.Pattern | None:
    """A pattern's expression, made once: lists of exceptions are long. None for a wrong one."""
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error:
            return None
    expression = re.escape(from_layers(pattern).strip(".")).replace(r"\*", ".*")
    return re.compile(rf"(^|\.){expression}(\.|$)")


def from_layers(name: str) -> str:
    return name[name.find("layers.") :] if "layers." in name else name


def section_of(config: Values) -> Values:
    """What a config.json says of its quantisation; empty where nothing is quantised."""
    sections = [config.section(key) for key in SECTIONS]
    return next((section for section in sections if section.values), sections[0])


def stored(weights: list[Weight], config: Values) -> list[Weight]:
    """The weights, each with the format in which the checkpoint of this config.json has it.

    Raises SystemExit(2) with one sentence for a method that the planner does not know.
    """
    quantization = section_of(config)
    if not quantization.values:
        return weights
    method = quantization.text("quant_method") or "no quant_method"
    if method not in METHODS:
        refuse_method(config.name, method)
    format_of = METHODS[method](quantization)
    kept = [pattern for key in EXCEPTIONS for pattern in quantization.words(key)]
    return list(
        packed(weights, lambda module: KEPT if matches(module, kept) else format_of(module))
    )


def packed(weights: list[Weight], format_of: Callable[[str], Format]) -> Iterator[Weight]:
    """Each weight in its format; one that differs between layers comes once for each format."""
    for weight in weights:
        if weight.part not in PACKED:
            yield weight
            continue
        module = weight.name.removesuffix(".weight")
        layers_of = defaultdict(list)
        for layer in weight.layers or (0,):
            kind = format_of(module.replace("*", str(layer)))
            smaller_than_a_block = weight.outputs < kind.group[0]
            layers_of[KEPT if smaller_than_a_block else kind].append(layer)
        for (label, number, group), layers in layers_of.items():
            where = tuple(layers) if weight.layers else ()
            yield replace(weight, layers=where, stored=label, number=number, group=group)
