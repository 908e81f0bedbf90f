"""Run scripts as several processes each, all forked from this one: torch is imported once.

    in_processes.py '[[2, "SCRIPT", "ARGUMENT", ...], [4, "SCRIPT", ...]]'

The number is that of the processes, which meet as under torchrun. Of each script it prints the
last line of its first process; the first that fails ends it.
"""

import contextlib
import io
import json
import os
import runpy
import socket
import sys

from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM  # noqa: F401


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(rank: int, world: int, port: int, script: str, arguments: list[str]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (numbers | meet).items()})
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(script, run_name="__main__")
    if rank == 0:
        print(output.getvalue().splitlines()[-1], flush=True)


def main() -> None:
    for world, script, *arguments in json.loads(sys.argv[1]):
        port = free_port()
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                become(rank, world, port, script, arguments)
                return
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"{script} failed")


main()
