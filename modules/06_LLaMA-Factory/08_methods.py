"""The same task by every method: LoRA and its relatives, QLoRA, freeze, full, packing.

    make lf-methods                                   # all of them, about 45 minutes on a CPU
    make lf-methods ARGS="--methods lora dora"        # only these
    make lf-methods ARGS="--no-score max_steps=10"    # speed and memory only; any setting of 01

Each is trained by 01_train.py with the few settings of configs/methods/NAME.yaml, into a folder of
its own, and scored by 02_score.py.
Look at: what is trained beside what is remembered; which of them pay for a better score with time.
"""

import argparse
import signal
import sys

import factory
import methods
import trials

from lab import fail, jobs, results, shown
from lab.profile import load_profile

COLUMNS = (
    ("trained_count", "trained", "{:,.0f}"),
    ("peak_gib", "peak (GiB)", "{:.2f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("train_s", "train (s)", "{:.0f}"),
    ("tuned_exact_pct", "exact (%)", "{:.1f}"),
    ("tuned_neutral_loss", "neutral loss", "{:.2f}"),
)
ORDER = (
    *("lora", "rslora", "loraplus", "dora", "pissa", "qlora", "freeze", "full"),
    *("packing", "neat_packing", "train_on_prompt"),
)


def main() -> None:
    load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=ORDER,
        metavar="NAME",
        help=f"(default: {' '.join(ORDER)})",
    )
    parser.add_argument("--no-score", action="store_true", help="only train")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings by LLaMA-Factory's own names"
    )
    args = parser.parse_intermixed_args()
    known = {"lora", *methods.names()} - set(methods.BETWEEN_PROCESSES)
    for name in args.methods:
        if name not in known:
            fail(f"there is no method {name} for one process: take of {', '.join(sorted(known))}")
    jobs.refuse_taken_cards()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a training ends with us

    # -----------------------------------------------------------------------------
    # 1. Train and score, one after the other

    rows = {}
    for name in args.methods:
        print(f"{name} ...", flush=True)
        method = "" if name == "lora" else name
        folder = shown(factory.FOLDER / name)
        rows[name] = trials.train_and_score(folder, method, args.overrides, not args.no_score)

    # -----------------------------------------------------------------------------
    # 2. Side by side

    shown_columns = [column for column in COLUMNS if column[0] in next(iter(rows.values()))]
    print(f"\n{'':16}" + "".join(f"{title:>14}" for _, title, _ in shown_columns))
    for name, row in rows.items():
        cells = [form.format(row[key]) for key, _, form in shown_columns]
        print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells))
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
