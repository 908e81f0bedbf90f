"""LLaMA-Factory's own trainings one after the other, in one process that imports it once.

    llamafactory_trainings.py SETTINGS.yaml ...

What the engine prints of each goes to SETTINGS.log. Where transformers' own processor of pictures
cannot be had (it wants torchvision, which the CPU's lock does not have), module 02's is taken.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

import yaml
from llamafactory.model import loader
from llamafactory.train.tuner import run_exp
from transformers import AutoProcessor, AutoTokenizer

sys.path.insert(0, "modules/02_qwen_image_edit")
from processor import PilProcessor  # noqa: E402


class Processor(PilProcessor):
    @classmethod
    def from_pretrained(cls, folder: str, **_):
        if not (Path(folder) / "preprocessor_config.json").is_file():
            return None
        return cls(folder, AutoTokenizer.from_pretrained(folder))

    def save_pretrained(self, folder: str) -> None:
        self.image_processor.save_pretrained(folder)


if not importlib.util.find_spec("torchvision"):
    loader.AutoProcessor = Processor
assert AutoProcessor is not Processor
for file in map(Path, sys.argv[1:]):
    settings = yaml.safe_load(file.read_text())
    with file.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        run_exp(settings)
