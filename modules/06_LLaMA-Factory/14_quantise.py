"""A merged model in fewer bits, for vLLM: FP8, and 4 bits by GPTQ with our own rows.

    make lf-quantise                                  # after make lf-merge
    make lf-quantise SCORE=1                          # then score each, and let vLLM serve it
    make lf-quantise ARGS="--types w4a16 --rows 16"

fp8 rounds each weight to an 8-bit float; one scale for a row of the matrix. The activations are
rounded too while the model answers. w4a16 leaves 16 steps to a weight and one scale to a group of
neighbours. w4a16-rtn takes the nearest step; w4a16 is GPTQ: it rounds column after column, and the
columns that are still to come make good what each has spoilt, judged by what goes through the
layer when it reads our rows (gptq.py is the same from scratch). Embeddings and the output layer
keep their bits. llm-compressor does it, the library of vLLM's makers; vLLM reads the folders.
Look at: the error of a layer in GPTQ's log, the size of each folder.
"""

import argparse
import logging
import os
import shutil
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # LLaMA-Factory's, of transformers: rows only
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import factory
import scoring

from lab import ROOT, fail, jobs, shown
from lab.profile import load_profile
from lab.table import table

FOLDER = factory.FOLDER / "quantised"
TYPES = ("fp8", "w4a16", "w4a16-rtn")


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    merged = shown(factory.FOLDER / "merged")
    whole = "folder of a whole model (default: %(default)s)"
    parser.add_argument("--model", default=merged, help=whole)
    kinds = f"of {', '.join(TYPES)} (default: all)"
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help=kinds)
    own = profile.finetune.args.get("dataset", "launch_zh_train")
    parser.add_argument("--data", default=own, help="rows that GPTQ reads (default: %(default)s)")
    count = "so many of them (default: %(default)s)"
    parser.add_argument("--rows", type=int, default=64, metavar="N", help=count)
    to = "folder that gets one for each type (default: %(default)s)"
    parser.add_argument("--output", default=shown(FOLDER), help=to)
    args = parser.parse_args()
    jobs.refuse_taken_cards()
    folder = ROOT / args.model
    if not (folder / "config.json").is_file():
        fail(f"there is no model in {args.model}: run 'make lf-merge' first, or name a folder")
    if args.rows < 1:
        fail("--rows must be at least 1")
    try:
        from llmcompressor import oneshot
    except ModuleNotFoundError:
        fail("llm-compressor stands beside the environment: run this by 'make lf-quantise'")

    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. What GPTQ reads: our rows, in the model's own template, answers included

    logging.getLogger("llamafactory").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = scoring.converted_rows(args.data, None, args.rows)
    questions = scoring.questions(rows, tokenizer, factory.trained(args.model).switches)
    encode = partial(tokenizer, add_special_tokens=False)  # the template has put them in
    texts = [dict(encode(question.prompt + question.target)) for question in questions]
    calibration = Dataset.from_list(texts)
    longest = max(len(text["input_ids"]) for text in texts)
    print(f"{len(texts)} rows of {args.data}, up to {longest} tokens", flush=True)

    # -----------------------------------------------------------------------------
    # 2. Each type: load, round, write

    dtype = getattr(torch, profile.finetune.dtype)
    lines = [("original", f"{factory.size_gb(folder):.3f}", None, None)]
    for kind in args.types:
        began = time.monotonic()
        print(f"{kind}: rounding", flush=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        widths = {m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)}
        fitting = [size for size in (128, 64, 32) if all(width % size == 0 for width in widths)]
        if not fitting:
            fail(f"no group of 32 or more weights divides the rows of this model: {sorted(widths)}")
        weights = QuantizationArgs(num_bits=4, strategy="group", group_size=fitting[0])
        four_bits = {"linear": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = {
            "fp8": partial(QuantizationModifier, targets=["Linear"], scheme="FP8_DYNAMIC"),
            "w4a16": partial(GPTQModifier, config_groups=four_bits),
            "w4a16-rtn": partial(QuantizationModifier, config_groups=four_bits),
        }[kind]
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=recipe(ignore=["lm_head"]),
            dataset=calibration if kind == "w4a16" else None,
            num_calibration_samples=len(texts),
            max_seq_length=longest,
        )
        write(model, tokenizer, folder, ROOT / args.output / kind)
        size = f"{factory.size_gb(ROOT / args.output / kind):.3f}"
        seconds = f"{time.monotonic() - began:.0f}"
        lines.append((kind, size, seconds, peak_gib()))

    # -----------------------------------------------------------------------------
    # 3. How large

    table(["type", "GB", "seconds", "peak GiB of the GPU"], lines)
    print(f"serve one: make vllm-serve MODEL={args.output}/{args.types[0]}")


def peak_gib() -> str | None:
    """GiB of the GPU at most since it was last asked: one layer after the other is on it."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return f"{peak:.2f}"


def write(model, tokenizer, source: Path, output: Path) -> None:
    """The folder with model and tokenizer; an earlier one stays until it is whole."""
    partial_output = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial_output, ignore_errors=True)
    model.save_pretrained(partial_output)
    tokenizer.save_pretrained(partial_output)
    if (source / "config.yaml").is_file():  # says whether it was trained without thoughts
        shutil.copy(source / "config.yaml", partial_output)
    shutil.rmtree(output, ignore_errors=True)
    partial_output.rename(output)


if __name__ == "__main__":
    main()
