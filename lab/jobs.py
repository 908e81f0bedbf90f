"""Background jobs: started in a session of their own, listed in runs/jobs, stopped whole.

A job's processes are those of its session (whose id survives its leader's death) and those that
inherited its mark, a random word in the environment: torchrun gives each worker a session of its
own. A killed job's orphans are so found, and nothing else is.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil

from lab import RUNS, fail, machine, shown

FOLDER = RUNS / "jobs"
# variable: the marks of the job a process belongs to, and of the jobs that job was started by
MARKS = "LAB_JOBS"


def start(name: str, command: list[str], log: Path | int | None, **facts) -> subprocess.Popen:
    """Run `command` as a job, its output in the file `log`.

    `log` None: on the screen; subprocess.PIPE: as text to the caller.
    `facts` (address ...) are kept in the job's file.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    environment = os.environ | {MARKS: f"{os.environ.get(MARKS, '')} {mark}".strip()}
    options = {
        "stdin": subprocess.DEVNULL,
        "start_new_session": True,
        "text": True,
        "env": environment,
    }
    if isinstance(log, Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
    else:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT if log else None, **options
        )
    created = psutil.Process(process.pid).create_time()
    job = {
        "name": name,
        "pid": process.pid,
        "created": created,
        "mark": mark,
        "log": str(log) if isinstance(log, Path) else "",
        "command": command,
        **facts,
    }
    _keep(job)
    return process


def _keep(job: dict) -> None:
    """Write the job's file; whoever reads meanwhile sees the old one or the new one, whole."""
    partial = FOLDER / f"{job['name']}.{os.getpid()}.tmp"
    partial.write_text(json.dumps(job, indent=1))
    partial.replace(FOLDER / f"{job['name']}.json")


def members(job: dict) -> list[psutil.Process]:
    """Living processes of the job: of its session, or marked as its own."""
    living = []
    reused = False  # its process id, and so its session's, now belongs to somebody else
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if _marked(process, job["mark"]):
                living.append(process)
            elif os.getsid(process.pid) == job["pid"] and not reused:
                younger = abs(process.create_time() - job["created"]) > 1
                reused = process.pid == job["pid"] and younger
                living += [] if reused else [process]
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return living


def _marked(process: psutil.Process, mark: str) -> bool:
    try:
        return mark in process.environ().get(MARKS, "").split()
    except (psutil.Error, OSError):  # of another user
        return False


def running() -> dict[str, dict]:
    """Jobs that have a living process: {name: job}. Files of dead ones are removed."""
    jobs = {}
    for file in sorted(FOLDER.glob("*.json")):
        try:
            job = json.loads(file.read_text())
        except FileNotFoundError:  # somebody else has just seen it end
            continue
        if members(job):
            jobs[job["name"]] = job
        else:
            file.unlink(missing_ok=True)
    return jobs


def stop(job: dict, grace_s: float = 25) -> int:
    """End every process of the job and return how many there were.

    SIGTERM to its leader, which ends its workers itself, then to what the leader left behind;
    SIGKILL to what still lives after `grace_s` seconds (vLLM: 10 to let requests finish, about 5
    to take itself down). The job's file says `stopping` meanwhile: whoever waits for the job knows
    that it was asked to end.
    """
    count = len(members(job))
    _keep(job | {"stopping": True})
    told: set[int] = set()
    deadline = time.monotonic() + grace_s
    while left := members(job):
        if time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
        else:
            leader = [process for process in left if process.pid == job["pid"]]
            first = leader or left
            _signal([process for process in first if process.pid not in told], signal.SIGTERM)
            told |= {process.pid for process in first}
        time.sleep(0.1)
    (FOLDER / f"{job['name']}.json").unlink(missing_ok=True)
    return count


def asked_to_end(name: str) -> bool:
    """Whether `stop` ended the job, or is about to: its file says so, or is gone already."""
    file = FOLDER / f"{name}.json"
    return not file.exists() or "stopping" in json.loads(file.read_text())


def port_taken(port: int) -> bool:
    """Whether a program listens on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """A port of 127.0.0.1 that no program listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_taken_port(port: int, way_out: str) -> None:
    """Exit code 2 where another program listens on 127.0.0.1:`port`.

    `way_out` says how to take another one.
    """
    if not 0 < port < 2**16:
        fail(f"there is no port {port}: ports go from 1 to 65535")
    if port_taken(port):
        fail(f"port {port} is in use by another program: end it, or {way_out}")


def cards() -> list[str]:
    """UUIDs of the GPUs that this process may fill; [] where it computes on the CPU."""
    return [gpu["uuid"] for gpu in machine.gpus()]


def refuse_taken_cards() -> None:
    """Exit code 2 where a server of this repository holds a GPU that this process would fill.

    A server is a job started with the fact `cards`. On a CPU both run, only more slowly.
    """
    own = machine.gpus()
    for name, job in running().items() if own else ():
        taken = [str(gpu["index"]) for gpu in own if gpu["uuid"] in job.get("cards", [])]
        if taken:
            gpus = ", ".join(taken)
            fail(
                f"the server {name} at {job['address']} holds the memory of GPU {gpus}: "
                "end it with 'make stop' first"
            )


def wait_healthy(
    name: str,
    process: subprocess.Popen,
    url: str,
    log: Path,
    cause: Callable[[], str],
    timeout_s: float = 900,
) -> float:
    """Seconds until `url` answered with HTTP 200; a line of the job's log every 5 s meanwhile.

    A job that ends first, is not healthy after `timeout_s`, or whose wait is interrupted leaves no
    process; `cause()` says why it ended, for the one sentence of exit code 2.
    """
    ready = False
    began = reported = time.monotonic()
    try:
        while not ready:
            if process.poll() is not None:
                fail(f"{name} stopped while starting: {cause()} (whole log: {shown(log)})")
            now = time.monotonic()
            if now - began > timeout_s:
                patience = f"{timeout_s:.0f} s"
                fail(
                    f"{name} was not healthy after {patience} and was ended; its log: {shown(log)}"
                )
            if now - reported >= 5:
                reported = now
                print(f"  {now - began:4.0f} s  {_last_line(log)}", flush=True)
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    ready = answer.status == 200
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
    finally:
        living = {} if ready else running()
        if name in living:
            stop(living[name])
    return time.monotonic() - began


def _last_line(log: Path) -> str:
    """Of what the job has written so far, as much as a screen shows."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    written = [line for line in lines if line] or ["starting"]
    return written[-1][:120]


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
