"""One training by every engine, its losses side by side: DDP, Accelerate, FSDP2, Trainer, ZeRO.

    make train-compare       # after the trainings: it reads their last records, and trains nothing

Look at: the last column, the largest relative difference from one process at any step. In float32
it is rounding: the engines add the same numbers in another order. A training that was not run, or
with other settings (model, tokens of a step, learning rate), is named.
"""

import argparse
import json

from lab import fail, results
from lab.profile import load_profile
from lab.table import table

# record of a training: how a reader makes it
TRAININGS = {
    "04_Accelerate/01_train_ddp-one": "make train-one",
    "04_Accelerate/01_train_ddp": "make train-ddp",
    "04_Accelerate/02_train_accelerate": "make train-accelerate",
    "04_Accelerate/02_train_accelerate-fsdp": "make train-accelerate CONFIG=fsdp",
    "04_Accelerate/02_train_accelerate-deepspeed": "make train-accelerate CONFIG=deepspeed_zero2",
    "04_Accelerate/06_trainer": "make train-trainer",
    "05_DeepSpeed/train-z0": "make train-z0",
    "05_DeepSpeed/train-z1": "make train-z1",
    "05_DeepSpeed/train-z2": "make train-z2",
    "05_DeepSpeed/train-z3": "make train-z3",
}
# Settings that must agree, beside the tokens of a step.
SAME = ("model", "data", "seq_len", "learning_rate", "seed")


def main() -> None:
    load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The records; the first one is the yardstick

    trainings = {}
    yardstick = None
    for name, command in TRAININGS.items():
        file = results.FOLDER / f"{name}.json"
        if not file.is_file():
            if not trainings:
                fail(f"the yardstick is missing: run '{command}' first")
            print(f"not run: {command}")
            continue
        record = json.loads(file.read_text())
        settings = {key: record["config"].get(key) for key in SAME}
        settings["step_tok_count"] = record["metrics"].get("step_tok_count")
        yardstick = yardstick or settings
        differ = [
            f"{key} {value}, not {yardstick[key]}"
            for key, value in settings.items()
            if value != yardstick[key]
        ]
        if differ:
            print(f"other settings: {command} ({'; '.join(differ)})")
            continue
        trainings[name] = record["metrics"]
    if len(trainings) < 2:
        fail("there is nothing to compare yet: run 'make train-ddp' with the same settings")

    # -----------------------------------------------------------------------------
    # 2. Side by side, over the steps that all have

    steps = min(len(training["losses"]) for training in trainings.values())
    first = next(iter(trainings.values()))["losses"]
    shown = (1, (steps + 1) // 2, steps)
    rows = []
    metrics = {"engine_count": len(trainings), "compared_step_count": steps}
    worst = 0.0
    for name, training in trainings.items():
        losses = training["losses"]
        pairs = zip(losses[:steps], first, strict=False)
        difference = max(abs(loss - other) / abs(other) for loss, other in pairs)
        worst = max(worst, float(f"{difference:.2g}"))
        at = [f"{losses[step - 1]:.6f}" for step in shown]
        rows.append([name, f"x{training['world_size']}", *at, f"{difference:.1e}"])
        key = name.split("/")[1].replace("-", "_")
        metrics[f"{key}_difference_ratio"] = float(f"{difference:.2g}")
    print()
    table(["loss at step", "", *map(str, shown), "largest difference"], rows, indent=0)
    print(
        f"\n{len(trainings)} engines, {steps} steps: no loss differs by more than {worst:.1e} of "
        "itself"
    )
    results.finish(__file__, metrics | {"largest_difference_ratio": worst}, yardstick)


if __name__ == "__main__":
    main()
