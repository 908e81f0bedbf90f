"""The plumbing of 09_two_machines.py: one training on its machines, watched until it has ended."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from lab import ROOT, RUNS, cable, fail, jobs, shown

FOLDER = RUNS / "05_DeepSpeed/two_machines"
STEP = re.compile(r"step +\d+\b.* loss |\{'loss'")  # what process 0 prints after each step
REASON = re.compile(r"(?:\[rank\d+\]: *)?(?:[\w.]*(?:Error|Exception)|error): (?:\[\S+\] )?(.+)")


class Fault(NamedTuple):
    """What happens after a step."""

    step: int
    make: Callable[[], None]


class Training:
    """The launchers of one training, a machine each; their output in files of FOLDER."""

    def __init__(self, name: str):
        self.name = name
        self.processes: list[subprocess.Popen] = []
        self.ended_s: dict[int, float] = {}  # when each machine's launcher had ended
        self.killed: list[int] = []  # machines whose launcher had to be ended
        self.at_steps: list[cable.Traffic] = []  # the cable's counters after each step
        self.result: dict = {}  # the JSON line of process 0
        self.left = 0  # processes that the launchers left behind
        self.fault_s = 0.0  # when the fault was made

    def run(self, commands: list[list[str]], patience_s: float, fault: Fault | None) -> None:
        """Start a command a machine and wait for all of them.

        What still runs `patience_s` after the fault, or after another machine's failure, is ended.
        """
        FOLDER.mkdir(parents=True, exist_ok=True)
        try:
            for rank, command in enumerate(commands):
                parts = cable.on_machine(cable.NODES[rank], ["env", *hidden(), *command])
                out = self.log(rank) if rank else subprocess.PIPE
                self.processes.append(jobs.start(cable.NODES[rank], parts, out))
            reader = threading.Thread(target=self._read, args=(fault,), daemon=True)
            reader.start()
            self._wait(patience_s)
            reader.join(5)
            self.left = sum(len(cable.inhabitants(node)) for node in cable.NODES)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            stop(range(len(self.processes)), 5)

    def _read(self, fault: Fault | None) -> None:
        """Machine 0's output, line by line: into its file; the counters at every step."""
        with self.log(0).open("w", encoding="utf-8") as file:
            for line in self.processes[0].stdout:
                if STEP.match(line):
                    self.at_steps.append(cable.counted())
                    if fault and len(self.at_steps) == fault.step:
                        self.fault_s = time.monotonic()
                        fault.make()
                elif line.startswith('{"script"'):
                    self.result = json.loads(line)
                file.write(line)
                file.flush()

    def _wait(self, patience_s: float) -> None:
        while len(self.ended_s) < len(self.processes):
            now = time.monotonic()
            for rank, process in enumerate(self.processes):
                if rank not in self.ended_s and process.poll() is not None:
                    self.ended_s[rank] = now
                    if rank == 0 and not self.killed and jobs.asked_to_end(cable.NODES[0]):
                        raise SystemExit(143)  # make stop
            failed_s = [self.ended_s[rank] for rank in self.ended_s if self.codes()[rank]]
            trouble_s = self.fault_s or min(failed_s, default=now)
            if now - trouble_s > patience_s and not self.killed:
                self.killed = [r for r in range(len(self.processes)) if r not in self.ended_s]
                stop(self.killed, 0)
            time.sleep(0.1)

    def log(self, rank: int) -> Path:
        return FOLDER / f"{self.name}-node{rank}.log"

    def codes(self) -> list[int | None]:
        """The launchers' exit codes, machine by machine."""
        return [process.returncode for process in self.processes]

    def ending(self, rank: int) -> str:
        """When, how and why a machine's launcher ended."""
        log = self.log(rank)
        after = f" {self.ended_s[rank] - self.fault_s:.1f} s later" if self.fault_s else ""
        how = "had to be killed" if rank in self.killed else f"exit code {self.codes()[rank]}"
        return f"{cable.NODES[rank]} ended{after}, {how}: {cause(log)} (see {shown(log)})"

    def refuse_failed(self) -> None:
        """Exit code 2 where a machine failed, with the reason of the one that failed first.

        A machine that was made to vanish is no failure, once it has.
        """
        if self.fault_s:
            return
        failed = [rank for rank, code in enumerate(self.codes()) if code]
        if failed:
            fail(f"{self.name}: {self.ending(min(failed, key=self.ended_s.get))}")

    def losses(self) -> list[float]:
        """Of each step; LLaMA-Factory leaves them beside the adapter."""
        if self.result:
            return self.result["losses"]
        state = json.loads((FOLDER / self.name / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def per_step(self) -> tuple[float, float, float]:
        """Bytes to machine 1, bytes back, packets to machine 1: of the median step.

        From one step's line to the next one's. When a line is read late, its step gets what the
        next one has already sent.
        """
        pairs = itertools.pairwise(self.at_steps)
        steps = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]
        sent, returned, packets, _ = map(median, zip(*steps, strict=True))
        return sent, returned, packets


def stop(ranks, grace_s: float) -> None:
    """End what lives of these machines' jobs."""
    running = jobs.running()
    for rank in ranks:
        if cable.NODES[rank] in running:
            jobs.stop(running[cable.NODES[rank]], grace_s)


def cause(log: Path) -> str:
    """The first exception in a launcher's log, else its last line."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    lines = [line.strip() for line in lines if line.strip()] or ["it wrote nothing"]
    for line in lines:
        if match := REASON.match(line):
            return match[1][:200]
    return lines[-1][:200]


def kill() -> None:
    """End machine 1 as a power cut would, but that the kernel tells its peers."""
    stop([1], 0)


def hidden() -> list[str]:
    """Variables of every launcher that no reader has to set."""
    programs = Path(sys.executable).parent
    return [
        f"PATH={programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED=1",  # a step's line comes when the step has ended
        # As many on one machine as on two: in another order sums round differently.
        f"OMP_NUM_THREADS={max(1, psutil.cpu_count() // 2)}",
        # Their records are none of a reader's own trainings, and no evidence.
        "STORE=",
        f"RECORDS={FOLDER / 'records'}",
    ]


def hostfile(addresses: tuple[str, ...], slots: int) -> str:
    """DeepSpeed's list of machines, a line each, in a file: its path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"hostfile-{len(addresses)}"
    file.write_text("".join(f"{address} slots={slots}\n" for address in addresses))
    return shown(file)


# -----------------------------------------------------------------------------
# LLaMA-Factory


def written_for_llamafactory(name: str, args, profile) -> str:
    """The YAML of its training: module 06's, with this profile's values and these flags; its path.

    Plain data parallelism of a LoRA adapter, whose output goes to FOLDER/`name`.
    """
    from omegaconf import OmegaConf

    settings = OmegaConf.load(ROOT / "modules/06_LLaMA-Factory/configs/sft_lora_z2.yaml")
    here = {
        "model_name_or_path": args.model,
        "template": "chatml",
        "output_dir": shown(FOLDER / name),
        "deepspeed": None,
        "ddp_backend": "gloo",
        "max_samples": 2 * args.micro_batch * args.accumulate * args.steps,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.learning_rate,
        "logging_steps": 1,
        "plot_loss": False,
        "ddp_timeout": args.timeout,
    }
    file = FOLDER / f"{name}.yaml"
    whole = OmegaConf.merge(settings, profile.finetune.args, here)
    file.write_text(OmegaConf.to_yaml(whole), encoding="utf-8")
    return shown(file)


# -----------------------------------------------------------------------------
# What is trained


def numbers(file: Path) -> int:
    """How many numbers a .safetensors file holds, by its header alone."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(math.prod(entry["shape"]) for entry in header.values())


def trained_numbers(name: str, model: str) -> int:
    """How many numbers a training updates: the adapter's where it left one, else the model's."""
    adapter = FOLDER / name / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else Path(model).glob("*.safetensors")
    return sum(numbers(file) for file in files)
