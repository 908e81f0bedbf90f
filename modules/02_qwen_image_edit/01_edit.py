"""Edit a picture in words: diffusers' QwenImageEditPipeline, whose 57.7 GB fit no 24 GB card.

    python modules/02_qwen_image_edit/01_edit.py     # a drawn picture, the profile's recipe
    python modules/02_qwen_image_edit/01_edit.py --image cat.png --prompt "make the cat white"
    python modules/02_qwen_image_edit/01_edit.py --recipe nf4

A recipe says what lies where (recipes.py).
Look at: what the recipe needs before anything is loaded, seconds a step, the peak on each card
beside what was expected, and runs/02_qwen_image_edit/*_side_by_side.png. The CPU profile's model
has random weights: everything is real but its picture, noise.
"""

import argparse
import itertools
import math
import resource
import signal
import statistics
import sys
import time
from pathlib import Path

import inputs
import pictures
import random_model
import recipes
from processor import PilProcessor

from lab import RUNS, fail, jobs, results, shown
from lab.profile import load_profile

# -----------------------------------------------------------------------------
# 1. An edit


def output_size(picture, size: int) -> tuple[int, int]:
    """Width and height of about size x size pixels in the picture's shape, multiples of 16."""
    root = math.sqrt(picture.width / picture.height)
    return max(64, round(size * root / 16) * 16), max(64, round(size / root / 16) * 16)


def edit(pipe, picture, args: argparse.Namespace, cards: range):
    """The edited picture, and the times: the begin, the end of each step, the end."""
    import torch

    def stamp(_pipe, _step, _timestep, _tensors) -> dict:
        for card in cards:
            torch.cuda.synchronize(card)
        times.append(time.perf_counter())
        return {}

    width, height = output_size(picture, args.size)
    # Without a negative prompt the transformer runs once a step, and there is no true CFG.
    guidance = {"negative_prompt": " "} if args.true_cfg_scale > 1 else {}
    times = [time.perf_counter()]
    output = pipe(
        image=picture,
        prompt=args.prompt,
        true_cfg_scale=args.true_cfg_scale,
        height=height,
        width=width,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        callback_on_step_end=stamp,
        **guidance,
    )
    times.append(time.perf_counter())
    return output.images[0], times


# -----------------------------------------------------------------------------
# 2. Loading, one function a recipe. `options`: type and tokenizer


def plain(folder: Path, device: str, options: dict):
    """Everything on one large card, or on the host."""
    from diffusers import QwenImageEditPipeline

    return QwenImageEditPipeline.from_pretrained(folder, device_map=device, **options)


def fp8(folder: Path, cards: tuple[str, str], options: dict):
    """The transformer on a card of its own, a byte a weight, cast layer by layer when used."""
    import torch
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from diffusers import QwenImageEditPipeline, QwenImageTransformer2DModel

    dtype = options["dtype"]
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    transformer.to(cards[1])  # before the rest is loaded: the host never holds both
    pipe = QwenImageEditPipeline.from_pretrained(folder, transformer=transformer, **options)
    pipe.text_encoder.to(cards[0])
    pipe.vae.to(cards[0])
    # The latents go to its card and back, every step.
    add_hook_to_module(transformer, AlignDevicesHook(cards[1], io_same_device=True))
    return pipe


def nf4(folder: Path, card: str, options: dict):
    """Transformer and text encoder in 4 bits, all on one card."""
    import diffusers
    import transformers

    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": options["dtype"],
    }
    quantization = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "transformer": diffusers.BitsAndBytesConfig(**four_bits),
            "text_encoder": transformers.BitsAndBytesConfig(**four_bits),
        }
    )
    pipe = diffusers.QwenImageEditPipeline.from_pretrained(
        folder, quantization_config=quantization, **options
    )
    pipe.vae.to(card)
    pipe.vae.enable_tiling(512, 512, 448, 448)  # a quarter of its working memory
    return pipe


def group_offload(folder: Path, card: str, options: dict):
    """Every layer comes from the host when it is used."""
    import torch
    from diffusers import QwenImageEditPipeline
    from diffusers.hooks import apply_group_offloading

    pipe = QwenImageEditPipeline.from_pretrained(folder, **options)
    where = {"onload_device": torch.device(card), "offload_type": "leaf_level"}
    # With a stream the next layer is copied while this one computes, from page-locked memory: not
    # worth it for the text encoder, which runs once or twice a picture.
    pipe.transformer.enable_group_offload(**where, use_stream=True)
    apply_group_offloading(pipe.text_encoder, **where)
    pipe.vae.to(card)
    return pipe


def load(recipe: str, folder: Path, device: str, dtype, cards=("cuda:0", "cuda:1")):
    """The pipeline, its weights where recipes.RECIPES says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    # from_pretrained would refuse a processor class that is not transformers'.
    options = {"dtype": dtype, "tokenizer": tokenizer, "processor": None}
    if recipe == "plain":
        pipe = plain(folder, device, options)
    elif recipe == "fp8":
        pipe = fp8(folder, cards, options)
    elif recipe == "nf4":
        pipe = nf4(folder, cards[0], options)
    else:
        pipe = group_offload(folder, cards[0], options)
    pipe.processor = PilProcessor(folder / "processor", tokenizer)
    return pipe


def main() -> None:
    profile = load_profile()
    values = profile.image_edit
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What is edited, and how
    parser.add_argument(
        "--image", type=Path, help="picture to edit (default: a red circle and a blue square)"
    )
    parser.add_argument(
        "--prompt", default="make the circle green", help="what to change (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=values.size,
        help="the output has about SIZE x SIZE pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=values.steps,
        help="denoising steps, at least 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--true-cfg-scale",
        type=float,
        default=values.true_cfg_scale,
        help="above 1, the transformer runs twice in each step (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first noise (default: %(default)s)"
    )
    # The model, and what of it lies where
    parser.add_argument(
        "--model",
        default=values.model,
        help="name in configs/models.yaml, hub id or folder (default: %(default)s)",
    )
    parser.add_argument(
        "--recipe",
        default=values.recipe,
        help="plain, fp8, nf4 or group-offload (default: %(default)s)",
    )
    # What is written
    parser.add_argument(
        "--output", type=Path, default=RUNS / "02_qwen_image_edit", help="folder for the pictures"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    inputs.check(args, profile)
    jobs.refuse_taken_cards()
    picture = pictures.given(args.image, args.size)
    inputs.output_folder(args.output)

    # -----------------------------------------------------------------------------
    # 3. The model's folder, and whether the recipe fits

    folder = inputs.model_folder(args.model)
    tensors = recipes.tensors_of(folder)
    need = inputs.what_it_needs(args.recipe, tensors, args.size, profile.device)
    needs = ", ".join(f"{gib:.1f} GiB on {place}" for place, gib in sorted(need.items()))
    print(f"{shown(folder)}, recipe {args.recipe}: needs about {needs}")

    # -----------------------------------------------------------------------------
    # 4. Load, edit, save

    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of a processor that is not torchvision's
    cards = range(torch.cuda.device_count() if profile.device == "cuda" else 0)
    began = time.perf_counter()
    try:
        with inputs.a_whole_model(folder):
            pipe = load(args.recipe, folder, profile.device, getattr(torch, values.dtype))
        load_s = time.perf_counter() - began
        weights_gb = recipes.weights_gb(tensors)
        print(
            f"{type(pipe).__name__} of diffusers loaded in {load_s:.1f} s: "
            f"{weights_gb:.3f} GB of bf16 weights in the files"
        )
        output, times = edit(pipe, picture, args, cards)
    except torch.OutOfMemoryError as e:
        fail(
            f"recipe {args.recipe} ran out of GPU memory ({str(e).split('.')[0]}): "
            "take a smaller --size, or another --recipe"
        )
    pair = pictures.side_by_side(picture, output)
    files = [args.output / "output.png", args.output / f"{args.recipe}_side_by_side.png"]
    pictures.save(output, files[0])
    pictures.save(pair, files[1])

    # -----------------------------------------------------------------------------
    # 5. How long it took, and the peaks beside what was expected

    step_ends = times[1:-1]  # the first step warms up, and is not counted
    step_s = statistics.median(end - start for start, end in itertools.pairwise(step_ends))
    total_s = times[-1] - times[0]
    print(
        f"{args.steps} steps at {output.width} x {output.height}: "
        f"{step_s:.2f} s a step, {total_s:.1f} s in all"
    )
    peaks = {f"cuda:{card}": torch.cuda.max_memory_allocated(card) / 2**30 for card in cards}
    peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    beside = [
        f"{gib:.1f} GiB on {place} (about {need.get(place, 0):.1f} expected)"
        for place, gib in peaks.items()
    ]
    print("peak: " + ", ".join(beside))
    print("pictures: " + ", ".join(shown(file) for file in files))
    if (folder / random_model.LABEL).is_file():
        print(
            "the weights are random, so the picture is noise: "
            "what is real is the pipeline, its shapes and its steps"
        )
    metrics = {
        "load_s": round(load_s, 2),
        "step_s": round(step_s, 3),
        "total_s": round(total_s, 2),
        "step_count": args.steps,
        "width_px": output.width,
        "height_px": output.height,
        "weights_gb": round(weights_gb, 3),
    }
    for place, gib in peaks.items():
        metrics[f"{place.replace(':', '')}_peak_gib"] = round(gib, 2)
    paths = {name: shown(value) for name, value in vars(args).items() if isinstance(value, Path)}
    variant = "" if args.recipe == values.recipe else args.recipe
    results.finish(__file__, metrics, vars(args) | paths, variant)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(
            "interrupted: earlier pictures are as they were, nothing else was written",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
