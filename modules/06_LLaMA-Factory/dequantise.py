"""The model as a training on 4 bits saw it: weights rounded to 4 bits, and widened again.

An adapter that was trained on the rounded weights belongs to them, not to those before.
"""

import shutil
from pathlib import Path

from lab import fail, shown

WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "original")  # not copied as they are


def on_4_bits(settings) -> bool:
    """Whether LLaMA-Factory let bitsandbytes round the weights, by the training's settings."""
    method = settings.get("quantization_method", "bnb")
    return settings.get("quantization_bit") == 4 and method == "bnb"


def dtype_of(settings):
    """The type that LLaMA-Factory turns the stored weights into before it rounds them."""
    import torch

    if settings.get("bf16") or settings.get("pure_bf16"):
        return torch.bfloat16
    return torch.float16 if settings.get("fp16") else torch.float32


def rounded(weight, settings):
    """The weight, of its own shape and type, by way of 4 bits: NF4, a scale for 64 numbers.

    The scales are rounded to 8 bits too. Source: QLoRA, arXiv 2305.14314, section 3.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight,
        quant_type=settings.get("quantization_type", "nf4"),
        compress_statistics=settings.get("double_quantization", True),
    )
    return dequantize_4bit(packed, state)


def names_of_rounded(base: Path) -> set[str]:
    """Names of the weights that are rounded: transformers' own choice, made without any weight.

    Those of all linear layers but the last, which turns vectors into logits.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    except ValueError as e:  # a model of pictures, say
        fail(f"cannot tell which weights of {shown(base)} were rounded: {str(e).splitlines()[0]}")
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    quantizer.preprocess_model(model, device_map=None)
    layers = model.named_modules()
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, Linear4bit)}


def write(base: Path, folder: Path, settings, device: str) -> None:
    """Write the model in `base` to `folder` as the training with these `settings` saw it.

    In the host's memory is one file at a time, on the `device` one weight. Exit code 2 where it
    cannot be done.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    missing = names_of_rounded(base)
    dtype = dtype_of(settings)
    try:
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*WEIGHTS))
        for file in sorted(base.glob("*.safetensors")):
            weights = load_file(file)
            for name in missing & weights.keys():
                weights[name] = rounded(weights[name].to(device, dtype), settings).cpu()
            missing -= weights.keys()
            save_file(weights, folder / file.name, {"format": "pt"})
    except (OSError, SafetensorError) as e:
        fail(f"cannot write the rounded model to {shown(folder)}: {str(e).splitlines()[0]}")
    if missing:
        fail(f"the files of {shown(base)} have no weight {min(missing)}, which was rounded")
