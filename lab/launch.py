"""Run a command that starts processes of its own (torchrun, deepspeed ...) so that it ends whole.

    python -m lab.launch NAME COMMAND [ARG ...]

The profile's environment is set; everything the command prints goes to stderr, except the script's
JSON result, which is the last line of stdout; Ctrl+C, `make stop` and the command's own end leave
no process behind. The exit code is the command's; where one of its processes refused its input with
an `error: ` sentence, that sentence is the last thing said and the exit code is 2. Where it fails,
the last thing said is why, and which state of the training is whole.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from lab import fail, jobs, machine
from lab.profile import load_profile, need_cards

# How many processes: the flag of torchrun, accelerate, deepspeed.
PROCESSES = ("--nproc-per-node", "--num_processes", "--num_gpus")


def processes(command: list[str]) -> int:
    """How many processes the launcher will start, on a card each; 0 where it does not say."""
    for flag, value in zip(command, command[1:], strict=False):
        if flag in PROCESSES:
            if not value.isdecimal() or int(value) < 1:
                fail(f"PROCESSES={value}: give a whole number above 0, or leave it out")
            return int(value)
    return 0


def by_card(command: list[str]) -> list[str]:
    """`command` with the visible cards named to DeepSpeed's launcher, where they are not the first.

    It drops CUDA_VISIBLE_DEVICES where it reads --num_gpus (deepspeed/launcher/runner.py).
    """
    cards = [gpu["index"] for gpu in machine.gpus()][: processes(command)]
    if command[0] != "deepspeed" or "--num_gpus" not in command or cards == list(range(len(cards))):
        return command
    place = command.index("--num_gpus")
    named = "localhost:" + ",".join(map(str, cards))
    return [*command[:place], "--include", named, *command[place + 2 :]]


class Output:
    """What a command prints: passed on to stderr, and what of it is to be said at the end."""

    def __init__(self):
        self.result = ""  # the script's JSON object
        self.refusal = ""  # the first `error: ` sentence
        self.saved = ""  # the last state that was saved or gone on from
        self.signals = set()  # that ended one of its processes
        self.exception = ""  # the message of the last one

    def read(self, line: str) -> None:
        if line.startswith(("going on after ", "no whole state ")):
            self.refusal = ""  # torchrun has started it again
        if line.startswith('{"script"'):
            self.result = line
        elif line.startswith("error: "):
            self.refusal = self.refusal or line[7:].strip()
        elif not self.refusal:  # what a launcher says of a process that refused is noise
            sys.stderr.write(line)
            sys.stderr.flush()
        if state := re.match(r"saved (step \d+ in .+)|going on after (step \d+), from (.+)", line):
            where = state[1] or f"{state[2]} in {Path(state[3]).parent}"
            self.saved = f"; {where} is whole: the same command with --resume goes on from there"
        # What torchrun and deepspeed's launcher say of a process that a signal ended.
        if number := re.search(r"(?:exitcode\s*:|return code =) -(\d+)", line):
            self.signals.add(signal.Signals(int(number[1])))
        if message := re.match(r"(?:\[rank\d+\]: *)?[\w.]+(?:Error|Exception): (.+)", line):
            self.exception = message[1][:300]

    def reason(self) -> str:
        """Why it failed, in a reader's terms."""
        if signal.SIGKILL in self.signals:
            return (
                "one of its processes was killed (SIGKILL); where nobody did that, the host's "
                "memory was full: `dmesg | grep -i oom`"
            )
        if self.signals:
            return f"one of its processes was ended by {self.signals.pop().name}"
        return self.exception or "see above"


def with_free_port(command: list[str]) -> list[str]:
    """`command` with another port for DeepSpeed's launcher, where its own is taken.

    Every one of its trainings meets at 29500; torchrun and Accelerate's YAML here ask for any port.
    """
    if command[0] != "deepspeed" or "--master_port" in command or not jobs.port_taken(29500):
        return command
    return [command[0], "--master_port", str(jobs.free_port()), *command[1:]]


def end(name: str) -> None:
    """End what lives of the job."""
    job = jobs.running().get(name)
    if job:
        jobs.stop(job)


def main() -> None:
    if len(sys.argv) < 3:
        fail("usage: python -m lab.launch NAME COMMAND [ARG ...]")
    name = sys.argv[1]
    command = sys.argv[2:]
    # The command's own processes check; who started it may have left them one GPU of two.
    load_profile(check=False)
    # torch 2.13 keeps one store over torchrun's restarts, and new workers read the old addresses.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    need_cards(name, processes(command))
    command = with_free_port(by_card(command))
    if name in jobs.running():
        fail(f"{name} is running already: end it with 'make stop' first")
    ended_by = 0

    def end_it(number, _) -> None:
        """Pass it on, and go on reading: a training that is told to end saves its state first."""
        nonlocal ended_by
        if not ended_by:  # a second one would cut the saving short
            ended_by = number
            threading.Thread(target=end, args=[name], daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, end_it)
    output = Output()
    try:
        process = jobs.start(name, command, subprocess.PIPE)
        # Workers of a killed torchrun compute on, and hold the output open that is read below.
        threading.Thread(target=lambda: (process.wait(), end(name)), daemon=True).start()
        for line in process.stdout:
            output.read(line)
        code = process.wait()
    except FileNotFoundError:
        fail(
            f"no command {command[0]}: activate the environment first (source "
            ".venv/bin/activate, or conda activate videofen)"
        )
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end(name)
    if ended_by:
        code = 128 + ended_by
        print(f"{name} was ended by {signal.Signals(ended_by).name}{output.saved}", file=sys.stderr)
    elif output.refusal and code != 0:
        fail(output.refusal)
    elif code != 0:
        print(f"{name} failed: {output.reason()}{output.saved}", file=sys.stderr)
    print(output.result, end="", flush=True)
    raise SystemExit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
