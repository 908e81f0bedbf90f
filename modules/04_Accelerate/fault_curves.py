"""The figure of 11_faults.py: a training that was broken again and again, over a quiet one."""


def draw(losses: list[float], laps: list[list[tuple[int, float]]]):
    """`losses` of the undisturbed run; `laps`: of every start its (step, loss)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    steps = range(1, len(losses) + 1)
    ax.plot(steps, losses, color="0.8", linewidth=9, solid_capstyle="round", label="undisturbed")
    trained = [lap for lap in laps if lap]
    for number, lap in enumerate(trained):
        label = f"broken and gone on, {len(trained)} starts" if number == 0 else None
        color = ("tab:blue", "tab:orange")[number % 2]
        ax.plot(*zip(*lap, strict=True), color=color, marker=".", markersize=4, label=label)
        ax.axvline(lap[-1][0], color="0.6", linewidth=0.7, linestyle=":")
    ax.set(xlabel="optimizer step", ylabel="loss", title="Each colour is one start of the training")
    ax.legend(loc="upper right")
    return fig
