"""Run a command that starts processes of its own (torchrun, deepspeed ...) so that it ends whole.

    python -m lab.launch NAME COMMAND [ARG ...]

The profile's environment is set; everything the command prints goes to stderr, except the script's
JSON result, which is the last line of stdout; Ctrl+C, `make stop` and the command's own end leave
no process behind. The exit code is the command's; where one of its processes refused its input with
an `error: ` sentence, that sentence is the last thing said and the exit code is 2.
"""

import signal
import subprocess
import sys
import threading

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
    need_cards(name, processes(command))
    command = by_card(command)
    if name in jobs.running():
        fail(f"{name} is running already: end it with 'make stop' first")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs
    result = ""
    refusal = ""
    try:
        process = jobs.start(name, command, subprocess.PIPE)
        # Workers of a killed torchrun compute on, and hold the output open that is read below.
        threading.Thread(target=lambda: (process.wait(), end(name)), daemon=True).start()
        for line in process.stdout:
            if line.startswith('{"script"'):
                result = line
            elif line.startswith("error: "):
                refusal = refusal or line[7:].strip()
            elif not refusal:  # what a launcher says of a process that refused is noise
                sys.stderr.write(line)
                sys.stderr.flush()
        code = process.wait()
    except KeyboardInterrupt:
        code = 130
    except FileNotFoundError:
        fail(
            f"no command {command[0]}: activate the environment first (source "
            ".venv/bin/activate, or conda activate videofen)"
        )
    finally:
        # A second signal must not cut this short: the command may be saving what it has done.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        end(name)
    if refusal and code != 0:
        fail(refusal)
    print(result, end="", flush=True)
    raise SystemExit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
