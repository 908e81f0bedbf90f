"""What a long test looks at must have been made in this session.

By the readme's block, which runs before it in `make test-long`, else now, by the command that the
test names.
"""

import json
import time
from pathlib import Path

from conftest import RUNS, run

STARTED = time.time()


def is_of_this_session(file: Path) -> bool:
    return file.is_file() and file.stat().st_mtime >= STARTED


def record(name: str, *commands: str) -> dict:
    """The metrics of a record of this session; where it is missing, `commands` store it first."""
    file = RUNS / "tests" / "records" / f"{name}.json"
    if not is_of_this_session(file):
        run("bash", "-euo", "pipefail", "-c", "\n".join(commands), check=0)
    assert is_of_this_session(file), f"{commands} store no record {name}"
    return json.loads(file.read_text())["metrics"]


def folder(path: Path, holds: str, *commands: str) -> Path:
    """A folder made in this session, by the file that it `holds`."""
    if not is_of_this_session(path / holds):
        run("bash", "-euo", "pipefail", "-c", "\n".join(commands), check=0)
    assert is_of_this_session(path / holds), f"{commands} do not write {path / holds}"
    return path
