"""Result records: every number a script prints, with its birth certificate.

A script ends with `finish(__file__, metrics, config)`. The last line of its stdout is one JSON object; the same numbers with
command, commit, date, machine and versions go to runs/records/, and with STORE=1 to results/<machine>/ as evidence.
"""

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from lab import ROOT, RUNS, machine, shown

FOLDER = Path(os.environ.get("RECORDS") or RUNS / "records")  # the tests keep theirs apart from yours


def name_of(script: str) -> str:
    """`03_vllm/05_throughput` for that module script; scripts outside modules/ keep their own folder's name."""
    path = Path(script).resolve().with_suffix("")
    return f"{path.parent.name}/{path.name}"


def command() -> str:
    """The command line of this process, as a reader at the repository root would type it."""
    return shlex.join([shown(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def note(name: str) -> None:
    """Keep in history.jsonl that this command has done its work: `make progress` goes by it. MAKE_COMMAND is set by the Makefile."""
    line = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "script": name, "profile": os.environ.get("PROFILE", "")}
    line |= {"command": command(), "make": os.environ.get("MAKE_COMMAND", "")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "history.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")


def picture(script: str, name: str, figure) -> None:
    """Save a matplotlib figure as runs/<module>/<name>.png and, with STORE=1, beside the records; say where."""
    targets = [RUNS / Path(script).resolve().parent.name / f"{name}.png"]
    if os.environ.get("STORE") == "1":
        targets.append(ROOT / "results" / machine.name() / targets[0].parent.name / targets[0].name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
    print(f"plot: {shown(targets[-1])}")


def finish(script: str, metrics: dict, config: dict | None = None, variant: str = "") -> None:
    """Store the record and print `{"script": ..., "machine": ..., **metrics}` as the last line of stdout.

    Keys of `metrics` end in their unit (throughput_tok_per_s, start_s, speedup_ratio). `variant` keeps several records
    of one script apart.
    """
    name = name_of(script) + (f"-{variant}" if variant else "")
    record = {
        "script": name,
        "command": command(),
        "profile": os.environ.get("PROFILE", ""),
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "config": config or {},
        "metrics": metrics,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    targets = [FOLDER / f"{name}.json"]
    if os.environ.get("STORE") == "1":
        targets.append(ROOT / "results" / machine.name() / f"{name}.json")
    note(name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".tmp")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    print(f"record: {shown(targets[-1])}", file=sys.stderr)
    print(json.dumps({"script": name, "machine": machine.name(), **metrics}, ensure_ascii=False), flush=True)
