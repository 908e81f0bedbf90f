"""The checks of `make doctor`: software.py, cards.py, links.py, host.py.

A check takes the profile and returns a verdict and what was found. What must not hang or crash the
doctor runs in a process of its own: programs.py, triton_kernel.py.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from lab import machine

OK, WARNING, FAILED, ABSENT = "ok", "warning", "failed", "not applicable"
Finding = tuple[str, str]  # verdict, what was found

FOLDER = Path(__file__).resolve().parent
PROGRAMS = FOLDER / "programs.py"


def start(command: list, environment: dict) -> subprocess.Popen:
    """Python with `command` in a session of its own, both its outputs in one."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def end_of(process: subprocess.Popen, timeout_s: float) -> tuple[int, str]:
    """(exit code, last line); 124, and the process ended, where it ran out of time."""
    try:
        lines = process.communicate(timeout=timeout_s)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return 124, f"no answer within {timeout_s:.0f} s"
    return process.returncode, lines[-1] if lines else "no output"


def program(name: str, *arguments, timeout_s: float) -> tuple[int, str]:
    """(exit code, last line) of a function of programs.py."""
    return end_of(start([PROGRAMS, name, *arguments], os.environ), timeout_s)


def installed_lock() -> str:
    """The lock of this environment: set-up's mark, else by the kind of its torch."""
    by_torch = "cpu" if metadata.version("torch").endswith("+cpu") else "gpu"
    return machine.lock() or by_torch


def used_cards() -> list[dict]:
    """The cards that this environment and profile compute on, in CUDA's order."""
    return [] if installed_lock() == "cpu" else machine.gpus()


def no_cards() -> str:
    """Why `used_cards` is empty, in words."""
    if count := len(machine.cards()):
        return f"{count} NVIDIA GPU(s), not used by the {installed_lock()} lock and this profile"
    return "no NVIDIA GPU"
