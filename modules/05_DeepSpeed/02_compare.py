"""One training by every engine, its losses side by side: one process, native DDP, Accelerate, FSDP2, ZeRO-0 to ZeRO-3.

    make train-compare       # after the trainings: it reads their last records in runs/records/ and computes nothing itself

Look at: the last column, the largest relative difference from one process at any step. In float32 it is rounding: the engines add the
same numbers in another order. A training that was not run, or with other settings (model, tokens of a step, learning rate), is named.
"""

import argparse
import json

from lab import fail, results
from lab.profile import load_profile

# record of a training: how a reader makes it
TRAININGS = {
    "04_Accelerate/01_train_ddp-one": "make train-one",
    "04_Accelerate/01_train_ddp": "make train-ddp",
    "04_Accelerate/02_train_accelerate": "make train-accelerate",
    "04_Accelerate/02_train_accelerate-fsdp": "make train-accelerate CONFIG=fsdp",
    "04_Accelerate/02_train_accelerate-deepspeed": "make train-accelerate CONFIG=deepspeed_zero2",
    "05_DeepSpeed/train-z0": "make train-z0",
    "05_DeepSpeed/train-z1": "make train-z1",
    "05_DeepSpeed/train-z2": "make train-z2",
    "05_DeepSpeed/train-z3": "make train-z3",
}
SAME = ("model", "data", "seq_len", "learning_rate", "seed")  # settings that must agree, beside the tokens of a step


def main() -> None:
    load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The records; the first one is the yardstick

    found, yardstick = {}, None
    for name, command in TRAININGS.items():
        file = results.FOLDER / f"{name}.json"
        if not file.is_file():
            if not found:
                fail(f"the yardstick is missing: run '{command}' first")
            print(f"not run: {command}")
            continue
        record = json.loads(file.read_text())
        settings = {key: record["config"][key] for key in SAME} | {"step_tok_count": record["metrics"]["step_tok_count"]}
        yardstick = yardstick or settings
        if differ := [f"{key} {settings[key]}, not {yardstick[key]}" for key in settings if settings[key] != yardstick[key]]:
            print(f"other settings: {command} ({'; '.join(differ)})")
            continue
        found[name] = record["metrics"]
    if len(found) < 2:
        fail("there is nothing to compare yet: run 'make train-ddp' with the same settings")

    # -----------------------------------------------------------------------------
    # 2. Side by side, over the steps that all have

    steps = min(len(metrics["losses"]) for metrics in found.values())
    first = next(iter(found.values()))["losses"]
    print(f"\n{'loss at step':48}{1:>10}{(steps + 1) // 2:>10}{steps:>10}{'largest difference':>22}")
    metrics = {"engine_count": len(found), "compared_step_count": steps}
    for name, training in found.items():
        losses = training["losses"]
        differences = [abs(a - b) / abs(b) for a, b in zip(losses[:steps], first, strict=False)]
        shown = [losses[0], losses[(steps - 1) // 2], losses[steps - 1]]
        print(f"{name:44}x{training['world_size']:<3}" + "".join(f"{loss:10.6f}" for loss in shown) + f"{max(differences):22.1e}")
        metrics[f"{name.split('/')[1].replace('-', '_')}_difference_ratio"] = float(f"{max(differences):.2g}")
    worst = max(value for key, value in metrics.items() if key.endswith("_ratio"))
    print(f"\n{len(found)} engines, {steps} steps: no loss differs by more than {worst:.1e} of itself")
    results.finish(__file__, metrics | {"largest_difference_ratio": worst}, yardstick)


if __name__ == "__main__":
    main()
