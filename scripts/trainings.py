"""The records of modules 04's and 05's trainings, as the planner's model and `Training`."""

from typing import NamedTuple

from lab import models
from lab.planner import speed, weights
from lab.planner.config import Model, read
from lab.planner.training import Training


class Made(NamedTuple):
    """How a record is made, and by which engine."""

    command: str
    engine: str
    zero: int = 0


ACCELERATE = "make train-accelerate"
MADE = {
    "04_Accelerate/01_train_ddp-one": Made("make train-one", "ddp"),
    "04_Accelerate/01_train_ddp": Made("make train-ddp", "ddp"),
    "04_Accelerate/02_train_accelerate": Made(ACCELERATE, "ddp"),
    "04_Accelerate/02_train_accelerate-fsdp": Made(f"{ACCELERATE} CONFIG=fsdp", "fsdp"),
    "04_Accelerate/02_train_accelerate-deepspeed": Made(
        f"{ACCELERATE} CONFIG=deepspeed_zero2", "deepspeed", 2
    ),
    "05_DeepSpeed/train-z0": Made("make train-z0", "deepspeed", 0),
    "05_DeepSpeed/train-z1": Made("make train-z1", "deepspeed", 1),
    "05_DeepSpeed/train-z2": Made("make train-z2", "deepspeed", 2),
    "05_DeepSpeed/train-z3": Made("make train-z3", "deepspeed", 3),
    "05_DeepSpeed/train-z2-offload": Made("make train-z2-offload", "deepspeed", 2),
    "05_DeepSpeed/train-z3-offload": Made("make train-z3-offload", "deepspeed", 3),
    "05_DeepSpeed/train-z2-lora": Made("make train-z2", "deepspeed", 2),
    "05_DeepSpeed/train-z3-lora": Made("make train-z3", "deepspeed", 3),
}


def model_of(record: dict) -> Model:
    """The model that it is named after, or else the one with as many parameters."""
    configs = {
        name: entry["config"] for name, entry in models.catalogue().items() if "config" in entry
    }
    for name, config in configs.items():
        if name.removesuffix("-instruct") in record["config"]["model"].lower():
            return read(config, name)
    count = record["metrics"]["parameters_count"]
    every = (read(config, name) for name, config in configs.items())
    return next(model for model in every if weights.parameters(model) == count)


def command_of(record: dict) -> str:
    """How to make a record of MADE again, but for its model and lengths."""
    config = record["config"]
    command = MADE[record["script"]].command
    if config.get("deepspeed", "").endswith("z3-offload-64gb.json"):
        command += " CONFIG=z3-offload-64gb"
    if config.get("lora_rank"):
        flags = f"--lora-rank {config['lora_rank']}" + " --checkpointing" * config["checkpointing"]
        command += f' ARGS="{flags}"'
    return command


def training_of(record: dict) -> Training:
    """What was asked for in a record of MADE."""
    made = MADE[record["script"]]
    config = record["config"]
    metrics = record["metrics"]
    mixed = {"bf16": "bfloat16", "no": "float32"}.get(config.get("mixed_precision"))
    rank = config.get("lora_rank")
    zero = config.get("deepspeed_config", {}).get("zero_optimization", {})
    offloaded = [part for part in ("optimizer", "param") if zero.get(f"offload_{part}")]
    first = zero.get("offload_optimizer") or {}
    return Training(
        gpus=metrics["world_size"],
        engine=made.engine,
        zero=made.zero,
        dtype=metrics.get("dtype", mixed),
        method="lora" if rank else "full",
        lora_rank=rank or Training.lora_rank,
        micro_batch=config["micro_batch"],
        seq_len=config["seq_len"],
        accumulate=config["accumulate"],
        offload="+".join(offloaded) or "none",
        pin_memory=first.get("pin_memory", True),
        checkpointing=config.get("checkpointing", False),
    )


def sent_bytes(record: dict) -> float:
    """Bytes that each process sends in a step, over a ring."""
    setup = training_of(record)
    share = (setup.gpus - 1) / setup.gpus
    total = 0.0
    for kind, size, times in speed.train_messages(model_of(record), setup):
        trips = 2 if kind == "all_reduce" else 1
        total += trips * times * share * size
    return total
