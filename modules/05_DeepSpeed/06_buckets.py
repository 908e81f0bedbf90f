"""What DeepSpeed's sizes cost: one training after another, each with one key of the file changed.

    make zero-buckets                                            # all cases, a launch each
    make zero-buckets ARGS="--cases z2 z2-reduce-5e8 --steps 5"  # two of them
    PROFILE=4090x2 make zero-buckets

Look at: the peak and the seconds of a step beside the first case of the same stage; the losses,
which no size changes. The peak is that of the device: on a CPU of the process, where a buffer
counts as far as it has been written to, so that a large empty bucket costs nothing there. What each
key does, by DeepSpeed's source, stands in offload.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lab import ROOT, RUNS, fail, results, training
from lab.profile import load_profile, need_cards
from lab.table import table

HERE = Path(__file__).parent


class Case(NamedTuple):
    """A stage, and what differs from its file: keys of zero_optimization, flags of train.py."""

    stage: int
    keys: dict = {}
    flags: tuple[str, ...] = ()


CASES = {
    "z2": Case(2),  # reduce_bucket_size 1e8, overlap_comm: configs/z2.json
    "z2-reduce-5e8": Case(2, {"reduce_bucket_size": 5e8}),
    "z2-no-overlap": Case(2, {"overlap_comm": False}),
    "z2-gather-1e8": Case(2, {"allgather_bucket_size": 1e8}),
    "z2-checkpointing": Case(2, {}, ("--checkpointing",)),
    "z3": Case(3),  # configs/z3.json; the keys below at their defaults but for persistence
    "z3-reduce-5e8": Case(3, {"reduce_bucket_size": 5e8}),
    "z3-prefetch-0": Case(3, {"stage3_prefetch_bucket_size": 0}),
    "z3-persist-1e6": Case(3, {"stage3_param_persistence_threshold": 1e6}),
    "z3-live-1e7": Case(3, {"stage3_max_live_parameters": 1e7}),
    "z3-reuse-0": Case(3, {"stage3_max_reuse_distance": 0}),
    "z3-live-reuse-0": Case(3, {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}),
    "z3-checkpointing": Case(3, {}, ("--checkpointing",)),
}


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    which = "cases to run (default: all)"
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help=which)
    processes = "processes, on a card each (default: %(default)s)"
    parser.add_argument("--processes", type=int, default=2, help=processes)
    training.add_data_flags(parser, profile.train)
    training.add_step_flags(parser, profile.train, saves=False)
    on_cpu = {"seq_len": 64, "micro_batch": 1} if profile.device == "cpu" else {}
    parser.set_defaults(model=profile.zero.model, steps=4, **on_cpu)
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)
    need_cards("zero-buckets", args.processes)

    # -----------------------------------------------------------------------------
    # 1. A launch for each case, stage after stage

    folder = RUNS / "05_DeepSpeed/buckets"
    folder.mkdir(parents=True, exist_ok=True)
    ended = 0
    measured_any = False
    for stage in (2, 3):
        measured = {}
        for name in args.cases:
            if CASES[name].stage != stage or ended:
                continue
            try:
                measured[name] = trained(name, folder, args)
            except subprocess.CalledProcessError as e:
                if e.returncode in (2, 130, 143):  # refused, Ctrl+C, make stop: the others count
                    ended = e.returncode
                print(f"== {name} ended with exit code {e.returncode}, see above: left out")
            except KeyboardInterrupt:
                ended = 130
        if measured:
            measured_any = True
            show(stage, measured, args)
    if not measured_any and not ended:
        fail("no case came to its end (see above): lower --micro-batch or --seq-len")
    raise SystemExit(ended)


def trained(name: str, folder: Path, args) -> dict:
    """What train.py says at its end, with the file of this case."""
    case = CASES[name]
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings(case), indent=2))
    command = [sys.executable, "-m", "lab.launch", f"buckets-{name}", "deepspeed"]
    command += ["--num_gpus", str(args.processes), str(HERE / "train.py")]
    command += ["--deepspeed", str(file), *case.flags, *training.flags_of(args)]
    print(f"== {name}: {json.dumps(case.keys)[1:-1]} {' '.join(case.flags)}", flush=True)
    # Their records are none of a reader's own trainings, and no evidence.
    environment = os.environ | {"STORE": "", "RECORDS": str(folder / "records")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(stage: int, measured: dict[str, dict], args) -> None:
    """The cases of a stage beside its first, and their record."""
    rows = []
    metrics = {"world_size": args.processes}
    first = next(iter(measured.values()))
    for name, result in measured.items():
        peak = result["peak_memory_gib"]
        step_s = result["step_tok_count"] / result["throughput_tok_per_s"]
        more = f"{peak - first['peak_memory_gib']:+.2f}"
        pairs = zip(result["losses"], first["losses"], strict=True)
        differs = max(abs(loss - other) / other for loss, other in pairs)
        rows.append([name, f"{peak:.2f}", more, f"{step_s:.2f}", f"{differs:.1e}"])
        key = name.replace("-", "_")
        metrics[f"{key}_peak_gib"] = peak
        metrics[f"{key}_step_s"] = round(step_s, 3)
        metrics[f"{key}_difference_ratio"] = float(f"{differs:.2g}")
    print()
    table(["", "peak, GiB", "more than the first", "s a step", "losses differ by"], rows)
    results.finish(__file__, metrics, vars(args), f"z{stage}")


def settings(case: Case) -> dict:
    """DeepSpeed's configuration of this case."""
    whole = json.loads((HERE / f"configs/z{case.stage}.json").read_text())
    whole["zero_optimization"] |= case.keys
    return whole


if __name__ == "__main__":
    main()
