"""Background jobs of this repository: started in a session of their own, listed in runs/jobs, stopped whole.

A session id survives its leader's death, so a killed server's orphaned workers are still found, and nothing else is.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

from lab import RUNS

FOLDER = RUNS / "jobs"


def start(name: str, command: list[str], log: Path | int | None, **facts) -> subprocess.Popen:
    """Run `command` as a job, its output in the file `log` (None: on the screen; subprocess.PIPE: as text to the caller).

    `facts` (address ...) are kept in the job's file.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    options = {"stdin": subprocess.DEVNULL, "start_new_session": True, "text": True}
    if isinstance(log, Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
    else:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT if log else None, **options)
    created = psutil.Process(process.pid).create_time()
    job = {"name": name, "pid": process.pid, "created": created, "log": str(log) if isinstance(log, Path) else "", "command": command, **facts}
    (FOLDER / f"{name}.json").write_text(json.dumps(job, indent=1))
    return process


def members(job: dict) -> list[psutil.Process]:
    """Living processes of the job's session; [] when its process id now belongs to somebody else."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) != job["pid"] or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid == job["pid"] and abs(process.create_time() - job["created"]) > 1:
                return []
            found.append(process)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


def running() -> dict[str, dict]:
    """Jobs that have a living process: {name: job}. Files of dead ones are removed."""
    jobs = {}
    for file in sorted(FOLDER.glob("*.json")):
        job = json.loads(file.read_text())
        if members(job):
            jobs[job["name"]] = job
        else:
            file.unlink(missing_ok=True)
    return jobs


def stop(job: dict, grace_s: float = 15) -> int:
    """End every process of the job: SIGTERM to its leader, which ends its workers itself, then to what the leader left
    behind, SIGKILL to what still lives after `grace_s` seconds. Returns how many processes ended.
    """
    count = len(members(job))
    told: set[int] = set()
    deadline = time.monotonic() + grace_s
    while left := members(job):
        if time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
        else:
            leader = [p for p in left if p.pid == job["pid"]]
            _signal([p for p in leader or left if p.pid not in told], signal.SIGTERM)
            told |= {p.pid for p in leader or left}
        time.sleep(0.1)
    (FOLDER / f"{job['name']}.json").unlink(missing_ok=True)
    return count


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
