"""Run launchers' commands whose processes are all forked from this one: torch is imported once.

    in_processes.py MODULE,MODULE '[["torchrun", "--nproc-per-node", "2", "SCRIPT", ...], ...]'

The MODULEs are imported first. A command is torchrun's, that of `accelerate launch`, which reads
its YAML and sets its variables, or "python", "SCRIPT", ...; NAME=VALUE may stand before it. Of each
it prints the last line of its first process; the first that fails ends it.
"""

import contextlib
import importlib
import io
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from lab import jobs
from lab.profile import load_profile

# What is printed there is a result; stdout itself becomes stderr, for engines log to it.
RESULTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def become(rank: int, script: str, arguments: list[str]) -> None:
    """This process runs the script; the first one prints its last line."""
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(script, run_name="__main__")
    if rank == 0:
        print(output.getvalue().splitlines()[-1], file=RESULTS, flush=True)


def join(rank: int, world: int, port: int) -> None:
    """What torchrun sets for a process: its number, where they meet, one thread."""
    import torch

    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (numbers | meet).items()})
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


def run(command, alone: bool = False) -> None:
    """In place of torch.distributed.run.run, which takes torchrun's parsed arguments."""
    world = int(command.nproc_per_node)
    port = jobs.free_port()
    children = set()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if not alone:
                join(rank, world, port)
            become(rank, command.training_script, command.training_script_args)
            sys.exit()
        children.add(child)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:  # they would wait for it
                os.kill(other, signal.SIGKILL)
    if failed:
        sys.exit(f"{command.training_script} failed")


def launch(launcher: str, *words: str) -> None:
    import torch.distributed.run as torchrun

    name = Path(launcher).name
    if name == "python":
        script, *arguments = words
        parts = {"training_script": script, "training_script_args": arguments}
        run(SimpleNamespace(nproc_per_node=1, **parts), alone=True)
    elif name == "torchrun":
        run(torchrun.get_args_parser().parse_args(words))
    else:
        from accelerate.commands.launch import launch_command, launch_command_parser

        torchrun.run = run
        launch_command(launch_command_parser().parse_args(words[1:]))


def main() -> None:
    modules, commands = sys.argv[1:]
    load_profile(check=False)
    for module in modules.split(","):
        importlib.import_module(module)
    environment = dict(os.environ)
    for command in json.loads(commands):
        while "=" in command[0]:
            name, _, value = command.pop(0).partition("=")
            os.environ[name] = value
        launch(*command)
        os.environ.clear()
        os.environ.update(environment)


main()
