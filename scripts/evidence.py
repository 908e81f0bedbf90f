"""Measure this machine's records, store them under results/<machine>/ and write the tables: `make
evidence`.

    make evidence                               # everything, about 50 minutes on 2 cores
    make evidence ARGS="--only train-z2 train-z3"

Each is a make target that a reader can type too. Commit what changes first, so that the records
name a commit that holds it, and results/ afterwards: it is what the numbers in the readmes stand
on. OTHER_VERSIONS=1 measures packages that differ from the lock.
"""

import argparse
import os
import shlex
import subprocess
import sys

from lab import ROOT, fail, machine, results
from lab.profile import detect

# The server stands between its start and `stop`; the adapter that lf-score trains is scored at
# once.
TARGETS = [
    "doctor",
    "smoke",
    "roofline",
    "memory",
    "gauges",
    "plan-examples",
    "image-edit",
    "image-fits",
]
TARGETS += [
    "vllm-throughput",
    'vllm-throughput ARGS="--batch-size 8 16 32 --compile"',
    "paging",
    "prefix-caching",
    "batch-one",
    "speculative",
    "vllm-tp",
]
TARGETS += ["vllm-serve", "vllm-chat", "watch", "vllm-load", "vllm-bench", "stop"]
TARGETS += [
    'mini-vllm ARGS="--requests 256 --repeat 3"',
    "mini-tp",
    "two-nodes",
    'two-nodes ARGS="--parallel tp"',
]  # about 7 minutes on 2 cores
TARGETS += [
    "train-one",
    "train-ddp",
    "train-accelerate",
    "train-accelerate CONFIG=fsdp",
    "train-accelerate CONFIG=deepspeed_zero2",
    "train-mixed",
]
TARGETS += [
    "train-z0",
    "train-z1",
    "train-z2",
    "train-z3",
    "train-z2-offload",
    "train-compare",
    "zero-theory",
]
TARGETS += ["lf-score ARGS=--train", "lf-train-z2", "lf-merge", "tables"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TARGET", help="only these make targets, then the tables"
    )
    args = parser.parse_args()
    os.environ["STORE"] = "1"
    if why := results.obstacle():
        fail(why)
    if machine.commit().endswith("-dirty"):
        print(
            "note: code or settings differ from the commit; the records will say so",
            file=sys.stderr,
        )
    here = [
        t
        for t in TARGETS
        if not t.startswith("two-nodes") or (os.environ.get("PROFILE") or detect()) == "cpu"
    ]  # it computes on CPUs
    for target in [*args.only, "tables"] if args.only else here:
        print(f"== make {target}", flush=True)
        if subprocess.run(
            ["make", "--no-print-directory", *shlex.split(target)], cwd=ROOT
        ).returncode:
            fail(
                f"make {target} failed (see above); what was measured before it is stored, a server may still run: make stop"
            )


if __name__ == "__main__":
    main()
