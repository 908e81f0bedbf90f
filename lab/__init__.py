"""Plumbing: profiles, models, records, the machine, background jobs; module 01 teaches planner/."""

import atexit
import os
import select
import signal
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
# Everything a local run writes; git-ignored. RUNS=/data/videofen names another folder.
RUNS = ROOT / Path(os.environ.get("RUNS") or "runs").expanduser()
LOCAL_VARIABLES = ("no_proxy", "NO_PROXY")


def keep_local() -> None:
    """Let requests to this machine go past a proxy, in this process and its children."""
    kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if kept.strip() != "*":
        hosts = [host.strip() for host in kept.split(",") if host.strip()]
        kept = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost", "::1"]))
    for variable in LOCAL_VARIABLES:  # some programs read the one, some the other
        os.environ[variable] = kept


keep_local()


def fail(message: str) -> NoReturn:
    """Say one sentence to the user and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say_error(kind, error, trace) -> None:
    """As Python does; but where nobody reads stdout any more (`| head -1`), end by SIGPIPE.

    SIGPIPE itself stays ignored: a socket that breaks must be an error with a name.
    """
    if kind is BrokenPipeError:
        stdout = select.poll()
        stdout.register(1, 0)
        if any(event & select.POLLERR for _, event in stdout.poll(0)):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)
    sys.__excepthook__(kind, error, trace)


def flush() -> None:
    """What is still to be printed, while say_error can judge it."""
    try:
        if sys.stdout and not sys.stdout.closed:
            sys.stdout.flush()
    except BrokenPipeError as e:
        say_error(type(e), e, e.__traceback__)


sys.excepthook = say_error
atexit.register(flush)


def shown(path) -> str:
    """`path` as a reader at the repository root would type it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
