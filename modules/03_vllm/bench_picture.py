"""The picture of 13_bench.py: latencies against tokens/s, and requests served of those sent."""

LATENCIES = {
    "ttft": "first token (TTFT)",
    "itl": "between tokens (ITL)",
    "e2e": "whole answer (E2E)",
}
SWEEPS = {  # kind: (colour, title)
    "concurrency": ("C0", "closed loop, N at once"),
    "rate": ("C1", "open loop, N requests/s"),
}
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 7, "axes.titlesize": 10}


def draw(points: dict[str, list[dict]], knees: dict[str, int | None], wanted):
    """The figure of both sweeps' points; `knees`: which point of each; `wanted`: `Objectives`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(2, 2, figsize=(8, 5.9), layout="constrained")
    objectives = {"ttft": wanted.ttft_ms, "itl": wanted.tpot_ms}
    for ax, name in zip(axes.flat, LATENCIES, strict=False):
        for kind, sweep in points.items():
            draw_latency(ax, name, kind, sweep, knees[kind])
        if name in objectives:
            label = "objective (of ITL: a request's mean)"
            ax.axhline(objectives[name], color="grey", lw=1, label=label)
        logarithmic(ax)
        ax.set(xlabel="output tokens/s", ylabel="ms", title=LATENCIES[name])
    axes[0, 0].legend(loc="upper left")
    draw_goodput(axes[1, 1], points["rate"], knees["rate"])
    axes[1, 1].set_title(f"first token in {wanted.ttft_ms:g} ms, {wanted.tpot_ms:g} ms a token")
    return fig


def draw_latency(ax, name: str, kind: str, sweep: list[dict], knee: int | None) -> None:
    """p50 and p99 of one latency over one sweep, each point with its load, the knee in a ring."""
    colour, title = SWEEPS[kind]
    rates = [point["tok_per_s"] for point in sweep]
    p50 = [point[f"{name}_p50_ms"] for point in sweep]
    p99 = [point[f"{name}_p99_ms"] for point in sweep]
    ax.plot(rates, p50, "o-", ms=4, color=colour, label=f"p50, {title}")
    ax.plot(rates, p99, "o:", ms=4, color=colour, mfc="white", label=f"p99, {title}")
    small = {"fontsize": 7, "color": colour, "ha": "center"}
    for point, *place in zip(sweep, rates, p50, strict=True):
        ax.annotate(f"{point['load']:g}", place, (0, -11), textcoords="offset points", **small)
    if knee is not None:
        ring = {"ms": 13, "mfc": "none", "mec": colour, "mew": 2}
        label = "knee" if kind == "rate" else None
        ax.plot(rates[knee], p50[knee], "o", label=label, **ring)


def draw_goodput(ax, sweep: list[dict], knee: int | None) -> None:
    """Requests/s sent, served, and served within the objectives, of the open loop."""
    sent = [point["load"] for point in sweep]
    served = [point["req_per_s"] for point in sweep]
    good = [point["goodput_req_per_s"] for point in sweep]
    ax.plot(sent, sent, "k--", ms=4, label="sent")
    ax.plot(sent, served, "C1o-", ms=4, label="served")
    ax.plot(sent, good, "C2^-", ms=4, label="served within the objectives (goodput)")
    if knee is not None:
        ax.axvline(sent[knee], color="C1", lw=1, label="knee")
    ax.set(xlabel="requests/s sent (open loop)", ylabel="requests/s")
    ax.legend(loc="upper left")


def logarithmic(ax) -> None:
    """Milliseconds at 1, 3, 10, 30 ..."""
    from matplotlib import ticker

    ax.set(yscale="log")
    locator = ticker.LogLocator(subs=(1, 3))
    ax.yaxis.set(major_locator=locator, major_formatter="{x:g}", minor_locator=ticker.NullLocator())
