"""Five questions about two 24 GB cards, answered by arithmetic beside what other estimators say.

Nothing is loaded.

    make plan-examples
    python modules/01_single_gpu_smoke/02_plan_examples.py --gpu-memory-gib 79.2  # on other cards

Look at: the fullest moment, and why it is full: states in one case, logits in the next, the host in
the last. `accelerate estimate-memory` counts weights, gradients and Adam's states of one card;
DeepSpeed's estimators count the states of ZeRO. Neither sees activations, logits, the KV cache or
CUDA graphs. `make plan` asks the same arithmetic about any model.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from lab import ROOT, fail, models, results
from lab.planner.config import read
from lab.planner.constants import CARD_GIB, GIB
from lab.planner.serving import Serving, serve
from lab.planner.training import Training, train
from lab.profile import load_profile


class Example(NamedTuple):
    question: str
    model: str
    setup: Serving | Training  # scripts/plan.py has the same names as flags

    @property
    def trains(self) -> bool:
        return isinstance(self.setup, Training)


SERVED = Serving(gpus=2, tp=2, max_model_len=8192, gpu_memory_utilization=0.85)
EXAMPLES = {
    "7b-fp32-full": Example(
        "7B, all weights trained in fp32, one card",
        "qwen2.5-7b-instruct",
        Training(gpus=1, dtype="float32"),
    ),
    "14b-bf16-tp2": Example("14B served in bf16, TP=2", "qwen2.5-14b-instruct", SERVED),
    "32b-bf16-tp2": Example("32B served in bf16, TP=2", "qwen2.5-32b-instruct", SERVED),
    "32b-int4-tp2": Example(
        "32B served in 4 bits (AWQ), TP=2", "qwen2.5-32b-instruct", replace(SERVED, dtype="int4")
    ),
    "7b-qlora": Example(
        "7B, QLoRA, one card, 2 x 1024 tokens",
        "qwen2.5-7b-instruct",
        Training(gpus=1, method="qlora", micro_batch=2, seq_len=1024, checkpointing=True),
    ),
    "7b-z3-offload": Example(
        "7B, all weights trained, ZeRO-3, all states on the host",
        "qwen2.5-7b-instruct",
        Training(
            gpus=2,
            engine="deepspeed",
            zero=3,
            offload="optimizer+param",
            seq_len=1024,
            checkpointing=True,
        ),
    ),
}


def main() -> None:
    load_profile(check=False)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        default=CARD_GIB,
        help="of one card (default: %(default)s, an RTX 4090)",
    )
    args = parser.parse_args()
    if not args.gpu_memory_gib > 0:
        fail("--gpu-memory-gib must be above 0")

    # -----------------------------------------------------------------------------
    # 1. How long one answer takes on the command line, the start of Python included

    began = time.perf_counter()
    plan_script = ROOT / "scripts" / "plan.py"
    command = [sys.executable, plan_script, "serve", "--model", "qwen2.5-7b-instruct"]
    subprocess.run(command, check=True, capture_output=True)
    metrics = {"answer_s": round(time.perf_counter() - began, 2)}

    # -----------------------------------------------------------------------------
    # 2. The examples

    for name, example in EXAMPLES.items():
        model = read(models.config(example.model), example.model)
        setup = replace(example.setup, gpu_memory_gib=args.gpu_memory_gib)
        plan = train(model, setup) if example.trains else serve(model, setup)

        verdict = "fits" if plan.fits else "DOES NOT FIT"
        moment = f"; fullest at: {plan.moment}" if example.trains else ""
        cards = f"{setup.gpus} x {args.gpu_memory_gib:g} GiB"
        print(f"\n{example.question}: {verdict} {cards}{moment}")

        parts = dict(plan.per_gpu_gib)
        total = parts.pop("total")
        sum_of_parts = " + ".join(
            f"{part.replace('_', ' ')} {gib:.1f}" for part, gib in parts.items()
        )
        print(f"  on a card   {sum_of_parts} = {total:.1f} GiB")

        if example.trains:
            states_gb = round(plan.states_gib["total"] * GIB / 1e9, 1)
            room = f"states {states_gb:.1f} GB"
        else:
            room = f"the cache holds {plan.kv_tokens:,} tokens"
        print(f"  on the host {plan.host_gib:.0f} GiB;  {room}")

        others = estimates(example)
        answers = ", ".join(
            f"{who.removesuffix('_gb').replace('_', ' ')} {gb:.1f} GB" for who, gb in others.items()
        )
        print(f"  others say  {answers}")

        key = name.replace("-", "_")
        metrics[f"{key}_card_gib"] = total
        metrics[f"{key}_host_gib"] = plan.host_gib
        metrics[f"{key}_fits"] = "yes" if plan.fits else "no"
        metrics |= {f"{key}_{who}": round(gb, 1) for who, gb in others.items()}
        if example.trains:
            metrics[f"{key}_states_gb"] = states_gb
        else:
            metrics[f"{key}_kv_tok_count"] = plan.kv_tokens
    results.finish(__file__, metrics, vars(args))


# -----------------------------------------------------------------------------
# What other estimators say, by their own functions


@cache
def sizes(name: str) -> tuple[int, int]:
    """Bytes in fp32 of the whole model and of its largest layer, as accelerate counts them."""
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**models.config(name))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype="float32")
    whole, (largest_layer, _) = calculate_maximum_sizes(model)
    return whole, largest_layer


def estimates(example: Example) -> dict[str, float]:
    """GB on a card by `accelerate estimate-memory` and, for ZeRO, by DeepSpeed's estimators."""
    from accelerate.commands.estimate import estimate_training_usage

    setup = example.setup
    whole, largest_layer = sizes(example.model)
    if not example.trains or not setup.full:  # accelerate divides the bytes of fp32
        in_4_bits = setup.method == "qlora" if example.trains else setup.dtype == "int4"
        return {"accelerate_gb": whole / (8 if in_4_bits else 2) / 1e9}

    usage = estimate_training_usage(whole, setup.dtype)
    estimated = {"accelerate_gb": max(usage.values()) / 1e9}
    if setup.zero == 3:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        host, card, _ = estimate_zero3_model_states_mem_needs(
            whole // 4, largest_layer // 4, setup.gpus, cpu_offload=setup.offloads
        )
        estimated |= {"deepspeed_gb": card / 1e9, "deepspeed_host_gb": host / 1e9}
    return estimated


if __name__ == "__main__":
    main()
