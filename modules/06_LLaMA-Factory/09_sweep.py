"""Rank, learning rate, epochs: one of them changed at a time, and what each does to the score.

    make lf-sweep                                        # 12 trainings, about 50 minutes on a CPU
    make lf-sweep ARGS="--samples 320"                   # longer ones
    make lf-sweep ARGS="--ranks 4 16 --rates 1e-3 4e-3"  # a smaller grid
    make lf-sweep ARGS="--at-once 2"                     # on a CPU: two at a time, a core each

Every training is 01_train.py with two settings changed, every score is 02_score.py's. Each GPU has
a training of its own. What has been measured is kept: the same command goes on after Ctrl+C.
Look at: which of the three changes the score most, and where the training loss is low and the score
is low too.
"""

import argparse
import itertools
import shutil
import signal
import sys

import trials

from lab import fail, jobs, results
from lab.profile import load_profile

ALPHA_OVER_RANK = 2  # kept, as in sft_lora.yaml: else a larger rank also means a smaller update


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.5e-4, 1e-3, 4e-3])
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.5, 1, 2])
    parser.add_argument(
        "--samples",
        type=int,
        default=128,
        help="rows that a training has; with many, every setting gets there (default: %(default)s)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        help="trainings that run at the same time (default: one on each GPU; one on a CPU)",
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    args = parser.parse_args()
    if min(args.samples, args.at_once or 1) < 1:
        fail("--samples and --at-once must be 1 or more")
    jobs.refuse_taken_cards()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a training ends with us

    # -----------------------------------------------------------------------------
    # 1. The grid of ranks and learning rates, then the epochs at the profile's own values

    def name(rank: int, rate: float) -> str:
        return f"rank-{rank}-rate-{rate:g}"

    own = {
        name(rank, rate): [
            f"lora_rank={rank}",
            f"lora_alpha={ALPHA_OVER_RANK * rank}",
            f"learning_rate={rate}",
        ]
        for rank, rate in itertools.product(args.ranks, args.rates)
    }
    own |= {f"epochs-{epochs:g}": [f"num_train_epochs={epochs}"] for epochs in args.epochs}
    for overrides in own.values():
        overrides.append(f"max_samples={args.samples}")
    if args.fresh:
        shutil.rmtree(trials.POINTS, ignore_errors=True)
    settings = dict(profile.finetune.args) | {"max_samples": args.samples}
    same = {"model": profile.finetune.model, "args": settings}
    spaces = trials.environments(profile.device, args.at_once)
    print(f"{len(own)} trainings, {len(spaces)} at a time", flush=True)
    came = trials.run_all(own, same, spaces)
    grid = {pair: came[name(*pair)] for pair in itertools.product(args.ranks, args.rates)}
    lengths = {epochs: came[f"epochs-{epochs:g}"] for epochs in args.epochs}

    # -----------------------------------------------------------------------------
    # 2. A table, a picture, a record

    print(f"\n{'exact match (%)':18}" + "".join(f"{rate:>10g}" for rate in args.rates))
    for rank in args.ranks:
        cells = [grid[rank, rate]["tuned_exact_pct"] for rate in args.rates]
        print(f"{f'rank {rank}':18}" + "".join(f"{cell:>10.1f}" for cell in cells))
    for epochs, row in lengths.items():
        print(f"{epochs:g} epochs: {row['tuned_exact_pct']:.1f} %, {row['step_count']} steps")
    draw(grid, lengths, args)
    metrics = {}
    for (rank, rate), row in grid.items():
        metrics[f"rank_{rank}_rate_{rate:g}_exact_pct"] = row["tuned_exact_pct"]
    for epochs, row in lengths.items():
        metrics[f"epochs_{epochs:g}_exact_pct"] = row["tuned_exact_pct"]
    results.finish(__file__, metrics, vars(args) | same)


def draw(grid: dict, lengths: dict, args) -> None:
    """The grid as colours, and the epochs as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1.3, 1))
    scores = [[grid[rank, rate]["tuned_exact_pct"] for rate in args.rates] for rank in args.ranks]
    left.imshow(scores, vmin=0, vmax=100, cmap="YlGn", aspect="auto")
    for row, values in enumerate(scores):
        for column, value in enumerate(values):
            colour = "white" if value > 60 else "black"
            left.text(column, row, f"{value:.0f} %", ha="center", va="center", color=colour)
    left.set_xticks(range(len(args.rates)), [f"{rate:g}" for rate in args.rates])
    left.set_yticks(range(len(args.ranks)), [str(rank) for rank in args.ranks])
    left.set(xlabel="learning rate", ylabel="LoRA rank", title="exact match, held-out")
    steps = [row["step_count"] for row in lengths.values()]
    right.plot(steps, [row["tuned_exact_pct"] for row in lengths.values()], marker="o")
    right.set(xlabel="steps", ylabel="exact match (%)", ylim=(0, 105), title="length of training")
    right.grid(alpha=0.3)
    figure.tight_layout()
    results.picture(__file__, "sweep", figure)


if __name__ == "__main__":
    main()
