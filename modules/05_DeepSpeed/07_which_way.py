"""Which way to train a model on these cards: the planner walks them, and takes the first that fits.

    make which-way                                        # a 7B on two cards of 24 GB
    make which-way ARGS="--model qwen2.5-3b-instruct --host-gib 64"
    make which-way ARGS="--model runs/models/mine --gpus 4 --gpu-memory-gib 47 --seq-len 4096"

Look at: the first line marked `this one`, and what stops those above it. Arithmetic only
(lab/planner; how far it is from measurements: modules/01_single_gpu_smoke/planner.md). The order is
that of effort: what comes later sends more, computes more, or trains less. The picture has the same
for six sizes of Qwen2.5.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

from lab import fail, models, results
from lab.planner import config, constants
from lab.planner.training import Training, TrainPlan, train
from lab.profile import load_profile
from lab.table import table

SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b")  # of Qwen2.5, for the picture


class Way(NamedTuple):
    """A way to train, what it changes of the one before, and how this repository runs it."""

    name: str
    options: dict  # fields of Training
    target: str  # of make
    flags: str = ""  # in its ARGS, before model and sizes


DEEPSPEED = {"engine": "deepspeed"}
OFFLOADS = DEEPSPEED | {"offload": "optimizer"}
KEEPS = {"checkpointing": False}  # 04's scripts keep the activations
RECOMPUTES = "--checkpointing "
BOTH = "optimizer+param"
WAYS = (
    Way("one card", KEEPS | {"gpus": 1}, "train-one"),
    Way("DDP", KEEPS, "train-ddp"),
    Way("ZeRO-2", DEEPSPEED | {"zero": 2}, "train-z2", RECOMPUTES),
    Way("ZeRO-3", DEEPSPEED | {"zero": 3}, "train-z3", RECOMPUTES),
    Way("FSDP2", KEEPS | {"engine": "fsdp"}, "train-accelerate CONFIG=fsdp"),
    Way("ZeRO-2 offload", OFFLOADS | {"zero": 2}, "train-z2-offload", RECOMPUTES),
    Way(
        "ZeRO-3 offload, not pinned",
        OFFLOADS | {"zero": 3, "pin_memory": False},
        "train-z3-offload CONFIG=z3-offload-64gb",
    ),
    Way(
        "ZeRO-3 offload, parameters too",
        DEEPSPEED | {"zero": 3, "offload": BOTH},
        "train-z3-offload",
    ),
    Way("LoRA, one card", {"gpus": 1, "method": "lora"}, "lf-train"),
    Way(
        "LoRA, ZeRO-3",
        DEEPSPEED | {"zero": 3, "method": "lora"},
        "train-z3",
        "--lora-rank 16 " + RECOMPUTES,
    ),
    Way("QLoRA, one card", {"gpus": 1, "method": "qlora"}, "lf-train"),
)


def main() -> None:
    load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    name = "name of configs/models.yaml, hub id or folder (default: %(default)s)"
    parser.add_argument("--model", default="qwen2.5-7b-instruct", help=name)
    parser.add_argument("--gpus", type=int, default=2, help="cards (default: %(default)s)")
    card = constants.CARD_GIB
    memory = "GiB of a card as CUDA sees it (default: %(default)s, an RTX 4090)"
    parser.add_argument("--gpu-memory-gib", type=float, default=card, help=memory)
    host = "GiB of the host's memory (default: %(default)s)"
    parser.add_argument("--host-gib", type=float, default=64, help=host)
    length = "tokens of a sequence (default: %(default)s)"
    parser.add_argument("--seq-len", type=int, default=1024, help=length)
    batch = "sequences of a card and micro-step (default: %(default)s)"
    parser.add_argument("--micro-batch", type=int, default=1, help=batch)
    args = parser.parse_args()
    numbers = (args.gpus, args.gpu_memory_gib, args.host_gib, args.seq_len, args.micro_batch)
    if not all(number > 0 for number in numbers):  # NaN is not above 0
        fail("--gpus, --gpu-memory-gib, --host-gib, --seq-len, --micro-batch must be above 0")

    # -----------------------------------------------------------------------------
    # 1. The ways, one after another

    asked = Training(
        gpus=args.gpus,
        gpu_memory_gib=args.gpu_memory_gib,
        host_memory_gib=args.host_gib,
        seq_len=args.seq_len,
        micro_batch=args.micro_batch,
        checkpointing=True,
    )

    ways = [way for way in WAYS if args.gpus > 1 or way.options.get("gpus") == 1]

    def plans(name: str) -> list[TrainPlan]:
        """What each way needs for this model."""
        model = config.read(models.config(name), name)
        return [train(model, replace(asked, **way.options)) for way in ways]

    rows = []
    metrics = {}
    chosen = None
    for way, plan in zip(ways, plans(args.model), strict=True):
        verdict = obstacle(plan, asked) or ("fits" if chosen else "this one")
        if plan.fits and not chosen:
            chosen = way
        on_card = plan.per_gpu_gib["total"]
        rows.append([way.name, f"{on_card:.1f}", f"{plan.host_gib:.1f}", verdict])
        metrics[f"{key(way)}_card_gib"] = round(on_card, 2)
        metrics[f"{key(way)}_host_gib"] = plan.host_gib
    title = f"{args.model} on {args.gpus} x {args.gpu_memory_gib:g} GiB, host {args.host_gib:g} GiB"
    print(f"{title}, {args.micro_batch} x {args.seq_len} tokens a card")
    table(["", "GiB a card", "host", "verdict"], rows)
    if chosen:
        print(f"\nthe first that fits: {chosen.name}: {command(chosen, args)}")
    else:
        print("\nnone of them fits: fewer tokens, a smaller model, more cards or a larger host")

    # -----------------------------------------------------------------------------
    # 2. The picture: the same for six sizes

    sizes = {f"Qwen2.5-{size.upper()}": plans(f"qwen2.5-{size}-instruct") for size in SIZES}
    results.picture(__file__, "which_way", draw(sizes, ways, asked))
    for name, planned in sizes.items():
        first = next((place for place, plan in enumerate(planned) if plan.fits), len(ways))
        metrics[f"{name.lower()}_first_way_count"] = first + 1
    results.finish(__file__, metrics | {"chosen": chosen.name if chosen else ""}, vars(args))


def key(way: Way) -> str:
    """`lora_one_card`, as a metric begins."""
    return way.name.lower().replace(", ", "_").replace(" ", "_").replace("-", "")


def command(way: Way, args) -> str:
    """What to type for it. LLaMA-Factory's settings stand in a file: modules/06, readme."""
    if way.target == "lf-train":
        return "make lf-train"
    sizes = f"--model {args.model} --seq-len {args.seq_len} --micro-batch {args.micro_batch}"
    return f'make {way.target} ARGS="{way.flags}{sizes}"'


def obstacle(plan: TrainPlan, asked: Training) -> str:
    """What does not fit, and the two largest parts of it; "" where all does."""
    parts = {name: gib for name, gib in plan.per_gpu_gib.items() if name != "total"}
    if plan.per_gpu_gib["total"] > asked.gpu_memory_gib:
        return f"card too small: {largest(parts)}"
    if plan.host_gib > asked.host_memory_gib:
        return f"host too small: {largest(plan.host_parts_gib)}"
    return ""


def largest(parts: dict[str, float]) -> str:
    """`optimizer 42.6, weights 14.2`: the two largest parts, in GiB."""
    parts = {name: gib for name, gib in parts.items() if name != "total"}
    names = sorted(parts, key=parts.get, reverse=True)[:2]
    return ", ".join(f"{name.replace('_', ' ')} {parts[name]:.1f}" for name in names)


def draw(sizes: dict[str, list[TrainPlan]], ways: list[Way], asked: Training):
    """The figure: a row for each model, from way to way to the first that fits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(11, 4.6), layout="constrained")
    for row, (name, planned) in enumerate(sizes.items()):
        fitting = [place for place, plan in enumerate(planned) if plan.fits]
        last = fitting[0] if fitting else len(planned)
        ax.text(-0.6, row, name, ha="right", va="center", weight="bold")
        ax.plot([0, min(last, len(planned) - 1)], [row, row], color="0.6", zorder=0)
        for place, plan in enumerate(planned):
            box(ax, place, row, plan, asked, first=place == last, after=place > last)
    ax.set_xticks(range(len(ways)), [way.name.replace(", ", "\n") for way in ways], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.set_xlim(-0.5, len(ways) - 0.5)
    ax.set_ylim(len(sizes) - 0.5, -0.6)
    ax.spines[:].set_visible(False)
    room = f"{asked.gpus} cards of {asked.gpu_memory_gib:g} GiB, {asked.host_memory_gib:g} of host"
    ax.set_xlabel(
        f"{room}; {asked.micro_batch} x {asked.seq_len} tokens a card\n"
        "In a box: GiB a card, and of the host where that is above 20\n"
        "Red: the card is too small. Orange: the host is. Green: the first that fits"
    )
    return fig


def box(ax, place: int, row: int, plan: TrainPlan, asked: Training, first: bool, after: bool):
    """One way for one model: its GiB, coloured by what became of it."""
    why = obstacle(plan, asked)
    colour = "#f4b6b0" if why.startswith("card") else "#fbd49a"
    if not why:
        colour = "#4caf50" if first else "#dff0df"
    text = f"{plan.per_gpu_gib['total']:.1f}"
    if plan.host_gib > 20:
        text += f"\nhost {plan.host_gib:.0f}"
    style = {"boxstyle": "round", "facecolor": colour, "edgecolor": "0.3" if first else "none"}
    strength = 0.45 if after else 1
    weight = "bold" if first else "normal"
    style["alpha"] = strength
    font = {"ha": "center", "va": "center", "fontsize": 8, "alpha": strength, "weight": weight}
    ax.text(place, row, text, bbox=style, **font)


if __name__ == "__main__":
    main()
