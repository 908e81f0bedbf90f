"""What 01_train.py can do beside LoRA: configs/methods/NAME.yaml, the few settings that differ."""

import os
import shutil
from pathlib import Path

from lab import fail, models

FOLDER = Path(__file__).resolve().parent / "configs" / "methods"
BETWEEN_PROCESSES = ("ddp", "zero3", "fsdp")  # what else than ZeRO-2 joins several processes
# Of each line at most one at a time. full and freeze train no adapter.
APART = [BETWEEN_PROCESSES, ("pissa", "qlora"), ("pissa", "zero3")]
APART += [("full", "freeze", name) for name in ("dora", "loraplus", "pissa", "qlora", "rslora")]


def add_flags(parser, finetune) -> None:
    """--model and --method; `finetune` are the profile's values."""
    parser.add_argument(
        "--model", help=f"{models.MODEL_FLAG} (default: {finetune.model}, or the method's)"
    )
    parser.add_argument(
        "--method",
        default="",
        metavar="NAMES",
        help=f"what differs from LoRA: {', '.join(names())} (several between blanks)",
    )


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def chosen(text: str, several: bool) -> list[str]:
    """The methods named in `text`, between blanks; `several`: in several processes."""
    named = [name for name in text.split() if name != "lora"]  # which is the default
    for name in named:
        if name not in names():
            fail(f"there is no method {name}: configs/methods/ has {', '.join(names())}")
        if name in BETWEEN_PROCESSES and not several:
            fail(f'{name} needs several processes: make lf-train-z2 METHOD="{text}"')
    for line in APART:
        together = [name for name in line if name in named]
        if len(together) > 1:
            fail(f"{' and '.join(together)} exclude each other: take one of them")
    return named


def settings(named: list[str], finetune):
    """The settings of these methods, of later ones over earlier ones.

    `finetune` are the profile's values: those in its `methods` depend on the machine.
    """
    from omegaconf import OmegaConf

    layers = []
    for name in named:
        layers.append(OmegaConf.load(FOLDER / f"{name}.yaml"))
        layers.append(finetune.methods.get(name, {}))
    return OmegaConf.merge({}, *layers)


def folder(named: list[str], several: bool) -> str:
    """Name of the folder under runs/ that the training writes to: lora, dora, dora_z2, fsdp ..."""
    if several and not set(named) & set(BETWEEN_PROCESSES):
        return "_".join([*named, "z2"] if named else ["lora", "z2"])
    return "_".join(named) or "lora"


def keep_plain_adapter(output: Path) -> None:
    """The converted adapter in place of PiSSA's own, which belongs to a W that was changed.

    Every engine can add the converted one (of twice the rank) to W as it was.
    """
    converted = output / "pissa_converted"
    if not converted.is_dir():
        return
    for file in converted.iterdir():
        file.replace(output / file.name)
    for name in ("pissa_converted", "pissa_backup", "pissa_init"):
        shutil.rmtree(output / name, ignore_errors=True)


def environment(settings, device: str, processes: int) -> dict[str, str]:
    """What LLaMA-Factory reads from the environment; `processes` 0: one, without a launcher."""
    variables = {}
    if device == "cuda":
        variables["RECORD_VRAM"] = "1"  # the engine notes its peak in trainer_log.jsonl
    if processes:
        variables |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
    if processes and device == "cuda":
        variables["OPTIM_TORCH"] = "0"  # 1 would replace the profile's PYTORCH_ALLOC_CONF
    elif device == "cuda":  # of two cards it would use both
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    if settings.get("fsdp"):  # a whole adapter at the end, not a part of each process
        variables["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    return variables
