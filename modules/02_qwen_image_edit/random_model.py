"""A QwenImageEditPipeline folder with random weights, where the real 57.7 GB are not at hand.

    python modules/02_qwen_image_edit/random_model.py tiny runs/models/tiny
    python modules/02_qwen_image_edit/random_model.py full FOLDER

`tiny` has small shapes, a few MB: the CPU profile's model. `full` has the shapes of
Qwen/Qwen-Image-Edit: does a recipe fit, how fast is it? Files and names are the real ones, the
pictures are noise. The weights are the same at every call. They are written tile by tile: 1.4 GiB
of memory, the libraries included, for any size.
"""

import argparse
import json
import math
import os
import shutil
import signal
import struct
import sys
import zlib
from functools import cache
from pathlib import Path

from lab import fail, models, shown

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SHARD = 5e9  # most bytes in one safetensors file
TILE = 2**24  # random numbers that are drawn once and repeated
LABEL = "RANDOM_WEIGHTS"  # a file of this name says so

# The scheduler's settings as published with Qwen-Image.
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# The pipeline's parts, as model_index.json names them.
PARTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2VLProcessor"],
}


def components(kind: str, vocabulary: int = 152064, ids: tuple[int, ...] = (0, 1, 2, 3)) -> dict:
    """{transformer, text_encoder, vae}, on torch's meta device: shapes without memory.

    `ids` are VISION's token ids.
    """
    import torch
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    if kind == "full":
        transformer, vae = {}, {}  # the classes' defaults are the published shapes
        text = {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
        vision = {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        }
        sections = [16, 24, 24]
    else:
        transformer = {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
        }
        transformer |= {"joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)}
        # 8x smaller latents like the real one: the pipeline scales every picture to 1 megapixel
        # before it encodes it
        vae = {
            "base_dim": 8,
            "z_dim": 4,
            "num_res_blocks": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        }
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        }
        sections = [1, 1, 2]
    text |= {
        "vocab_size": vocabulary,
        "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": sections, "rope_type": "default", "type": "default"},
    }
    start, end, image, video = ids
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        hidden_size=text["hidden_size"],
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        vision_token_id=start,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    with torch.device("meta"):
        return {
            "transformer": QwenImageTransformer2DModel(**transformer),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
            "vae": AutoencoderKLQwenImage(**vae),
        }


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@cache
def tile(fan_in: int) -> memoryview:
    """TILE normally distributed numbers of variance 1 / fan_in, as bfloat16 bytes.

    A layer's output then has its input's scale.
    """
    import torch

    numbers = torch.randn(TILE, generator=torch.Generator().manual_seed(0)) * fan_in**-0.5
    return memoryview(numbers.bfloat16().view(torch.uint8).numpy())


def values(name: str, shape: tuple[int, ...]):
    """The tensor's bfloat16 bytes, in pieces.

    Ones for norms, zeros for biases, else the tile from a place of the tensor's own.
    """
    left = 2 * math.prod(shape)
    if len(shape) == 1 or name.endswith("gamma"):
        yield (b"\x80\x3f" if name.endswith(("weight", "gamma")) else b"\0\0") * (left // 2)
        return
    begin = zlib.crc32(name.encode()) % TILE * 2
    while left:
        piece = tile(math.prod(shape[1:]))[begin : begin + left]
        yield piece
        left -= len(piece)
        begin = 0


def write(folder: Path, stem: str, tensors: dict[str, tuple[int, ...]]) -> None:
    """safetensors files of at most SHARD bytes, and their index where there are several."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        if shards[-1] and filled + 2 * math.prod(shape) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * math.prod(shape)
    where = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{stem}{part}.safetensors"
        header = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            size = 2 * math.prod(tensors[name])
            header[name] = {
                "dtype": "BF16",
                "shape": tensors[name],
                "data_offsets": [offset, offset + size],
            }
            offset += size
            where[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                f.writelines(values(name, tensors[name]))
    if len(shards) > 1:
        total = sum(2 * math.prod(shape) for shape in tensors.values())
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": where})
        )


def build(kind: str, folder: Path, tokenizer_folder: Path | None = None) -> None:
    """Write the pipeline folder; it has its name only when it is whole.

    Exit code 2 where the disk is too small.
    """
    import diffusers
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_folder or models.model_folder("smollm2-135m")
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    tokenizer.add_special_tokens({"additional_special_tokens": VISION})
    ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in VISION)
    parts = components(kind, 152064 if kind == "full" else len(tokenizer), ids)
    folder.parent.mkdir(parents=True, exist_ok=True)
    need = sum(2 * math.prod(shape) for model in parts.values() for shape in shapes(model).values())
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        fail(
            f"{shown(folder)} needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there: "
            "choose another folder"
        )
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        for name, model in parts.items():
            (partial / name).mkdir(parents=True)
            if name == "text_encoder":  # of transformers
                model.config.save_pretrained(partial / name)
                write(partial / name, "model", shapes(model))
            else:  # of diffusers
                model.save_config(partial / name)
                write(partial / name, "diffusion_pytorch_model", shapes(model))
        diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_config(partial / "scheduler")
        # `tiny` looks at pictures of at most 112 x 112, `full` at as many pixels as the published
        # one
        pixels = {
            "shortest_edge": 56 * 56,
            "longest_edge": 12845056 if kind == "full" else 112 * 112,
        }
        Qwen2VLImageProcessorPil(size=pixels).save_pretrained(partial / "processor")
        tokenizer.save_pretrained(partial / "processor")
        tokenizer.save_pretrained(partial / "tokenizer")
        index = {
            "_class_name": "QwenImageEditPipeline",
            "_diffusers_version": diffusers.__version__,
            **PARTS,
        }
        (partial / "model_index.json").write_text(json.dumps(index, indent=1))
        (partial / LABEL).write_text(
            f"Random weights, shapes: {kind}. The pictures of this model are noise.\n"
        )
        try:
            partial.rename(folder)
        except OSError:  # another process was first
            if not (folder / "model_index.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["tiny", "full"], help="shapes of the model")
    parser.add_argument("folder", type=Path, help="folder to write, which must not exist")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer (default: that of smollm2-135m)"
    )
    args = parser.parse_args()
    if args.folder.exists():
        fail(f"{shown(args.folder)} exists already: choose another folder, or remove it")
    if args.tokenizer and not (args.tokenizer / "tokenizer_config.json").is_file():
        fail(f"there is no tokenizer in {shown(args.tokenizer)}: no tokenizer_config.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    build(args.kind, args.folder, args.tokenizer)
    size = sum(f.stat().st_size for f in args.folder.rglob("*.safetensors"))
    print(f"{shown(args.folder)}: {size / 1e9:.3f} GB of random weights")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: what was written is removed", file=sys.stderr)
        raise SystemExit(130) from None
