"""Train a tiny model by methods of module 06, each in a process forked from this one.

    train_methods.py FOLDER '{"NAME": {SETTING: VALUE, ...}, ...}'

A NAME is methods of configs/methods/ between blanks, or lora; a setting "method" names them where
the NAME is another. It trains into FOLDER/NAME. Prints a line of JSON for each: {"name": ...,
"losses": [...], "steps": ..., "trained": ..., "gathered": ...}.
"""

import json
import os
import sys
from pathlib import Path

# What a training would import by itself is imported once, before the forks.
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from llamafactory.train.dpo import workflow as of_pairs  # noqa: F401
from llamafactory.train.sft import workflow  # noqa: F401
from llamafactory.train.tuner import run_exp
from omegaconf import OmegaConf
from transformers import TrainerCallback

from lab import ROOT
from lab.profile import load_profile
from lab.training import ONE_PROCESS

MODULE = ROOT / "modules/06_LLaMA-Factory"
RESULTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
torch.set_num_threads(1)


class Witness(TrainerCallback):
    """Of the model that is trained: how many numbers have a gradient, and with ZeRO-3 `gathered`.

    That is the share of layer 1's frozen weights that are whole when layer 0's backward has ended.
    """

    gathered = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        if not hasattr(next(model.parameters()), "ds_id"):
            return
        layers = {name[-8:]: module for name, module in model.named_modules()}
        frozen = [weight for weight in layers["layers.1"].parameters() if not weight.requires_grad]
        divided = [weight for weight in frozen if not weight.ds_persist]

        def look(*_):
            whole = [weight.ds_status.name == "AVAILABLE" for weight in divided]
            self.gathered = sum(whole) / len(whole)

        layers["layers.0"].register_full_backward_hook(look)

    def on_train_end(self, args, state, control, **kwargs):
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self.steps = state.global_step


def train(name: str, settings: dict, folder: Path, finetune) -> None:
    sys.path.insert(0, str(MODULE))
    import methods

    layers = [OmegaConf.load(MODULE / "configs/sft_lora.yaml"), finetune.args]
    named = settings.pop("method", name)
    layers.append(methods.settings([] if named == "lora" else named.split(), finetune))
    if named == "zero3":
        os.environ |= ONE_PROCESS
    merged = OmegaConf.merge(*layers, settings, {"output_dir": str(folder / name)})
    witness = Witness()
    run_exp(OmegaConf.to_container(merged), callbacks=[witness])
    told = {"losses": witness.losses, "steps": witness.steps, "trained": witness.trained}
    told["gathered"] = witness.gathered
    print(json.dumps({"name": name} | told), file=RESULTS, flush=True)


folder = Path(sys.argv[1])
finetune = load_profile().finetune
for name, settings in json.loads(sys.argv[2]).items():
    child = os.fork()
    if child == 0:
        train(name, settings, folder, finetune)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
