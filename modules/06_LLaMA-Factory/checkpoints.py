"""Which checkpoint of a training is whole, as transformers' Trainer and DeepSpeed write them.

The Trainer writes weights, optimizer, schedule and random states into checkpoint-N one after the
other, and trainer_state.json last (transformers/trainer.py, _save_checkpoint), in place: a training
that was killed, or whose disk was full, leaves a folder that has the name but not all of the files.
"""

import json
import os
import zipfile
from pathlib import Path

from lab import shown

SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers/trainer_jit_checkpoint.py, while saving


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the one of the highest step first."""
    names = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(names, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_whole(folder: Path, run: dict) -> tuple[Path | None, dict[Path, str]]:
    """The whole checkpoint of the highest step, and why each above it is not: {folder: reason}.

    `run` is what unfinished.identity gives: it says which files there must be.
    """
    broken = {}
    for checkpoint in numbered(folder):
        reason = lacking(checkpoint, run)
        if not reason:
            return checkpoint, broken
        broken[checkpoint] = reason
    return None, broken


def lacking(checkpoint: Path, run: dict) -> str:
    """What makes the checkpoint not whole; "" where nothing does."""
    if (checkpoint / SENTINEL).is_file():
        return "the training ended while it was saved"
    names = ["trainer_state.json", *weights(checkpoint, run), *random_states(run["processes"])]
    if run.get("deepspeed") is not None:
        step = f"global_step{step_of(checkpoint)}"
        states = range(run["processes"])
        names += [f"{step}/*_rank_{rank}_mp_rank_00_optim_states.pt" for rank in states]
        names += ["latest", f"{step}/*mp_rank_00_model_states.pt"]
    else:
        names += ["optimizer.pt", "scheduler.pt"]
    for name in names:
        files = list(checkpoint.glob(name))
        if not files:
            return f"{name} is missing"
        for file in files:
            if reason := damage(file):
                return f"{file.relative_to(checkpoint)} {reason}"
    return ""


def weights(checkpoint: Path, run: dict) -> list[str]:
    """The files that hold the model: an adapter, or all weights in one file or in several."""
    if run.get("finetuning_type") in ("lora", "oft"):
        return ["adapter_config.json", "adapter_model.safetensors"]
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        return ["config.json", "model.safetensors"]
    if damage(index):
        return ["config.json", index.name]
    return ["config.json", *sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def random_states(processes: int) -> list[str]:
    if processes == 1:
        return ["rng_state.pth"]
    return [f"rng_state_{rank}.pth" for rank in range(processes)]


def damage(file: Path) -> str:
    """What is wrong with the file, by its own format; "" where nothing is.

    safetensors compares the file's length with what its header promises; an archive of torch.save
    is a zip file with a checksum of each tensor.
    """
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as e:
            return f"cannot be read: {e}"
    elif file.suffix in (".pt", ".pth"):
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, OSError, EOFError):
            return "is cut short"
        return f"has damaged bytes in {bad}" if bad else ""
    elif file.suffix == ".json":
        try:
            content = json.loads(file.read_text())
        except ValueError:
            return "is cut short"
        if file.name == "trainer_state.json" and content["global_step"] != step_of(file.parent):
            return f"is of step {content['global_step']}"
    elif file.name == "latest":
        tag = file.read_text()
        return "" if tag == f"global_step{step_of(file.parent)}" else f"names {tag or 'nothing'}"
    return ""


def misfit(adapter: Path, base: Path | None) -> str:
    """Why the adapter's weights are broken or of another model; "" where they fit, by their shapes.

    `base` is the folder of the model, None where it is not known.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return f"there is no {shown(file)}: train again"
    if reason := damage(file):
        return f"{shown(file)} {reason}"
    weights = {}
    for part in base.glob("*.safetensors") if base else ():
        weights |= {} if damage(part) else shapes(part)
    for name, shape in shapes(file).items():
        # lora_A is [rank, in] and lora_B [out, rank], beside a weight of [out, in].
        layer, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        axis = {"A.weight": 1, "B.weight": 0}.get(matrix)
        there = weights.get(f"{layer}.weight")
        if there and axis is not None and there[axis] != shape[axis]:
            return (
                f"the adapter in {shown(adapter)} is of another model than {shown(base)}: "
                f"its {layer} is for {shape[axis]} values, the model's has {there[axis]}"
            )
    return ""


def shapes(file: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a safetensors file, by its header."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}


def date_by_step(folder: Path) -> None:
    """Date each checkpoint by its step, in seconds after 1970.

    The Trainer keeps the `save_total_limit` folders of the latest date: after the clock has jumped
    back it would remove each new one. What it is just writing has today's date, the latest.
    """
    for checkpoint in numbered(folder):
        step = step_of(checkpoint)
        try:
            os.utime(checkpoint, (step, step))
        except FileNotFoundError:  # the Trainer has just removed it
            continue
