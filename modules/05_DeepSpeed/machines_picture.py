"""The picture of two_machines.md: the losses over each other, and what a step sends."""

from typing import NamedTuple


class Curve(NamedTuple):
    """A training as the picture shows it."""

    name: str
    one: list[float]  # losses on one machine
    two: list[float]  # on two
    measured: float  # bytes a step, machine 0 to machine 1
    gloo: float  # by arithmetic
    nccl: float


def draw(curves: list[Curve]):
    """Left: losses on one machine as lines, on two as points. Right: bytes of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, curve in enumerate(curves):
        steps = range(1, len(curve.one) + 1)
        colour = f"C{number}"
        # Each line thinner than the last: five of them lie on each other.
        left.plot(steps, curve.one, color=colour, linewidth=8 - number, alpha=0.6)
        left.plot(steps, curve.two, "o", color=colour, markersize=9 - number, label=curve.name)
    left.set(xlabel="step", ylabel="loss")
    left.set_title("Lines: two processes of one machine; points: one process each of two")
    left.legend(fontsize=8)

    places = range(len(curves))
    kinds = {"measured on the cable": "measured", "gloo, by arithmetic": "gloo"}
    kinds["NCCL, by arithmetic"] = "nccl"
    for shift, (label, key) in zip((-0.27, 0, 0.27), kinds.items(), strict=True):
        heights = [getattr(curve, key) / 1e6 for curve in curves]
        right.bar([place + shift for place in places], heights, 0.25, label=label)
    right.set_xticks(places, [curve.name.replace(", ", "\n") for curve in curves], fontsize=8)
    right.set(ylabel="MB a step, from machine 0 to machine 1")
    right.set_title("What a step puts on the cable")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    return figure
