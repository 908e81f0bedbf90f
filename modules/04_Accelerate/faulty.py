"""One start of a training that 11_faults.py breaks: its lines, its processes, its end."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from lab import RUNS, checkpoints, fail, jobs, models, shown

JOB = "faults"  # the job's name: `make stop` ends it
SCRIPT = Path(__file__).with_name("01_train_ddp.py")


class Ended(NamedTuple):
    code: int | None  # of the launcher; 0: it finished; None: it goes on
    seconds: float  # from the fault to the end
    line: str  # the last thing said
    left: int  # processes that live on
    step: int  # the last one that was computed
    whole: int  # the step whose state is whole and will be gone on from; 0: none


class Training:
    """`01_train_ddp.py --resume` on two processes, under torchrun."""

    def __init__(self, flags: list, states: Path, restarts: int = 0, launcher=(), **environment):
        self.states = states
        launcher = [*(launcher or ["--standalone"]), "--max-restarts", str(restarts)]
        command = ["torchrun", *launcher, "--nproc-per-node", "2", str(SCRIPT), "--resume"]
        command += ["--checkpoints", shown(states), *map(str, flags)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lab.launch", JOB, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Its records are none of the reader's.
            env=os.environ | {"STORE": "", "RECORDS": str(states)} | environment,
        )
        self.step = 0
        self.lines: list[str] = []
        self.points: list[tuple[int, float]] = []  # (step, loss) as they came

    def until(self, pattern: str) -> str:
        """The next line that matches."""
        for line in self.process.stderr:
            self.hear(line)
            if re.match(pattern, line):
                return line.rstrip()
        code = self.process.wait()
        last_lines = "\n".join(self.lines[-20:])
        fail(f"exit code {code} before it said {pattern!r}; the last lines:\n{last_lines}")

    def hear(self, line: str) -> None:
        self.lines.append(line.rstrip())
        if step := re.match(r"step +(\d+)/.* loss +([\d.]+)", line):
            self.step = int(step[1])
            self.points.append((self.step, float(step[2])))

    def job(self) -> dict:
        return jobs.running()[JOB]

    def processes(self) -> list[psutil.Process]:
        """All of the job."""
        return jobs.members(self.job())

    def workers(self) -> list[psutil.Process]:
        """The processes that train, the first of them at the head."""
        members = [each for each in self.processes() if "LOCAL_RANK" in each.environ()]
        return sorted(members, key=lambda worker: worker.environ()["LOCAL_RANK"])

    def ended(self, since: float) -> Ended:
        """Wait for the end; `since`: when the fault happened, by time.monotonic."""
        members = jobs.members(self.job()) if JOB in jobs.running() else []
        for line in self.process.stderr:
            self.hear(line)
        code = self.process.wait()
        seconds = time.monotonic() - since
        left = [each for each in members if each.is_running() and each.status() != "zombie"]
        states = reversed(checkpoints.steps_in(self.states))
        whole = [n for n in states if not checkpoints.damage(self.states / f"step-{n}")]
        last = (whole or [0])[0]
        return Ended(code, seconds, self.lines[-1], len(left), max(self.step, last), last)


def small_model(like: str) -> Path:
    """A model of two layers with random weights and the tokenizer of `like`: quick to save."""
    folder = RUNS / "04_Accelerate" / "two_layers"
    if (folder / "tokenizer_config.json").is_file():
        return folder
    return models.two_layers(models.model_folder(like), folder)


# -----------------------------------------------------------------------------
# What is broken


def truncate(file: Path) -> None:
    """As a crash leaves a file whose last pages were never written."""
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    """As a bad cable or a bad cell does: the size stays, nothing says so."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)
        content.seek(-1, os.SEEK_CUR)
        content.write(bytes([byte[0] ^ 1]))


def fill_disk(folder: Path) -> Path:
    """A file that takes all but the last MiB of the disk; remove it to free the disk."""
    disk = os.statvfs(folder)
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - 2**20)
    return filler


class MemoryLimit:
    """A control group of Linux with a limit on its memory, swap included. Raises OSError."""

    def __init__(self):
        second = Path("/sys/fs/cgroup/cgroup.controllers").is_file()
        root = Path("/sys/fs/cgroup" if second else "/sys/fs/cgroup/memory")
        self.folder = root / f"videofen-{os.getpid()}"
        names = ("memory.max", "memory.current") if second else ()
        self.limit, self.usage = names or ("memory.limit_in_bytes", "memory.usage_in_bytes")
        self.folder.mkdir()
        if not (self.folder / self.limit).is_file():
            self.remove()
            raise OSError(f"no memory controller in {root}")

    def take(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            (self.folder / "cgroup.procs").write_text(str(process.pid))

    def leave(self, room: int) -> None:
        """From now on, `room` bytes more than are used."""
        usage = int((self.folder / self.usage).read_text())
        (self.folder / self.limit).write_text(str(usage + room))

    def remove(self) -> None:
        self.folder.rmdir()


def jumping_clock(build: Path) -> Path:
    """A library that, preloaded, sets a process's clock an hour back after some seconds."""
    library = build / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    build.mkdir(parents=True, exist_ok=True)
    compiler = ["cc", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(compiler, check=True, capture_output=True)
    return library
