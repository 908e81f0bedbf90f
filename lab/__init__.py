"""Plumbing that no stage teaches: profiles, models, result records, machine facts, background jobs."""

import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"  # git-ignored: everything a local run writes


def fail(message: str) -> NoReturn:
    """Say one sentence to the user and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def shown(path) -> str:
    """`path` as a reader at the repository root would type it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
