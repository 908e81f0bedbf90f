"""One training by 01_train.py and its score by 02_score.py, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import factory

HERE = Path(__file__).resolve().parent


def result(script: str, *arguments: str) -> dict:
    """The JSON object on the last line of the script's output; its exit code 2 is ours."""
    command = [sys.executable, str(HERE / script), *arguments]
    last = ""
    with factory.child(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            last = line
            if line.startswith(("  {'loss'", "  exact match")):
                print(line.rstrip(), flush=True)
    return json.loads(last)


def train_and_score(folder: str, method: str, overrides: list[str], scored: bool = True) -> dict:
    """What both say of a training that writes to `folder`; only the first without `scored`."""
    trained = result("01_train.py", "--method", method, "--fresh", *overrides)
    score = result("02_score.py", "--no-base", "--adapter", folder) if scored else {}
    return trained | score
