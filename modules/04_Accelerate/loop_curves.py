"""The picture of 05_real_loop.py: losses above, the learning rate below."""


def draw(history: list[dict], judgements: dict[int, float]):
    """The figure. `history`: loss and rate of each step; `judgements`: step: validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    steps = range(1, len(history) + 1)
    above.plot(steps, [each["loss"] for each in history], color="tab:blue", label="training")
    places = list(judgements)
    above.plot(places, judgements.values(), "o--", color="tab:orange", label="validation")
    above.set(ylabel="loss of a token")
    above.set_ylim(bottom=0)
    above.legend()
    above.set_title("Training and validation loss, and the learning rate of each step")
    below.plot(steps, [each["rate"] for each in history], "o-", color="tab:green", markersize=3)
    below.set(xlabel="optimizer step", ylabel="learning rate")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", scilimits=(0, 0))
    return fig
