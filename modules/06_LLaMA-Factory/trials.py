"""One training by 01_train.py and its score by 02_score.py, each in a process of its own."""

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import factory

from lab import machine, shown

HERE = Path(__file__).resolve().parent
POINTS = factory.FOLDER / "sweep"  # what came of each trial of a sweep, so that it is kept

# -----------------------------------------------------------------------------
# One trial


def result(script: str, *arguments: str, label: str = "", environment: dict | None = None) -> dict:
    """The JSON object on the last line of the script's output; its exit code 2 is ours.

    Its losses and scores are shown, each after `label`.
    """
    command = [sys.executable, str(HERE / script), *arguments]
    options = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    last = ""
    with factory.child(command, **options) as process:
        for line in process.stdout:
            last = line
            if line.startswith(("  {'loss'", "  exact match")):
                print(f"{label}{line.rstrip()}", flush=True)
    return json.loads(last)


def train_and_score(
    folder: str, method: str, overrides: list[str], scored: bool = True, **told
) -> dict:
    """What both say of a training that writes to `folder`; only the first without `scored`.

    `told` is what `result` takes.
    """
    trained = result("01_train.py", "--method", method, "--fresh", *overrides, **told)
    score = result("02_score.py", "--no-base", "--adapter", folder, **told) if scored else {}
    return trained | score


# -----------------------------------------------------------------------------
# Many


def environments(device: str, at_once: int | None) -> list[dict]:
    """One for each trial that runs at the same time: a GPU of its own, or a share of the cores."""
    own = os.environ | {"STORE": ""}  # the record is that of the whole sweep
    if device == "cuda":
        cards = [str(gpu["index"]) for gpu in machine.gpus()][:at_once]
        return [own | {"CUDA_VISIBLE_DEVICES": card} for card in cards]
    count = at_once or 1
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return [own | {"OMP_NUM_THREADS": str(threads)}] * count


def kept(name: str, settings: dict) -> dict | None:
    """What came of this trial before, with the same settings."""
    try:
        point = json.loads((POINTS / f"{name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return point["row"] if point["settings"] == settings else None


def measured(name: str, own: list[str], environment: dict) -> dict:
    """What came of the trial with settings of its own; its weights are not kept."""
    folder = factory.FOLDER / f"sweep-{name}"
    overrides = [*own, f"output_dir={shown(folder)}"]
    told = {"label": f"{name}:", "environment": environment}
    row = train_and_score(shown(folder), "", overrides, **told)
    shutil.rmtree(folder)
    return row


def run_all(trials: dict[str, list[str]], same: dict, spaces: list[dict]) -> dict[str, dict]:
    """{name: what came of it} of the trials {name: settings that are its own}.

    `same` are the settings that all of them share, `spaces` the environments of those that run at
    the same time. What has been measured is not measured again.
    """
    ended = threading.Event()
    free = queue.SimpleQueue()
    for space in spaces:
        free.put(space)

    def one(name: str) -> dict:
        settings = {"own": trials[name], "same": same}
        if row := kept(name, settings):
            print(f"{name}: measured before", flush=True)
            return row
        if ended.is_set():
            raise SystemExit(1)
        space = free.get()
        try:
            row = measured(name, trials[name], space)
        except BaseException:
            ended.set()
            raise
        finally:
            free.put(space)
        POINTS.mkdir(parents=True, exist_ok=True)
        point = json.dumps({"settings": settings, "row": row}, indent=1)
        (POINTS / f"{name}.json").write_text(point, encoding="utf-8")
        return row

    pool = ThreadPoolExecutor(len(spaces))
    try:
        return dict(zip(trials, pool.map(one, trials), strict=True))
    except BaseException:  # one has failed, or Ctrl+C: the others end too
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(factory.children):
            process.terminate()
        raise
