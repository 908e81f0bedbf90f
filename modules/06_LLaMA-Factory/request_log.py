"""Beside 16_weekly.py: what of a log of requests may be learnt from, and why the rest may not."""

import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from lab import data, fail, shown

# What ends a log's way into training data. A key that stands in a log is stolen sooner or later:
# its row is dropped, and the key should be replaced. An address only becomes a placeholder.
# re.ASCII: a Chinese character beside either is no part of it.
KEY = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|AKIA[0-9A-Z]{16})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.ASCII,
)
EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII)


class Collected(NamedTuple):
    rows: list[dict]  # {"messages": [..., user, assistant]}, the answer being a right one
    left_out: dict[str, int]  # {why: number of lines}
    masked: int  # kept rows in which an address became a placeholder


def read(file: Path) -> list[dict | None]:
    """The lines of a JSONL file; None for one that is no logged request."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"the log {shown(file)} cannot be read: {e}")
    return [logged(line) for line in lines if line.strip()]


def logged(line: str) -> dict | None:
    """{"time", "messages", "answer"} and perhaps "corrected", "thumbs"; None where it is none."""
    try:
        row = json.loads(line)
        week_of(row)
        messages = row["messages"]
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        is_text = all(isinstance(message["content"], str) for message in messages)
        answer = {"role": "assistant", "content": row.get("corrected") or row["answer"]}
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return row if is_text and not data.wrong_in({"messages": [*turns, answer]}) else None


def name_of(data_set: str) -> str:
    """Of a data set that is given by its name or as a file."""
    return Path(data_set).name.removesuffix(".json")


def week_of(row: dict) -> str:
    """The ISO week of its time: 2026-W47.

    >>> week_of({"time": "2026-11-18T09:30:00"})
    '2026-W47'
    """
    year, week, _ = datetime.fromisoformat(row["time"]).isocalendar()
    return f"{year}-W{week:02d}"


def question_in(messages: list[dict]) -> str:
    """What is asked, by which requests are compared: case and blanks do not make a new one."""
    turns = [message["content"] for message in messages if message["role"] != "system"]
    return " ".join("\n".join(turns).casefold().split())


def why_not(row: dict | None, week: str, known: set[str], held_out: set[str]) -> str:
    """Why a line is not learnt from; "" where it is. The first reason counts."""
    if row is None:
        return "no logged request: broken JSON, or a field is missing"
    if week_of(row) != week:
        return "of another week"
    if not row.get("corrected") and row.get("thumbs") == "down":
        return "thumbs down, and nobody wrote what is right"
    if not row.get("corrected") and row.get("thumbs") != "up":
        return "nobody said whether the answer was right"
    if KEY.search(json.dumps(row, ensure_ascii=False)):
        return "holds a key or token: have it replaced where it was issued"
    question = question_in(row["messages"])
    if question in held_out:
        return "stands in the held-out test set"
    return "asked before" if question in known else ""


def collect(lines: list, week: str, earlier: list[dict], held_out: list[dict]) -> Collected:
    """What a week's log adds to `earlier` rows. `held_out` rows are not to be learnt.

    A corrected answer goes before one that somebody only approved.
    """
    known = {question_in(row["messages"][:-1]) for row in earlier}
    tests = {question_in(row["messages"][:-1]) for row in held_out}
    rows = []
    left_out = Counter()
    masked = 0
    for line in sorted(lines, key=lambda row: not (row and row.get("corrected"))):
        reason = why_not(line, week, known, tests)
        if reason:
            left_out[reason] += 1
            continue
        known.add(question_in(line["messages"]))
        answer = {"role": "assistant", "content": line.get("corrected") or line["answer"]}
        messages = [*line["messages"], answer]
        kept = [turn | {"content": EMAIL.sub("<email>", turn["content"])} for turn in messages]
        masked += kept != messages
        rows.append({"messages": kept})
    return Collected(rows, dict(left_out), masked)
