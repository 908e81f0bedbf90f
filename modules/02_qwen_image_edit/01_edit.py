"""Edit a picture in words with diffusers' QwenImageEditPipeline, whose 57.7 GB fit no 24 GB card: a recipe says what lies where.

    python modules/02_qwen_image_edit/01_edit.py                                   # a drawn picture, the profile's recipe
    python modules/02_qwen_image_edit/01_edit.py --image cat.png --prompt "make the cat white" --recipe nf4

Look at: what the recipe needs before anything is loaded, seconds a step, the peak on each card beside what was expected, and
runs/02_qwen_image_edit/*_side_by_side.png. The CPU profile's model has random weights: everything is real but its picture, noise.
"""

import argparse
import importlib.util
import itertools
import json
import math
import re
import resource
import signal
import statistics
import sys
import time
from pathlib import Path

from lab import RUNS, fail, jobs, models, results, shown
from lab.profile import load_profile

# -----------------------------------------------------------------------------
# 1. Loading by the recipe

class PilProcessor:
    """The pipeline's processor without torchvision: pictures to patches, and one <|image_pad|> token for each merged patch."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text, images, padding=True, return_tensors="pt"):
        from transformers.feature_extraction_utils import BatchFeature

        pixels = self.image_processor(images=images, return_tensors=return_tensors)
        counts = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        text = [re.sub(r"<\|image_pad\|>", lambda pad: pad[0] * next(counts), line) for line in text]
        return BatchFeature({**self.tokenizer(text, padding=padding, return_tensors=return_tensors), **pixels})


def load(recipe: str, folder: Path, device: str, dtype, cards=("cuda:0", "cuda:1")):
    """The pipeline, its weights where RECIPES (02_what_fits.py) says."""
    import torch
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QwenImageEditPipeline, QwenImageTransformer2DModel
    from diffusers.hooks import apply_group_offloading
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
    from transformers import BitsAndBytesConfig as TextBitsAndBytesConfig

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    common = {"dtype": dtype, "tokenizer": tokenizer, "processor": None}  # from_pretrained would refuse a class that is not transformers'
    if recipe == "plain":
        pipe = QwenImageEditPipeline.from_pretrained(folder, device_map=device, **common)
    elif recipe == "fp8":  # 1 byte a weight on the second card, cast to bf16 layer by layer when it is used
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        transformer.to(cards[1])  # before the rest is loaded: the host never holds both
        pipe = QwenImageEditPipeline.from_pretrained(folder, transformer=transformer, **common)
        pipe.text_encoder.to(cards[0])
        pipe.vae.to(cards[0])
        add_hook_to_module(transformer, AlignDevicesHook(cards[1], io_same_device=True))  # latents to its card and back, every step
    elif recipe == "nf4":
        words = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        quantization = PipelineQuantizationConfig(quant_mapping={"transformer": BitsAndBytesConfig(**words), "text_encoder": TextBitsAndBytesConfig(**words)})
        pipe = QwenImageEditPipeline.from_pretrained(folder, quantization_config=quantization, **common)
        pipe.vae.to(cards[0])
        pipe.vae.enable_tiling(512, 512, 448, 448)  # a quarter of its working memory
    else:  # group-offload: every layer comes from the host when it is used
        pipe = QwenImageEditPipeline.from_pretrained(folder, **common)
        where = {"onload_device": torch.device(cards[0]), "offload_type": "leaf_level"}
        pipe.transformer.enable_group_offload(**where, use_stream=True)  # the next layer is copied while this one computes
        apply_group_offloading(pipe.text_encoder, **where)  # runs once or twice a picture: not worth page-locked memory
        pipe.vae.to(cards[0])
    pipe.processor = PilProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"), tokenizer)
    return pipe


# -----------------------------------------------------------------------------
# 2. Pictures

def input_picture(path: Path | None, size: int):
    from PIL import Image, ImageDraw, UnidentifiedImageError

    if path is None:
        picture, n = Image.new("RGB", (size, size), "#f4efe4"), size / 16
        pen = ImageDraw.Draw(picture)
        pen.ellipse((2 * n, 4 * n, 8 * n, 10 * n), fill="#d03a2f")
        pen.rectangle((9 * n, 7 * n, 14 * n, 12 * n), fill="#2f5fd0")
        return picture
    if not path.is_file():
        fail(f"there is no picture {shown(path)}")
    try:
        picture = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as e:
        fail(f"{shown(path)} is not a picture that can be read ({str(e).splitlines()[0][:80]}): give a PNG, JPEG or WebP file")
    if max(picture.size) > 8 * min(picture.size):
        fail(f"{shown(path)} is {picture.width} x {picture.height}: one side may be at most 8 times the other, crop it first")
    return picture


def save(picture, file: Path) -> None:
    partial = file.with_name(f".{file.name}.tmp")
    picture.save(partial, format="PNG")
    partial.replace(file)  # an interrupted run leaves the earlier picture


def main() -> None:
    profile = load_profile()
    values = profile.image_edit
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="picture to edit (default: a red circle and a blue square, drawn here)")
    parser.add_argument("--prompt", default="make the circle green", help="what to change (default: %(default)s)")
    parser.add_argument("--recipe", default=values.recipe, help="plain, fp8, nf4 or group-offload (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=values.steps, help="denoising steps, at least 2 (default: %(default)s)")
    parser.add_argument("--size", type=int, default=values.size, help="the output has about SIZE x SIZE pixels (default: %(default)s)")
    parser.add_argument("--true-cfg-scale", type=float, default=values.true_cfg_scale, help="above 1, each step runs twice (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first noise (default: %(default)s)")
    parser.add_argument("--model", default=values.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RUNS / "02_qwen_image_edit", help="folder for the pictures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    what_fits, random_model = importlib.import_module("02_what_fits"), importlib.import_module("random_model")  # beside this script
    if args.recipe not in what_fits.RECIPES:
        fail(f"unknown recipe {args.recipe}: choose one of {', '.join(what_fits.RECIPES)}")
    if profile.device == "cpu" and args.recipe != "plain":
        fail(f"recipe {args.recipe} needs a GPU, and profile {profile.name} computes on the CPU: use --recipe plain")
    if args.recipe == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        fail("recipe nf4 needs the package bitsandbytes, which is in locks/gpu.txt: run 'make setup'")
    if not args.prompt.strip():
        fail("the prompt is empty: say what to change, such as --prompt 'make the circle green'")
    if args.steps < 2 or not 64 <= args.size <= 2048 or args.true_cfg_scale < 1:
        fail("--steps must be at least 2 (the first one warms up and is not timed), --size 64 to 2048, --true-cfg-scale at least 1")
    jobs.refuse_taken_cards()
    picture = input_picture(args.image, args.size)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot write to the folder {shown(args.output)}: {e.strerror}")

    # -----------------------------------------------------------------------------
    # 3. The model's folder, and whether the recipe fits

    if args.model is None:
        folder = RUNS / "models" / "qwen-image-edit-tiny"
        if not (folder / "model_index.json").is_file():
            print(f"building a tiny model with random weights in {shown(folder)} (once)", file=sys.stderr, flush=True)
            random_model.build("tiny", folder)
    elif Path(args.model).is_dir():
        folder = Path(args.model)
    else:
        folder = models.model_folder(args.model)
    index = folder / "model_index.json"
    found = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else "no pipeline"
    if found != "QwenImageEditPipeline":
        fail(f"the folder {shown(folder)} holds {found}, not a QwenImageEditPipeline")
    tensors, have = what_fits.tensors_of(folder), what_fits.memory(profile.device)
    need = what_fits.needs(args.recipe, tensors, args.size, profile.device)
    if lack := what_fits.lacking(args.recipe, tensors, args.size, have, profile.device):
        fitting = [r for r in what_fits.RECIPES if profile.device == "cuda" and not what_fits.lacking(r, tensors, args.size, have)]
        fail(f"recipe {args.recipe} does not fit: it needs {lack}; " + (f"use --recipe {fitting[0]}" if fitting else "no recipe fits this machine"))
    print(f"{shown(folder)}, recipe {args.recipe}: needs about " + ", ".join(f"{gib:.1f} GiB on {place}" for place, gib in sorted(need.items())))

    # -----------------------------------------------------------------------------
    # 4. Load, edit, save

    import torch
    from diffusers.utils import logging
    from PIL import Image

    logging.set_verbosity_error()  # it warns of a processor that is not torchvision's
    began = time.perf_counter()
    full = f"recipe {args.recipe} ran out of GPU memory (%s): take a smaller --size, or another --recipe"
    try:
        pipe = load(args.recipe, folder, profile.device, getattr(torch, values.dtype))
    except torch.OutOfMemoryError as e:
        fail(full % str(e).split(".")[0])
    except (OSError, ValueError) as e:
        fail(f"the model in {shown(folder)} cannot be loaded: {str(e).strip().splitlines()[0][:200]} -- get it again")
    load_s = time.perf_counter() - began
    weights = sum(2 * math.prod(shape) for part in tensors.values() for shape in part.values())
    print(f"{type(pipe).__name__} of diffusers loaded in {load_s:.1f} s: {weights / 1e9:.3f} GB of bf16 weights in the files")
    cards = range(torch.cuda.device_count() if profile.device == "cuda" else 0)
    stamps = []

    def stamp(_pipe, _step, _timestep, _tensors):
        for i in cards:
            torch.cuda.synchronize(i)
        stamps.append(time.perf_counter())
        return {}

    ratio = picture.width / picture.height
    width, height = (max(64, round(args.size * r / 16) * 16) for r in (ratio**0.5, ratio**-0.5))
    words = {"negative_prompt": " "} if args.true_cfg_scale > 1 else {}  # without one, no second run of the transformer
    began = time.perf_counter()
    try:
        output = pipe(
            image=picture, prompt=args.prompt, true_cfg_scale=args.true_cfg_scale, height=height, width=width, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(args.seed), callback_on_step_end=stamp, **words,
        ).images[0]  # fmt: skip
    except torch.OutOfMemoryError as e:
        fail(full % str(e).split(".")[0])
    total_s = time.perf_counter() - began

    left, right = (p.resize((round(384 * p.width / p.height), 384)) for p in (picture, output))
    pair = Image.new("RGB", (left.width + 8 + right.width, 384), "white")
    pair.paste(left, (0, 0))
    pair.paste(right, (left.width + 8, 0))
    files = [args.output / "output.png", args.output / f"{args.recipe}_side_by_side.png"]
    try:
        for image, file in zip((output, pair), files, strict=True):
            save(image, file)
    except OSError as e:
        fail(f"cannot write to the folder {shown(args.output)}: {e.strerror}")

    step_s = statistics.median(b - a for a, b in itertools.pairwise(stamps))
    metrics = {"load_s": round(load_s, 2), "step_s": round(step_s, 3), "total_s": round(total_s, 2), "step_count": args.steps}
    metrics |= {"width_px": output.width, "height_px": output.height, "weights_gb": round(weights / 1e9, 3)}
    peaks = {f"cuda:{i}": torch.cuda.max_memory_allocated(i) / 2**30 for i in cards}
    peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    metrics |= {f"{place.replace(':', '')}_peak_gib": round(gib, 2) for place, gib in peaks.items()}
    print(f"{args.steps} steps at {output.width} x {output.height}: {step_s:.2f} s a step, {total_s:.1f} s in all")
    print("peak: " + ", ".join(f"{gib:.1f} GiB on {place} (about {need.get(place, 0):.1f} expected)" for place, gib in peaks.items()))
    print("pictures: " + ", ".join(shown(file) for file in files))
    if (folder / random_model.LABEL).is_file():
        print("the weights are random, so the picture is noise: what is real is the pipeline, its shapes and its steps")
    config = {key: shown(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results.finish(__file__, metrics, config, "" if args.recipe == values.recipe else args.recipe)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: earlier pictures are as they were, nothing else was written", file=sys.stderr)
        raise SystemExit(130) from None
