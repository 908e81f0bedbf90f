"""Measure this machine's records and write the tables of the readmes: `make evidence`.

    make evidence                               # everything, about 50 minutes on 2 cores
    make evidence ARGS="--only train-z2 train-z3"

Records are stored under results/<machine>/. Each is measured by a make target that a reader can
type too. Commit what changes first, so that the records name a commit that holds it, and results/
afterwards: it is what the numbers in the readmes stand on. OTHER_VERSIONS=1 measures packages that
differ from the lock.
"""

import argparse
import os
import shlex
import subprocess
import sys

from lab import ROOT, fail, machine, results
from lab.profile import detect

TARGETS = [
    # 01 and 02
    *("doctor", "smoke", "roofline", "memory", "gauges", "plan-examples"),
    *("image-edit", "image-fits"),
    # 03; the server stands between its start and `stop`
    *("vllm-throughput", 'vllm-throughput ARGS="--batch-size 8 16 32 --compile"'),
    *("paging", "prefix-caching", "batch-one", "speculative", "vllm-tp"),
    *("vllm-serve", "vllm-chat", "watch", "vllm-load", "vllm-bench", "stop"),
    *('mini-vllm ARGS="--requests 256 --repeat 3"', "mini-tp"),
    *("two-nodes", 'two-nodes ARGS="--parallel tp"'),  # about 7 minutes on 2 cores
    # 04 and 05
    *("train-one", "train-ddp", "train-accelerate"),
    *("train-accelerate CONFIG=fsdp", "train-accelerate CONFIG=deepspeed_zero2", "train-mixed"),
    *("mini-accelerate", "real-loop", 'real-loop ARGS="--profile --steps 4"', "train-trainer"),
    *("loss-weights", "accelerate-overhead", "step-speed", "sixteen-bits", "train-faults"),
    *("train-z0", "train-z1", "train-z2", "train-z3", "train-z2-offload"),
    *("train-z3-offload", "train-z3-nvme", 'train-z3 ARGS="--lora-rank 8 --checkpointing"'),
    *("zero-buckets", "which-way"),
    *("train-compare", "zero-theory", 'mini-zero ARGS="--accumulate 2"'),
    *("mini-parallel", "mini-parallel PROCESSES=4"),  # the second needs four devices, or a CPU
    *("train-costs", "train-compressed"),
    "train-two-machines",  # about 10 minutes on 2 cores
    'train-two-machines ARGS="--launchers torchrun --cut 2"',
    # 06; the adapter that lf-score trains is scored at once
    *("lf-check-data", "mini-lora", "mini-dpo", "lf-half", "mini-grpo", "lf-grpo"),
    'mini-grpo REWARDS=long BETA=0 ARGS="--steps 6 --learning-rate 1e-3"',
    *("lf-score ARGS=--train", "lf-evaluate", "lf-train-z2", "lf-merge"),
    'lf-export SCORE=1 ARGS="--types F16 Q8_0 Q4_0 Q4_1"',
    "lf-quantise SCORE=1",
    *("lf-methods", "lf-sweep"),  # about two hours on 2 cores
    "lf-loop",  # with the adapter that lf-score has trained
]


def possible() -> list[str]:
    """The targets of this machine: two machines compute on CPUs only, four processes fit there."""
    if (os.environ.get("PROFILE") or detect()) == "cpu":
        return TARGETS
    on_cpus = ("two-nodes", "train-two-machines", "mini-parallel PROCESSES=4")
    return [target for target in TARGETS if not target.startswith(on_cpus)]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--only", nargs="+", metavar="TARGET", help="only these make targets, then the tables"
    )
    args = parser.parse_args()
    os.environ["STORE"] = "1"
    if why := results.obstacle():
        fail(why)
    if machine.commit().endswith("-dirty"):
        note = "note: code or settings differ from the commit; the records will say so"
        print(note, file=sys.stderr)
    for target in [*(args.only or possible()), "tables"]:
        print(f"== make {target}", flush=True)
        command = ["make", "--no-print-directory", *shlex.split(target)]
        if subprocess.run(command, cwd=ROOT).returncode:
            fail(
                f"make {target} failed (see above); what was measured before it is stored, "
                "a server may still run: make stop"
            )


if __name__ == "__main__":
    main()
