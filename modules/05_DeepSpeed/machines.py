"""The plumbing of 09_two_machines.py: one training on its machines, watched until it has ended."""

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

import psutil

from lab import ROOT, RUNS, cable, fail, jobs, shown

FOLDER = RUNS / "05_DeepSpeed/two_machines"
STEP = re.compile(r"step +\d+ +loss|\{'loss'")  # what process 0 prints after each step
REASON = re.compile(r"(?:\[rank\d+\]: *)?(?:[\w.]*(?:Error|Exception)|error): (.+)")


class Training:
    """The launchers of one training, a machine each; their output in files of FOLDER."""

    def __init__(self, name: str):
        self.name = name
        self.processes: list[subprocess.Popen] = []
        self.ended_s: dict[int, float] = {}  # when each machine's launcher had ended
        self.killed: list[int] = []  # machines whose launcher did not end by itself
        self.at_steps: list[cable.Traffic] = []  # the cable's counters after each step
        self.result: dict = {}  # the JSON line of process 0
        self.left = 0  # processes that the launchers left behind
        self.fault_s = 0.0  # when the fault was made

    def log(self, rank: int) -> Path:
        return FOLDER / f"{self.name}-node{rank}.log"

    def run(
        self, commands: list[list[str]], patience_s: float, fault_step: int, fault: Callable
    ) -> None:
        """Start a command a machine and wait for all of them.

        After step `fault_step` (0: none) `fault()` is called. What is still running `patience_s`
        after it, or after another machine's failure, is ended.
        """
        FOLDER.mkdir(parents=True, exist_ok=True)
        try:
            for rank, command in enumerate(commands):
                out = self.log(rank) if rank else subprocess.PIPE
                job = cable.on_machine(cable.NODES[rank], command)
                self.processes.append(jobs.start(cable.NODES[rank], job, out))
            reader = threading.Thread(target=self._read, args=(fault_step, fault), daemon=True)
            reader.start()
            self._wait(patience_s)
            reader.join(5)
            self.left = sum(len(cable.inhabitants(node)) for node in cable.NODES)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            stop(range(len(self.processes)), 5)

    def _read(self, fault_step: int, fault: Callable) -> None:
        """Machine 0's output, line by line: to its file, and the counters at every step."""
        with self.log(0).open("w", encoding="utf-8") as file:
            for line in self.processes[0].stdout:
                if STEP.match(line):
                    self.at_steps.append(cable.counted())
                    if len(self.at_steps) == fault_step:
                        fault()
                        self.fault_s = time.monotonic()
                elif line.startswith('{"script"'):
                    self.result = json.loads(line)
                file.write(line)
                file.flush()

    def _wait(self, patience_s: float) -> None:
        trouble_s = 0.0
        while len(self.ended_s) < len(self.processes):
            now = time.monotonic()
            for rank, process in enumerate(self.processes):
                if rank not in self.ended_s and process.poll() is not None:
                    self.ended_s[rank] = now
                    if process.returncode and not trouble_s:
                        trouble_s = now
            since = self.fault_s or trouble_s
            if since and now - since > patience_s:
                self.killed = [r for r in range(len(self.processes)) if r not in self.ended_s]
                stop(self.killed, 0)
            time.sleep(0.1)

    def codes(self) -> list[int]:
        """The launchers' exit codes, machine by machine."""
        return [process.returncode for process in self.processes]

    def refuse_failed(self) -> None:
        """Exit code 2 where a machine failed: with the reason of the one that failed first."""
        failed = [rank for rank, code in enumerate(self.codes()) if code]
        if failed:
            first = min(failed, key=lambda rank: self.ended_s[rank])
            log = self.log(first)
            code = self.codes()[first]
            where = f"{cable.NODES[first]} (exit code {code})"
            fail(f"{self.name}: {where}: {cause(log)} (whole log: {shown(log)})")


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


def settle() -> None:
    """The environment of all launchers: ours first on PATH, output at once, no shared record."""
    programs = Path(sys.executable).parent
    os.environ |= {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        # As many on one machine as on two: sums in another order would round differently.
        "OMP_NUM_THREADS": str(max(1, psutil.cpu_count() // 2)),
        # Their records are none of a reader's own trainings, and no evidence.
        "STORE": "",
        "RECORDS": str(FOLDER / "records"),
    }
    os.chdir(ROOT)


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
    }
    file = FOLDER / f"{name}.yaml"
    whole = OmegaConf.merge(settings, profile.finetune.args, here)
    file.write_text(OmegaConf.to_yaml(whole), encoding="utf-8")
    return shown(file)


def losses_of_llamafactory(name: str) -> list[float]:
    """The losses of its steps, unrounded, as it leaves them beside the adapter."""
    state = json.loads((FOLDER / name / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# -----------------------------------------------------------------------------
# Arithmetic


def numbers(file: Path) -> dict[str, int]:
    """{tensor: how many numbers} of a .safetensors file, by its header alone."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: math.prod(entry["shape"]) for name, entry in header.items()}
