"""Beside 16_weekly.py: whether a new model goes out, and the link that says which one is served."""

import json
import os
from pathlib import Path

import comparing
import factory
import loop_parts
import scoring

from lab import fail, shown

SERVING = factory.FOLDER / "serving"  # a link to the folder of the model that is served
HISTORY = factory.FOLDER / "serving.json"  # folders that were published, the last one is served


def write(file: Path, value) -> None:
    """JSON beside the file, and then in its place: it is there whole, or as it was."""
    partial = file.with_name(f"{file.name}.partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


# -----------------------------------------------------------------------------
# The gate


def scored(file: Path, name: str, loss: float) -> dict:
    """One model's side of the gate, from the answers that 02_score.py wrote under `name`."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    right = [scoring.is_right(loop_parts.question_of(row), row[name]) for row in rows]
    return {"right": right, "neutral_loss": loss}


def decide(new: dict, current: dict, most_rise: float) -> dict:
    """Whether the new model goes out.

    `new`, `current`: {"right": [whether, of the same rows], "neutral_loss": nats a token}. It is
    held back where it has fewer rows right, by however little: what is a little worse each week is
    much worse after ten. And where the loss of the neutral text rose by more than `most_rise`.
    """
    won, lost = comparing.changed(current["right"], new["right"])
    rise = new["neutral_loss"] / current["neutral_loss"] - 1
    reasons = []
    if lost > won:
        reasons.append(f"{lost} rows that were right are wrong now, and only {won} the other way")
    if rise > most_rise:
        reasons.append(f"the neutral text's loss rose by {rise:.1%}, more than {most_rise:.1%}")
    return {
        "publish": not reasons,
        "reasons": reasons,
        "won_count": won,
        "lost_count": lost,
        "luck_ratio": round(comparing.sign_test(won, lost), 4),
        "neutral_rise_pct": round(100 * rise, 2),
    }


# -----------------------------------------------------------------------------
# The link


def history() -> list[str]:
    """Folders below runs/06_LLaMA-Factory in the order in which they were published."""
    return json.loads(HISTORY.read_text(encoding="utf-8")) if HISTORY.is_file() else []


def current() -> Path | None:
    """The folder that is served."""
    return SERVING.resolve() if SERVING.is_symlink() and SERVING.is_dir() else None


def switch(name: str) -> None:
    """The link to another folder, in one step: there is no moment without a model."""
    if not (factory.FOLDER / name).is_dir():
        fail(f"{shown(factory.FOLDER / name)} is gone: {shown(SERVING)} stays as it was")
    if SERVING.exists() and not SERVING.is_symlink():
        fail(f"{shown(SERVING)} is no link: move it away, nothing of it is overwritten")
    beside = SERVING.with_name("serving.next")
    beside.unlink(missing_ok=True)
    beside.symlink_to(name)
    os.replace(beside, SERVING)


def publish(name: str) -> None:
    """Serve this folder from now on; again after an interruption changes nothing."""
    switch(name)
    if history()[-1:] != [name]:
        write(HISTORY, [*history(), name])


def roll_back() -> tuple[str, str]:
    """Serve the folder before: (what was served, what is)."""
    names = history()
    if len(names) < 2:
        fail("there is no model before this one to go back to")
    switch(names[-2])
    write(HISTORY, names[:-1])
    return names[-1], names[-2]
