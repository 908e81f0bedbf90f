"""The pictures of costs.md: what the collectives do, and what messages cost."""

import alpha_beta
from alpha_beta import Line, Message, Point

COLOURS = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0"]  # a colour for each process


def plt():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def costs(
    measured: dict[str, list[Point]],
    lines: dict[str, Line],
    ways: dict[str, list[Message]],
    played: dict[str, float],
    width: int,
    world: int,
    processes: list[int],
):
    """Left: collectives over their size, points and line. Right: a step's messages over n."""
    figure, (left, right) = plt().subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number, (kind, points) in enumerate(measured.items()):
        colour = f"C{number}"
        sizes = [point.size / 2**20 for point in points]
        took = [1e3 * point.seconds for point in points]
        fitted = [1e3 * alpha_beta.ring(kind, point.size, world, lines[kind]) for point in points]
        left.plot(sizes, fitted, color=colour, label=kind.replace("_", "-"))
        left.plot(sizes[::2], took[::2], "o", color=colour)
        left.plot(sizes[1::2], took[1::2], "o", color=colour, markerfacecolor="white")
    left.set(xscale="log", yscale="log", xlabel="MiB of the whole tensor", ylabel="ms")
    left.set_title(f"Measured on {world} processes: full points made the lines, hollow check them")
    left.legend()

    ddp = ways["DDP"]
    for number, (name, messages) in enumerate(ways.items()):
        times = [alpha_beta.step_seconds(messages, n, width, lines) for n in processes]
        # Each thinner than the last: DDP's and ZeRO-1's lie on each other.
        style = {"color": f"C{number}", "zorder": 3 + number}
        style["linestyle"] = "--" if name == "ZeRO-1" else "-"
        right.plot(processes, times, linewidth=4.5 - 0.6 * number, label=name, **style)
        if name in played:
            right.plot(world, played[name], "o", markersize=12 - 1.5 * number, **style)
    in_trees = [
        sum(each.times * alpha_beta.tree(each.numbers * width, n, lines[each.kind]) for each in ddp)
        for n in processes
    ]
    right.plot(processes, in_trees, ":", color="black", label="DDP, over trees")
    right.set(xscale="log", yscale="log", xlabel="processes", ylabel="s a step")
    right.set_xticks(processes, processes)
    right.minorticks_off()
    right.set_title("A step's messages: points sent here, lines the formula of one ring")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    return figure


def collectives(n: int = 4):
    """Four states of n processes with n blocks each, and the three collectives between them.

    A block is drawn as the stripes of the processes that it is a sum of: one stripe, a process's
    own value; n of them, the sum of all.
    """
    figure, axes = plt().subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    own = [[[process] for _ in range(n)] for process in range(n)]
    everybody = list(range(n))
    scattered = [
        [everybody if block == process else [] for block in range(n)] for process in range(n)
    ]
    summed = [[everybody for _ in range(n)] for _ in range(n)]
    titles = ["each has a whole tensor of its own", "each has the sum of one part"]
    titles.append("each has the whole sum")
    for ax, state, title in zip(axes, (own, scattered, summed), titles, strict=True):
        draw_state(ax, state, title)
    arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": "#444444"}
    for ax, name in zip(axes, ("reduce-\nscatter", "all-\ngather"), strict=False):
        ends = {"xy": (1.26, 0.5), "xytext": (1.03, 0.5), "xycoords": "axes fraction"}
        ax.annotate("", **ends, textcoords="axes fraction", arrowprops=arrow)
        ax.text(1.14, 0.55, name, transform=ax.transAxes, ha="center")
    figure.get_layout_engine().set(wspace=0.1)
    figure.suptitle(
        "all-reduce = reduce-scatter + all-gather: a block's stripes say whose sum it is"
    )
    return figure


def draw_state(ax, state: list[list[list[int]]], title: str) -> None:
    """A row of blocks for each process, in each block a stripe for each that went into it."""
    n = len(state)
    for process, blocks in enumerate(state):
        for block, owners in enumerate(blocks):
            corner = (block, n - 1 - process)
            for stripe, owner in enumerate(owners):
                height = 0.86 / len(owners)
                left_below = (corner[0] + 0.05, corner[1] + 0.07 + stripe * height)
                kind = {"facecolor": COLOURS[owner % len(COLOURS)]}
                ax.add_patch(plt().Rectangle(left_below, 0.9, height, **kind))
            frame = (corner[0] + 0.05, corner[1] + 0.07)
            edge = {"fill": False, "edgecolor": "#bbbbbb"}
            ax.add_patch(plt().Rectangle(frame, 0.9, 0.86, **edge))
    ax.set(xlim=(0, n), ylim=(0, n), xticks=[i + 0.5 for i in range(n)], aspect="equal")
    ax.set_xticklabels([f"part {i}" for i in range(n)], fontsize=8)
    names = [f"process {n - 1 - i}" for i in range(n)]
    ax.set_yticks([i + 0.5 for i in range(n)], names, fontsize=8)
    ax.tick_params(length=0)
    ax.set_frame_on(False)
    ax.set_title(title, fontsize=10)
