"""How much memory the states of a training need on every GPU, with and without ZeRO: no training.

    python modules/05_DeepSpeed/01_state_bytes.py                  # 7B on 2 GPUs: the 112 GB
    python modules/05_DeepSpeed/01_state_bytes.py --processes 64   # where 4x and 8x come from
    python modules/05_DeepSpeed/01_state_bytes.py --parameters 0.5e9 --card-gb 24

Look at: the columns `saved`. 4x and 8x are limits that many GPUs approach and 2 GPUs do not; in
fp32 the limits are 2x and 4x. States only: activations, the reduce bucket and fragmentation come on
top. The formulas stand in zero_states.py; `make train-z2` measures the same on real tensors.
"""

import argparse
import math

from zero_states import DIVIDED, FP32, MIXED, of_paper

from lab import fail, results
from lab.profile import load_profile
from lab.table import table


def main() -> None:
    load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parameters = "how many parameters the model has (default: %(default)g)"
    parser.add_argument("--parameters", type=float, default=7e9, help=parameters)
    processes = "over how many GPUs ZeRO divides (default: %(default)s)"
    parser.add_argument("--processes", type=int, default=2, help=processes)
    card = "memory of one GPU in GB (default: %(default)s)"
    parser.add_argument("--card-gb", type=float, default=24, help=card)
    args = parser.parse_args()
    possible = math.isfinite(args.parameters) and min(args.parameters, args.processes) >= 1
    if not (possible and args.card_gb > 0):
        fail("--parameters and --processes must be at least 1, --card-gb above 0")

    # -----------------------------------------------------------------------------
    # 1. The paper's formulas

    metrics = {}
    for title, short, whole in (("bf16 mixed precision", "mixed", MIXED), ("fp32", "fp32", FP32)):
        print(
            f"\n{title}: {' + '.join(map(str, whole.values()))} bytes per parameter, "
            f"{args.parameters:.3g} parameters, {args.processes} processes"
        )
        undivided = sum(whole.values())
        rows = []
        for stage in DIVIDED:
            each = sum(of_paper(stage, args.processes, whole).values())
            limit = sum(of_paper(stage, math.inf, whole).values())  # with endlessly many processes
            gb = args.parameters * each / 1e9
            most = f"{undivided / limit:.0f}x" if limit else "no limit: N"
            name = f"ZeRO-{stage}" if stage else "DDP"
            fits = "yes" if gb < args.card_gb else "no"
            rows.append([name, f"{gb:.1f}", f"{undivided / each:.2f}x", most, fits])
            metrics[f"{short}_z{stage}_gb"] = round(gb, 2)
            metrics[f"{short}_z{stage}_saved_ratio"] = round(undivided / each, 3)
        table(["", "GB each", "saved", "saved at most", f"fits {args.card_gb:g} GB"], rows)

    # -----------------------------------------------------------------------------
    # 2. DeepSpeed's own estimator counts 18 bytes that it divides: during the step the gradients
    # exist in fp32 too

    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    for offload in (False, True):
        host, gpu = estimate_zero2_model_states_mem_needs(
            int(args.parameters), num_gpus_per_node=args.processes, cpu_offload=offload
        )
        name = "estimate_stage2_offload" if offload else "estimate_stage2"
        metrics[f"{name}_gpu_gb"] = round(gpu / 1e9, 2)
        metrics[f"{name}_host_gb"] = round(host / 1e9, 2)
        where = ", optimizer offloaded" if offload else ""
        print(
            f"\nDeepSpeed's estimate, ZeRO-2{where}: {gpu / 1e9:.1f} GB on each GPU, "
            f"{host / 1e9:.1f} GB of host memory"
        )
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
