"""Under the deepspeed launcher: run scripts one after another in the same processes.

    deepspeed --num_gpus=2 in_turn.py '[["SCRIPT", "ARGUMENT", ...], ...]'

torch and the model's classes are imported once, the processes meet once for all scripts. Of each
script the first process prints the last line of its output, its result; the first that fails ends
it.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import sys

import torch.distributed


def main() -> None:
    *of_the_launcher, runs = sys.argv[1:]
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None
    environment = dict(os.environ)
    for script, *arguments in json.loads(runs):
        sys.argv = [script, *of_the_launcher, *arguments]
        sys.path[0] = os.path.dirname(script)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            runpy.run_path(script, run_name="__main__")
        for line in output.getvalue().splitlines()[-1:]:
            print(line, flush=True)
        os.environ.clear()
        os.environ.update(environment)
    gc.collect()  # engines before the process group
    leave()


main()
