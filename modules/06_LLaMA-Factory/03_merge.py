"""Merge the adapter into the model: a plain Hugging Face folder that every engine can load.

    make lf-merge
    make lf-merge ARGS="--adapter runs/06_LLaMA-Factory/lora_z2"
    make vllm-serve MODEL=runs/06_LLaMA-Factory/merged

LoRA leaves each weight W as it is and learns two thin matrices: W + (alpha / rank) B A. Merging multiplies them out once, after which
the model is as fast as before and needs neither PEFT nor LLaMA-Factory. The tokenizer with its chat template is stored too.
Look at: the printed command, the size of the adapter beside that of the model.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from lab import ROOT, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def size_gb(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=f"runs/{HERE.name}/lora", help="folder that training wrote (default: %(default)s)")
    parser.add_argument("--output", default=f"runs/{HERE.name}/merged", help="folder of the merged model (default: %(default)s)")
    args = parser.parse_args()

    import factory

    # -----------------------------------------------------------------------------
    # 1. The model, the template and the system message that training used; then LLaMA-Factory's own command

    settings = factory.settings_for(HERE / "configs" / "merge.yaml", args.adapter, profile.finetune.dtype)
    settings.export_dir = args.output
    config = factory.write(settings, "merge", f"merge.yaml and {settings.adapter_name_or_path}/config.yaml")
    command = factory.prepare({}, "export", shown(config))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the merging is ended with us
    began = time.monotonic()
    factory.run("merge", command)

    # -----------------------------------------------------------------------------
    # 2. What is there now

    merged, adapter = ROOT / settings.export_dir, ROOT / settings.adapter_name_or_path
    print(f"{shown(merged)}: {size_gb(merged):.3f} GB in {settings.infer_dtype}; the adapter alone: {size_gb(adapter):.3f} GB")
    print(f"serve it: make vllm-serve MODEL={shown(merged)}")
    metrics = {"merged_gb": round(size_gb(merged), 3), "adapter_gb": round(size_gb(adapter), 3), "wall_s": round(time.monotonic() - began, 1)}
    results.finish(__file__, metrics, {"adapter": args.adapter, "dtype": settings.infer_dtype})


if __name__ == "__main__":
    main()
