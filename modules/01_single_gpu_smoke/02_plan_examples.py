"""Five questions about two 24 GB cards, answered by arithmetic, and what other estimators say of
them: nothing is loaded.

    make plan-examples
    python modules/01_single_gpu_smoke/02_plan_examples.py --gpu-memory-gib 79.2      # the same on other cards

Look at: the fullest moment, and why it is full: states in one case, logits in the next, the host in
the last. `accelerate estimate-memory` counts weights, gradients and Adam's states of one card;
DeepSpeed's estimators count the states of ZeRO. Neither sees activations, logits, the KV cache or
CUDA graphs. `make plan` asks the same arithmetic about any model.
"""

import argparse
import subprocess
import sys
import time
from functools import cache

from lab import ROOT, fail, models, results
from lab.planner.config import read
from lab.planner.constants import CARD_GIB, GIB
from lab.planner.serving import Serving, serve
from lab.planner.training import Training, train
from lab.profile import load_profile

# Which model, the planner's task and its options (scripts/plan.py has the same names as flags).
EXAMPLES = {
    "7b-fp32-full": ("7B, all weights trained in fp32, one card", "qwen2.5-7b-instruct", "train", {"gpus": 1, "dtype": "float32"}),
    "14b-bf16-tp2": ("14B served in bf16, TP=2", "qwen2.5-14b-instruct", "serve", {"gpus": 2, "tp": 2, "max_model_len": 8192, "gpu_memory_utilization": 0.85}),
    "32b-bf16-tp2": ("32B served in bf16, TP=2", "qwen2.5-32b-instruct", "serve", {"gpus": 2, "tp": 2, "max_model_len": 8192, "gpu_memory_utilization": 0.85}),
    "32b-int4-tp2": ("32B served in 4 bits (AWQ), TP=2", "qwen2.5-32b-instruct", "serve",
                     {"gpus": 2, "tp": 2, "max_model_len": 8192, "gpu_memory_utilization": 0.85, "dtype": "int4"}),
    "7b-qlora": ("7B, QLoRA, one card, 2 x 1024 tokens", "qwen2.5-7b-instruct", "train",
                 {"gpus": 1, "method": "qlora", "micro_batch": 2, "seq_len": 1024, "checkpointing": True}),
    "7b-z3-offload": ("7B, all weights trained, ZeRO-3, all states on the host", "qwen2.5-7b-instruct", "train",
                      {"gpus": 2, "engine": "deepspeed", "zero": 3, "offload": "optimizer+param", "seq_len": 1024, "checkpointing": True}),
}  # fmt: skip


@cache
def sizes(name: str) -> tuple[int, int]:
    """Bytes of the whole model and of its largest layer in fp32, as accelerate counts them on an
    empty model.
    """
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**models.config(name)), dtype="float32"
        )
    size, (layer, _) = calculate_maximum_sizes(model)
    return size, layer


def others(name: str, task: str, options: dict) -> dict[str, float]:
    """GB on a card by `accelerate estimate-memory` and, for ZeRO, by DeepSpeed's estimators: their
    own functions.
    """
    from accelerate.commands.estimate import estimate_training_usage

    size, layer = sizes(name)
    if task == "serve" or options.get("method"):
        width = {"int4": 8, "nf4": 8}.get(
            options.get("dtype", "nf4" if options.get("method") == "qlora" else ""), 2
        )
        return {"accelerate_gb": size / width / 1e9}
    found = {
        "accelerate_gb": max(
            estimate_training_usage(size, options.get("dtype", "bfloat16")).values()
        )
        / 1e9
    }
    if options.get("zero") == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        host, card, _ = estimate_zero3_model_states_mem_needs(
            size // 4, layer // 4, options["gpus"], cpu_offload=options["offload"] != "none"
        )
        found |= {"deepspeed_gb": card / 1e9, "deepspeed_host_gb": host / 1e9}
    return found


def main() -> None:
    load_profile(check=False)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        default=CARD_GIB,
        help="of one card (default: %(default)s, an RTX 4090)",
    )
    args = parser.parse_args()
    if not args.gpu_memory_gib > 0:
        fail("--gpu-memory-gib must be above 0")

    began = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "scripts/plan.py", "serve", "--model", "qwen2.5-7b-instruct"],
        check=True,
        capture_output=True,
    )
    metrics = {
        "answer_s": round(time.perf_counter() - began, 2)
    }  # of one answer, the start of Python included
    for key, (words, name, task, options) in EXAMPLES.items():
        model = read(models.config(name), name)
        if task == "serve":
            plan = serve(model, Serving(gpu_memory_gib=args.gpu_memory_gib, **options))
        else:
            plan = train(model, Training(gpu_memory_gib=args.gpu_memory_gib, **options))
        parts = plan.per_gpu_gib
        print(
            f"\n{words}: {'fits' if plan.fits else 'DOES NOT FIT'} {options['gpus']} x {args.gpu_memory_gib:g} GiB"
            + (f"; fullest at: {plan.moment}" if task == "train" else "")
        )
        print(
            "  on a card   "
            + " + ".join(
                f"{part.replace('_', ' ')} {gib:.1f}"
                for part, gib in parts.items()
                if part != "total"
            )
            + f" = {parts['total']:.1f} GiB"
        )
        print(
            f"  on the host {plan.host_gib:.0f} GiB"
            + (
                f";  the cache holds {plan.kv_tokens:,} tokens"
                if task == "serve"
                else f";  states {plan.states_gib['total'] * GIB / 1e9:.1f} GB"
            )
        )
        said = others(name, task, options)
        print(
            "  others say  "
            + ", ".join(
                f"{who.removesuffix('_gb').replace('_', ' ')} {gb:.1f} GB"
                for who, gb in said.items()
            )
        )
        short = key.replace("-", "_")
        metrics |= {
            f"{short}_card_gib": parts["total"],
            f"{short}_host_gib": plan.host_gib,
            f"{short}_fits": "yes" if plan.fits else "no",
        }
        metrics |= {f"{short}_{who}": round(gb, 1) for who, gb in said.items()}
        metrics |= (
            {f"{short}_kv_tok_count": plan.kv_tokens}
            if task == "serve"
            else {f"{short}_states_gb": round(plan.states_gib["total"] * GIB / 1e9, 1)}
        )
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
