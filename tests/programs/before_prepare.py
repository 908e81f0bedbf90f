"""On which devices a training script's model lies when it is handed to `prepare`.

    before_prepare.py SCRIPT [FLAG ...]      # prints a JSON list of devices, and goes no further

The Accelerator's device is made one on which nothing can have come by accident: "meta".
"""

import contextlib
import json
import os
import runpy
import sys

import torch
from accelerate import Accelerator


class Enough(Exception):
    pass


def stop_here(_, model, *others):
    print(json.dumps(sorted({str(weight.device) for weight in model.parameters()})), flush=True)
    raise Enough


Accelerator.device = property(lambda _: torch.device("meta"))
Accelerator.prepare = stop_here
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
with contextlib.suppress(Enough):
    runpy.run_path(sys.argv[0], run_name="__main__")
