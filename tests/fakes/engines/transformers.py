"""Stand-in for transformers: a tokenizer that counts words; all else would compute."""

from pathlib import Path

import fake_road


class AutoTokenizer:
    @staticmethod
    def from_pretrained(folder, **_):
        assert Path(folder, "config.json").is_file(), f"{folder} holds no model"
        return lambda text: {"input_ids": text.split()}


def __getattr__(name: str):
    if not name.startswith("__"):
        fake_road.reached(f"transformers.{name}")
    raise AttributeError(name)
