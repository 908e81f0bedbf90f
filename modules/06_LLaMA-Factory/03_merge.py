"""Merge the adapter into the model: a plain Hugging Face folder that every engine can load.

    make lf-merge
    make lf-merge ARGS="--adapter runs/06_LLaMA-Factory/lora_z2"
    make vllm-serve MODEL=runs/06_LLaMA-Factory/merged

LoRA leaves each weight W as it is and learns two thin matrices: W + (alpha / rank) B A. Merging
multiplies them out once, after which the model is as fast as before and needs neither PEFT nor
LLaMA-Factory. The tokenizer with its chat template is stored too; of a thinking model that was
trained without thoughts, the printed command tells the server not to ask for any.
Look at: the printed command, the size of the adapter beside that of the model.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import factory

from lab import ROOT, fail, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def size_gb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


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
    args = parser.parse_args()

    from omegaconf import OmegaConf

    # -----------------------------------------------------------------------------
    # 1. Model, template and system message as in the training; then LLaMA-Factory's own command

    if not factory.trained(args.adapter).is_adapter:
        fail(f"{args.adapter} is a whole model: make vllm-serve MODEL={args.adapter} serves it")
    source = HERE / "configs" / "merge.yaml"
    settings = factory.settings_for(source, args.adapter, profile.finetune.dtype)
    settings.export_dir = args.output
    comment = f"merge.yaml and {settings.adapter_name_or_path}/config.yaml"
    config = factory.write(settings, "merge", comment)
    command = factory.prepare({}, "export", shown(config))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the merging ends with us
    began = time.monotonic()
    factory.run("merge", command)
    wall_s = time.monotonic() - began

    # -----------------------------------------------------------------------------
    # 2. What is there now

    merged = ROOT / settings.export_dir
    # Its chat template is the base model's, which knows nothing of the switch of thinking.
    of_texts = {name: settings[name] for name in factory.OF_TEMPLATE if name in settings}
    (merged / "config.yaml").write_text(OmegaConf.to_yaml(of_texts), encoding="utf-8")
    merged_gb = size_gb(merged)
    adapter_gb = size_gb(ROOT / settings.adapter_name_or_path)
    print(
        f"{shown(merged)}: {merged_gb:.3f} GB in {settings.infer_dtype}; "
        f"the adapter alone: {adapter_gb:.3f} GB"
    )
    switches = factory.template_switches(settings)
    asked = ' ARGS="--default-chat-template-kwargs.enable_thinking=false"' if switches else ""
    print(f"serve it: make vllm-serve MODEL={shown(merged)}{asked}")
    metrics = {
        "merged_gb": round(merged_gb, 3),
        "adapter_gb": round(adapter_gb, 3),
        "wall_s": round(wall_s, 1),
    }
    results.finish(__file__, metrics, {"adapter": args.adapter, "dtype": settings.infer_dtype})


if __name__ == "__main__":
    main()
