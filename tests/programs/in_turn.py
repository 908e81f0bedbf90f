"""Run scripts one after another in this process: torch and the model's classes are imported once.

    in_turn.py '[["SCRIPT", "ARGUMENT", ...], ...]'

Of each script it prints the last line of its output, its result; the first that fails ends it.
Under the deepspeed launcher each process does so, the processes meet once for all scripts, and the
first one prints.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import sys


def forget_accelerate() -> None:
    """Its states are shared by the whole process: the next script chooses anew."""
    if "accelerate" in sys.modules:
        from accelerate import state

        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def main() -> None:
    *of_the_launcher, runs = sys.argv[1:]
    if of_the_launcher:
        import torch.distributed

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
        forget_accelerate()
        os.environ.clear()
        os.environ.update(environment)
    if of_the_launcher:
        gc.collect()  # engines before the process group
        leave()


main()
