"""Beside the steps of 07_loop.py: a server's answer as text, what vLLM refuses, the plot."""

import json
import re
from pathlib import Path

import scoring


def key(name: str) -> str:
    """The name of a stage or step as metrics begin: "vLLM, merged" -> vllm_merged."""
    return re.sub(r"\W+", "_", name.lower())


def text_of(message) -> str:
    """The answer as a text; calls of tools, which a server takes out of it, as JSON."""
    if not message.tool_calls:
        return message.content or ""
    calls = [call.function for call in message.tool_calls]
    return json.dumps(
        [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls]
    )


def question_of(row: dict) -> scoring.Question:
    """The question in a row of answers.json."""
    return scoring.Question(**{name: row[name] for name in scoring.Question._fields})


def adapter_settings(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def rank_of(folder: Path) -> int:
    """What --max-lora-rank must be: the adapter's rank, rounded up to one that vLLM has."""
    rank = adapter_settings(folder)["r"]
    return next(known for known in (1, 8, 16, 32, 64, 128, 256, 320, 512) if known >= rank)


def not_for_vllm(trained) -> str:
    """Why vLLM cannot put this adapter on its base; "" where it can."""
    if not trained.is_adapter:
        return "trained were the weights themselves: there is no adapter to serve"
    settings = adapter_settings(trained.folder)
    if settings.get("use_dora"):
        return "a DoRA adapter: vLLM does not serve these yet, only what is merged"
    if str(settings.get("init_lora_weights")).startswith("pissa"):
        return (
            "a PiSSA adapter belongs to weights from which its first product was subtracted, "
            "which vLLM would not do: only what is merged is served"
        )
    return ""


def line(name: str, metrics: dict) -> tuple:
    """A row of the table; `same tokens` as transformers with the adapter."""
    stem = key(name)
    field = metrics.get(f"{stem}_field_pct")
    count = metrics["row_count"]
    same = metrics[f"{stem}_same_count"]
    return (
        name,
        f"{metrics[f'{stem}_exact_pct']:.1f}",
        f"{metrics[f'{stem}_exact_low_pct']:.1f} to {metrics[f'{stem}_exact_high_pct']:.1f}",
        None if field is None else f"{field:.1f}",
        "yes" if same == count else f"{same} of {count}",
    )


def draw(stages: list[str], seconds: dict[str, float], metrics: dict):
    """Figure: exact match of each stage with its interval, and how long each step took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    shares = [metrics[f"{key(name)}_exact_pct"] for name in stages]
    ends = [
        [
            abs(metrics[f"{key(name)}_exact_{end}_pct"] - metrics[f"{key(name)}_exact_pct"])
            for name in stages
        ]
        for end in ("low", "high")
    ]
    colours = ["lightgrey", *["C0"] * (len(stages) - 1)]
    left.bar(
        [name.replace(", ", ",\n") for name in stages], shares, yerr=ends, color=colours, capsize=4
    )
    left.set(ylabel="exact match, %", ylim=(0, 105), title="the same requests, answered by")
    names = list(seconds)[::-1]
    bars = right.barh(names, [seconds[name] for name in names], color="C1")
    right.bar_label(bars, fmt="%.0f", padding=2)
    right.margins(x=0.12)
    right.set(xlabel="seconds", title="the steps")
    return fig
