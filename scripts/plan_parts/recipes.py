"""This repository's own recipes, as questions to the planner: a GPU profile, modules/*/configs."""

import json
from pathlib import Path
from typing import NamedTuple

from lab import ROOT
from lab.planner.serving import Serving
from lab.planner.training import Training
from lab.profile import read_yaml
from plan_parts import TWO_4090S, Cards, Editing, Request, request

ACCELERATE = "modules/04_Accelerate/configs"
DEEPSPEED = "modules/05_DeepSpeed"
LLAMAFACTORY = "modules/06_LLaMA-Factory/configs"
ENGINES = {"MULTI_GPU": "ddp", "FSDP": "fsdp", "DEEPSPEED": "deepspeed"}  # by Accelerate's names
BUCKET = 5e8  # DeepSpeed's reduce_bucket_size, where a file has none


class Recipe(NamedTuple):
    """A command of this repository."""

    command: str  # what a reader types
    file: str  # where its values are written, seen from the repository root
    request: Request


def recipes(cards: Cards = TWO_4090S) -> list[Recipe]:
    """Every command that loads a model on these cards.

    One that needs more cards than there are is here too: its request says how many.
    """
    file = f"configs/profiles/{cards.profile}.yaml"
    profile = read_yaml(ROOT / file)
    return [
        *servers(cards, file, profile),
        *native_trainings(cards, file, profile),
        *accelerate_trainings(cards, profile),
        *deepspeed_trainings(cards, profile),
        *fine_tunings(cards, profile),
        chat(cards, profile),
        image_editing(cards, file, profile),
    ]


def read(file: str) -> dict:
    path = ROOT / file
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return read_yaml(path)


def files(folder: str) -> list[str]:
    """The YAML files of a folder, seen from the repository root."""
    paths: list[Path] = sorted((ROOT / folder).glob("*.yaml"))
    return [path.relative_to(ROOT).as_posix() for path in paths]


# -----------------------------------------------------------------------------
# 03: vLLM


def servers(cards: Cards, file: str, profile: dict) -> list[Recipe]:
    serve = profile["serve"]
    throughput = profile["throughput"]
    written = [
        Recipe("make vllm-serve", file, server(cards, profile, serve["model"], serve["args"])),
        Recipe(
            "make vllm-throughput",
            file,
            server(cards, profile, throughput["model"], throughput["args"]),
        ),
    ]
    for recipe_file in files("modules/03_vllm/configs/recipes"):
        command = f"make vllm-serve RECIPE={Path(recipe_file).stem}"
        recipe = read(recipe_file)
        model = recipe.pop("model", serve["model"])
        asked = server(cards, profile, model, serve["args"] | recipe)
        written.append(Recipe(command, recipe_file, asked))
    return written


def server(cards: Cards, profile: dict, model: str, flags: dict) -> Request:
    """A server with these flags, which have vLLM's own names."""
    tp = flags.get("tensor-parallel-size", 1)
    setup = Serving(
        gpus=max(profile["requires"]["gpus"], tp),
        gpu_memory_gib=cards.memory_gib,
        gpu_memory_utilization=flags.get("gpu-memory-utilization"),
        tp=tp,
        dtype=flags.get("quantization") or flags.get("dtype", "auto"),
        kv_dtype=flags.get("kv-cache-dtype", "auto"),
        max_model_len=flags.get("max-model-len"),
        max_num_seqs=flags.get("max-num-seqs", Serving.max_num_seqs),
        max_num_batched_tokens=flags.get("max-num-batched-tokens", Serving.max_num_batched_tokens),
        enforce_eager=bool(flags.get("enforce-eager")),
        language_model_only=bool(flags.get("language-model-only")),
    )
    return request(model, setup, cards)


# -----------------------------------------------------------------------------
# 04 and 05: one training, by every engine


def training(cards: Cards, profile: dict, model: str | None = None, **options) -> Request:
    """The profile's training with these options; of another model than its own, where one is."""
    train = profile["train"]
    steps = {name: train[name] for name in ("dtype", "micro_batch", "accumulate", "seq_len")}
    setup = Training(gpu_memory_gib=cards.memory_gib, **steps | options)
    return request(model or train["model"], setup, cards)


def native_trainings(cards: Cards, file: str, profile: dict) -> list[Recipe]:
    """One process makes up with two micro-steps for the other that it lacks."""
    return [
        Recipe("make train-one", file, training(cards, profile, gpus=1, accumulate=2)),
        Recipe("make train-ddp", file, training(cards, profile)),
    ]


def accelerate_trainings(cards: Cards, profile: dict) -> list[Recipe]:
    written = []
    for file in files(ACCELERATE):
        launcher = read(file)
        options = launched(launcher)
        asked = training(cards, profile, **options)
        written.append(Recipe(f"make train-accelerate CONFIG={Path(file).stem}", file, asked))
    return written


def launched(launcher: dict) -> dict:
    """What a launcher's YAML of Accelerate says of the engine, as fields of `Training`."""
    deepspeed = launcher.get("deepspeed_config", {})
    fsdp = launcher.get("fsdp_config", {})
    offloaded = [part for part in ("optimizer", "param") if moved(deepspeed, part)]
    if fsdp.get("fsdp_offload_params"):
        offloaded = ["optimizer", "param"]
    comes_divided = deepspeed.get("zero3_init_flag", True)
    return {
        "engine": ENGINES[launcher["distributed_type"]],
        "zero": deepspeed.get("zero_stage", 0),
        "offload": "+".join(offloaded) or "none",
        "load": None if comes_divided else "whole",
    }


def moved(deepspeed: dict, part: str) -> bool:
    """Whether Accelerate's deepspeed_config offloads this part, optimizer or param."""
    return deepspeed.get(f"offload_{part}_device", "none") != "none"


def divided(zero: dict) -> dict:
    """What DeepSpeed's zero_optimization says, as fields of `Training`."""
    offloaded = [part for part in ("optimizer", "param") if f"offload_{part}" in zero]
    first = zero.get(f"offload_{offloaded[0]}", {}) if offloaded else {}
    return {
        "engine": "deepspeed",
        "zero": zero["stage"],
        "offload": "+".join(offloaded) or "none",
        "offload_device": first.get("device", "cpu"),
        "pin_memory": first.get("pin_memory", True),
        "bucket": zero.get("reduce_bucket_size", BUCKET),
    }


def deepspeed_trainings(cards: Cards, profile: dict) -> list[Recipe]:
    """The stages that divide something train a larger model."""
    targets = {f"train-z{stage}": f"{DEEPSPEED}/configs/z{stage}.json" for stage in range(4)}
    targets["train-z2-offload"] = f"{DEEPSPEED}/ds_config.json"
    targets["train-z3-offload"] = f"{DEEPSPEED}/configs/z3-offload.json"
    small_host = f"{DEEPSPEED}/configs/z3-offload-64gb.json"
    targets["train-z3-offload CONFIG=z3-offload-64gb"] = small_host
    targets["train-z3-nvme"] = f"{DEEPSPEED}/configs/z3-nvme.json"
    written = []
    for target, file in targets.items():
        config = read(file)
        zero = config["zero_optimization"]
        options = divided(zero)
        options["checkpointing"] = target.startswith("train-z3-")  # the Makefile says it there
        if config["gradient_accumulation_steps"] != "auto":
            options["accumulate"] = config["gradient_accumulation_steps"]
        model = profile["zero"]["model"] if zero["stage"] else None
        written.append(Recipe(f"make {target}", file, training(cards, profile, model, **options)))
    return written


# -----------------------------------------------------------------------------
# 06: LLaMA-Factory. 02: Qwen-Image-Edit


# lab/planner knows neither few layers nor logits in parts; with FSDP, LLaMA-Factory puts the whole
# model on each card before it is divided.
NOT_PLANNED = ("freeze", "liger", "fsdp")
# Models beside the profile's by a method, and what has to change for them
LARGER = {
    "qlora": {
        "Qwen/Qwen2.5-14B-Instruct": {},
        "Qwen/Qwen2.5-32B-Instruct": {"per_device_train_batch_size": 1},
    },
    "zero3": {"Qwen/Qwen2.5-14B-Instruct": {}},
}


def fine_tunings(cards: Cards, profile: dict) -> list[Recipe]:
    one = read(f"{LLAMAFACTORY}/sft_lora.yaml")
    two = read(f"{LLAMAFACTORY}/sft_lora_z2.yaml")
    written = [
        fine_tuning(cards, "make lf-train", f"{LLAMAFACTORY}/sft_lora.yaml", one),
        fine_tuning(cards, "make lf-train-z2", f"{LLAMAFACTORY}/sft_lora_z2.yaml", two),
    ]
    for file in files(f"{LLAMAFACTORY}/methods"):
        name = Path(file).stem
        if name in NOT_PLANNED:
            continue
        changed = read(file) | profile["finetune"]["methods"].get(name, {})
        several = "deepspeed" in changed
        target = "lf-train-z2" if several else "lf-train"
        config = (two if several else one) | changed
        recipe = fine_tuning(cards, f"make {target} METHOD={name}", file, config)
        if recipe.request in (written[0].request, written[1].request):
            continue  # it needs as much: dora, packing ...
        written.append(recipe)
        for model, values in LARGER.get(name, {}).items():
            command = f"make {target} METHOD={name} MODEL={model.split('/')[1].lower()}"
            if values:
                command += ' ARGS="' + " ".join(f"{k}={v}" for k, v in values.items()) + '"'
            larger = config | {"model_name_or_path": model} | values
            written.append(fine_tuning(cards, command, file, larger))
    return written


def fine_tuning(cards: Cards, command: str, file: str, config: dict) -> Recipe:
    """What the planner is asked of LLaMA-Factory's settings `config`."""
    engine = {"gpus": 1}
    if config.get("deepspeed"):
        engine = divided(read(config["deepspeed"])["zero_optimization"]) | {"gpus": 2}
    elif "deepspeed" in config:  # null: plain data parallelism
        engine = {"gpus": 2}
    loss = config.get("pref_loss", config["stage"])
    setup = Training(
        **engine,
        gpu_memory_gib=cards.memory_gib,
        method="qlora" if config.get("quantization_bit") == 4 else config["finetuning_type"],
        loss="dpo" if loss == "sigmoid" else loss,
        seq_len=config["cutoff_len"],
        micro_batch=config["per_device_train_batch_size"],
        accumulate=config["gradient_accumulation_steps"],
        checkpointing=not config.get("disable_gradient_checkpointing"),
        lora_rank=config["lora_rank"],
    )
    return Recipe(command, file, request(config["model_name_or_path"], setup, cards))


def chat(cards: Cards, profile: dict) -> Recipe:
    file = f"{LLAMAFACTORY}/infer.yaml"
    config = read(file)
    setup = Serving(
        gpus=profile["requires"]["gpus"],
        gpu_memory_gib=cards.memory_gib,
        tp=1,
        dtype=config["infer_dtype"],
        max_model_len=4096,
    )
    return Recipe("make lf-chat", file, request(config["model_name_or_path"], setup, cards))


def image_editing(cards: Cards, file: str, profile: dict) -> Recipe:
    edit = profile["image_edit"]
    gpus = profile["requires"]["gpus"]
    setup = Editing(gpus, cards.memory_gib, edit["recipe"], edit["size"])
    return Recipe("make image-edit", file, request(edit["model"], setup, cards))
