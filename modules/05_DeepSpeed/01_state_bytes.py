"""How much memory the states of a training need on every GPU, with and without ZeRO: the formulas, no training.

    python modules/05_DeepSpeed/01_state_bytes.py                       # 7B on 2 GPUs, the well-known 112 GB
    python modules/05_DeepSpeed/01_state_bytes.py --processes 64        # where 4x and 8x come from
    python modules/05_DeepSpeed/01_state_bytes.py --parameters 0.5e9 --card-gb 24

Look at: the columns `saved`. 4x and 8x are limits that many GPUs approach and 2 GPUs do not; in fp32 the limits are 2x and 4x.
States only: activations, the reduce bucket and fragmentation come on top. `make train-z2` measures the same on real tensors.
"""

import argparse
import math

from lab import fail, results
from lab.profile import load_profile

# Bytes per parameter of (parameters, gradients, optimizer states with AdamW). Source: arXiv 1910.02054, section 3.1; its K is the last.
MIXED = {"parameters": 2, "gradients": 2, "optimizer": 12}  # bf16, and an fp32 master copy + two fp32 moments
FP32 = {"parameters": 4, "gradients": 4, "optimizer": 8}  # the parameters are their own master copy
DIVIDED = {0: (), 1: ("optimizer",), 2: ("optimizer", "gradients"), 3: ("optimizer", "gradients", "parameters")}  # at each ZeRO stage


def bytes_per_parameter(stage: int, processes: float, whole: dict[str, int]) -> float:
    """Bytes of states that one process holds for each parameter of the model."""
    return sum(width / processes if kind in DIVIDED[stage] else width for kind, width in whole.items())


def main() -> None:
    load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=7e9, help="of the model (default: %(default)g)")
    parser.add_argument("--processes", type=int, default=2, help="GPUs over which ZeRO divides (default: %(default)s)")
    parser.add_argument("--card-gb", type=float, default=24, help="memory of one GPU (default: %(default)s)")
    args = parser.parse_args()
    if not (math.isfinite(args.parameters) and args.parameters >= 1 and args.processes >= 1 and args.card_gb > 0):
        fail("--parameters and --processes must be at least 1, --card-gb above 0")

    # -----------------------------------------------------------------------------
    # 1. The paper's formulas

    metrics = {}
    for words, short, whole in (("bf16 mixed precision", "mixed", MIXED), ("fp32", "fp32", FP32)):
        print(f"\n{words}: {' + '.join(map(str, whole.values()))} bytes per parameter, {args.parameters:.3g} parameters, {args.processes} processes")
        print(f"  {'':8}{'GB each':>9}{'saved':>8}{'saved at most':>15}   fits {args.card_gb:g} GB")
        for stage in DIVIDED:
            each = bytes_per_parameter(stage, args.processes, whole)
            gb, saved = args.parameters * each / 1e9, bytes_per_parameter(0, 1, whole) / each
            limit = bytes_per_parameter(stage, math.inf, whole)  # with endlessly many processes
            most = f"{bytes_per_parameter(0, 1, whole) / limit:.0f}x" if limit else "no limit: N"
            print(f"  {f'ZeRO-{stage}' if stage else 'DDP':8}{gb:9.1f}{saved:7.2f}x{most:>15}   {'yes' if gb < args.card_gb else 'no'}")
            metrics |= {f"{short}_z{stage}_gb": round(gb, 2), f"{short}_z{stage}_saved_ratio": round(saved, 3)}

    # -----------------------------------------------------------------------------
    # 2. DeepSpeed's own estimator counts 18 bytes that it divides: during the step the gradients exist in fp32 too

    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    for words, offload in (("estimate_stage2", False), ("estimate_stage2_offload", True)):
        host, gpu = estimate_zero2_model_states_mem_needs(int(args.parameters), num_gpus_per_node=args.processes, cpu_offload=offload)
        metrics |= {f"{words}_gpu_gb": round(gpu / 1e9, 2), f"{words}_host_gb": round(host / 1e9, 2)}
        print(f"\nDeepSpeed's estimate, ZeRO-2{', optimizer offloaded' if offload else ''}: {gpu / 1e9:.1f} GB on each GPU, {host / 1e9:.1f} GB of host memory")
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
