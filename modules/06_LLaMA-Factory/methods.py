"""What 01_train.py can do beside LoRA: configs/methods/NAME.yaml, the few settings that differ."""

from pathlib import Path

from lab import fail

FOLDER = Path(__file__).resolve().parent / "configs" / "methods"
BETWEEN_PROCESSES = ("ddp", "zero3", "fsdp")  # what else than ZeRO-2 joins several processes


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def chosen(text: str, several: bool) -> list[str]:
    """The methods named in `text`, between blanks; `several`: in several processes."""
    named = text.split()
    for name in named:
        if name not in names():
            fail(f"there is no method {name}: configs/methods/ has {', '.join(names())}")
        if name in BETWEEN_PROCESSES and not several:
            fail(f'{name} needs several processes: make lf-train-z2 METHOD="{text}"')
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
