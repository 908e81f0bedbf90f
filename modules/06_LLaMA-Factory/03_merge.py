"""Merge the adapter into the model: a plain Hugging Face folder that every engine can load.

    make lf-merge
    make lf-merge ARGS="--adapter runs/06_LLaMA-Factory/qlora"    # into W as that training saw it
    make lf-merge ARGS="--adapter runs/06_LLaMA-Factory/qlora --into original"
    make vllm-serve MODEL=runs/06_LLaMA-Factory/merged

LoRA leaves each weight W as it is and learns two thin matrices: W + (alpha / rank) B A. Merging
multiplies them out once, after which the model is as fast as before and needs neither PEFT nor
LLaMA-Factory. W is what the training saw: QLoRA's is rounded to 4 bits, and so it is rounded here
before (dequantise.py). The tokenizer with its chat template is stored too; of a thinking model that
was trained without thoughts, the printed command tells the server not to ask for any.
Look at: the printed command, the size of the adapter beside that of the model.
"""

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

import dequantise
import factory

from lab import ROOT, fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def output_of(path: str, done: factory.Trained) -> Path:
    """The folder, which is new, empty or an earlier merging's. Exit code 2 where it is not."""
    from omegaconf import OmegaConf

    output = ROOT / path
    if output.resolve() in {used.resolve() for used in (done.folder, done.base) if used}:
        fail(f"--output {path} is the adapter's folder or its base model: name another folder")
    if output.is_file():
        fail(f"--output {path} is a file: name a folder")
    file = output / "config.yaml"
    merged_before = file.is_file() and set(OmegaConf.load(file)) <= set(factory.OF_TEMPLATE)
    if output.is_dir() and any(output.iterdir()) and not merged_before:
        fail(f"--output {path} holds files of something else: name a new folder")
    return output


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    factory.add_adapter_flag(parser)
    parser.add_argument(
        "--output",
        default=shown(factory.FOLDER / "merged"),
        help="folder of the merged model (default: %(default)s)",
    )
    into = "W of a training on 4 bits: rounded as it was, or the original (default: %(default)s)"
    choices = ("as-trained", "original")
    parser.add_argument("--into", choices=choices, default=choices[0], help=into)
    args = parser.parse_args()

    from omegaconf import OmegaConf

    # -----------------------------------------------------------------------------
    # 1. Model, template and system message as in the training

    done = factory.trained(args.adapter)
    if not done.is_adapter:
        fail(f"{args.adapter} is a whole model: make vllm-serve MODEL={args.adapter} serves it")
    output = output_of(args.output, done)
    partial = output.with_name(f"{output.name}.partial")  # the earlier one stays until the end
    shutil.rmtree(partial, ignore_errors=True)
    source = HERE / "configs" / "merge.yaml"
    settings = factory.settings_for(source, done, profile.finetune.dtype)
    settings.export_dir = shown(partial)
    rounded = output.with_name(f"{output.name}.rounded")  # a base for this merging only
    shutil.rmtree(rounded, ignore_errors=True)
    training = OmegaConf.load(done.folder / "config.yaml")
    comment = f"merge.yaml and {settings.adapter_name_or_path}/config.yaml"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the merging ends with us
    began = time.monotonic()

    # -----------------------------------------------------------------------------
    # 2. W as the training saw it, then LLaMA-Factory's own command

    try:
        if args.into == "as-trained" and dequantise.on_4_bits(training):
            print(
                "trained on 4 bits: W is rounded to them before the merging, because the adapter "
                "has learnt on the rounded W",
                flush=True,
            )
            device = "cpu" if jobs.running() else profile.device  # a server may have filled it
            dequantise.write(done.base, rounded, training, device)
            settings.model_name_or_path = shown(rounded)
        config = factory.write(settings, "merge", comment)
        command = factory.prepare({}, "export", shown(config))
        factory.run("merge", command)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(rounded, ignore_errors=True)
    wall_s = time.monotonic() - began

    # -----------------------------------------------------------------------------
    # 3. What is there now

    # Its chat template is the base model's, which knows nothing of the switch of thinking.
    of_texts = {name: settings[name] for name in factory.OF_TEMPLATE if name in settings}
    (partial / "config.yaml").write_text(OmegaConf.to_yaml(of_texts), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    merged_gb = factory.size_gb(output)
    adapter_gb = factory.size_gb(ROOT / settings.adapter_name_or_path)
    print(
        f"{shown(output)}: {merged_gb:.3f} GB in {settings.infer_dtype}; "
        f"the adapter alone: {adapter_gb:.3f} GB"
    )
    switches = factory.template_switches(settings)
    asked = ' ARGS="--default-chat-template-kwargs.enable_thinking=false"' if switches else ""
    print(f"serve it: make vllm-serve MODEL={shown(output)}{asked}")
    metrics = {
        "merged_gb": round(merged_gb, 3),
        "adapter_gb": round(adapter_gb, 3),
        "wall_s": round(wall_s, 1),
    }
    config = {"adapter": args.adapter, "into": args.into, "dtype": settings.infer_dtype}
    results.finish(__file__, metrics, config)


if __name__ == "__main__":
    main()
