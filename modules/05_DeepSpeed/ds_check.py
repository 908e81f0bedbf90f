"""What DeepSpeed would take in silence, or end with a traceback: one sentence, exit code 2.

It says nothing of a key that it does not know, of an optimizer's misspelt argument it says too
late, and "auto" it only knows where transformers has replaced it.
"""

import contextlib
import difflib
import json
import os

from ds_config import MONITORS, leaves

from lab import machine

# Keys in LLaMA-Factory's examples that no DeepSpeed reads; they stand for nothing.
HARMLESS = {"comms_config", "monitor_config"}
CHOOSES_ITSELF = {"zenflow", "leaf_module", "autotuning"}  # there DeepSpeed itself knows "auto"
# Sections that DeepSpeed reads key by key, and says nothing of the others.
READ_BY_KEY = ("optimizer", "scheduler", "aio")
DEEPSPEED_OWN = {"adagrad": "DeepSpeedCPUAdagrad", "lamb": "FusedLamb", "lion": "FusedLion"}


class Asked(dict):
    """A dictionary that remembers which of its keys somebody asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked = set()  # copy.copy, which DeepSpeed makes, shares it

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def alike(name: str, known) -> str:
    """`, did you mean ...?` where a known name is much like this one."""
    names = {other.lower(): other for other in known}
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.75)
    return f": did you mean {names[nearest[0]]}?" if nearest else ""


def check(config) -> None:
    """Everything that DeepSpeed would take in silence or end with a traceback."""
    refuse_auto(config)
    check_sections(config)
    check_optimizer(config)
    check_scheduler(config)
    check_keys(config)
    note_checkpointing(config)


def refuse_auto(config) -> None:
    clipping = config.values.get("gradient_clipping", 0)
    if type(clipping) not in (int, float) or clipping < 0:
        right = "write a number, 0 for none"
        config.refuse(f"gradient_clipping is {json.dumps(clipping)}: {right}")
    for path, value in leaves(config.values):
        if value == "auto" and not (CHOOSES_ITSELF | MONITORS) & set(path):
            config.refuse(
                f'{".".join(path)} is "auto", which nobody fills: write a value, or take it '
                "out for DeepSpeed's default"
            )


def check_sections(config) -> None:
    """Types and ranges, by DeepSpeed's own pydantic models."""
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
    }
    for name, model in models.items():
        try:
            model(**config.values[name])
        except ValidationError as e:
            error = e.errors()[0]
            key = ".".join([name, *map(str, error["loc"])])
            if error["type"] == "extra_forbidden":
                fields = model.model_fields.items()
                known = {field for field, _ in fields} | {info.alias or "" for _, info in fields}
                known = alike(str(error["loc"][-1]), known) or ": take it out"
                config.refuse(f"DeepSpeed knows no {key}{known}")
            value = json.dumps(error["input"], default=str) if error["loc"] else "refused"
            config.refuse(f"{key} is {value}: {error['msg'].removeprefix('Value error, ')}")
    # stage3_max_live_parameters is max_live_parameters to the model, which takes both names.
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        of_stage_3 = (field.alias or "").startswith("stage3_")
        if of_stage_3 and key in config.zero and config.stage < 3:
            config.refuse_without_effect(key, 3)


def check_optimizer(config) -> None:
    """Its type, and the arguments that its class takes."""
    import inspect

    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    optimizer = config.values["optimizer"]
    kind = optimizer["type"]
    params = dict(optimizer["params"])
    of_torch = [name for name, kind_ in vars(torch.optim).items() if isinstance(kind_, type)]
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in of_torch:
        known = alike(kind, [*DEEPSPEED_OPTIMIZERS, *of_torch])
        config.refuse(f"there is no optimizer.type {kind}{known or ': write AdamW'}")
    if kind.lower() in ("adam", "adamw"):
        offloaded = any(config.offloads(key, "optimizer") for key in config.zero)
        own = DeepSpeedCPUAdam if offloaded else FusedAdam
        taken = torch.optim.AdamW if params.pop("torch_adam", False) else own
        for name in ("adam_w_mode", "fp32_optimizer_states"):  # DeepSpeed takes them out
            params.pop(name, None)
        numbers = {key: params[key] for key in ("lr", "betas", "eps") if key in params}
        weight = torch.nn.Parameter(torch.zeros(1))
    elif kind in of_torch or kind.lower() in DEEPSPEED_OWN:
        taken = own_optimizer(kind.lower()) or getattr(torch.optim, kind)
        numbers = {}
        weight = None
    else:  # Muon sorts its arguments itself; mup is another package
        return
    try:
        inspect.signature(taken).bind([], **params)
        if numbers:  # PyTorch says which of them is out of range
            torch.optim.AdamW([weight], **numbers)
    except (TypeError, ValueError, IndexError) as e:
        config.refuse(f"{taken.__name__} does not take optimizer.params as they are: {e}")


def own_optimizer(kind: str) -> type | None:
    """DeepSpeed's class of this name, of those that take their arguments as they come."""
    name = DEEPSPEED_OWN.get(kind)
    if name is None:
        return None
    import importlib

    return getattr(importlib.import_module(f"deepspeed.ops.{kind}"), name)


def check_scheduler(config) -> None:
    """Its type, and its arguments, by making one."""
    import torch
    from deepspeed.runtime import lr_schedules

    scheduler = config.values.get("scheduler")
    if scheduler is None:
        return
    kind = scheduler.get("type")
    if kind not in lr_schedules.VALID_LR_SCHEDULES:
        known = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        config.refuse(f"scheduler.type is {json.dumps(kind)}: choose one of {known}")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        getattr(lr_schedules, kind)(optimizer, **scheduler.get("params", {}))
    except (TypeError, ValueError) as e:
        config.refuse(f"{kind} does not take scheduler.params as they are: {e}")


def check_keys(config) -> None:
    """Refuse keys that DeepSpeed's own parser never asks for, and what that parser refuses."""
    import deepspeed

    whole = {key: value for key, value in config.values.items() if key != "train_batch_size"}
    parts = {name: Asked(whole[name]) for name in READ_BY_KEY if name in whole}
    settings = Asked(whole | parts)
    with refusals_as_sentences(config, AttributeError, KeyError, deepspeed.DeepSpeedConfigError):
        deepspeed.DeepSpeedConfig(settings)
    unread = [key for key in settings if key not in settings.asked | HARMLESS and key[:1] != "_"]
    known_keys = set(settings.asked)
    for name, part in parts.items():
        unread += [f"{name}.{key}" for key in part if key not in part.asked]
        known_keys |= {f"{name}.{key}" for key in part.asked}
    if unread:
        known = alike(unread[0], known_keys) or ": correct the name, or take it out"
        config.refuse(f"DeepSpeed never reads {', '.join(unread)}{known}")


def note_checkpointing(config) -> None:
    """DeepSpeed keeps this section for deepspeed.checkpointing.checkpoint.

    A model of Hugging Face calls torch's checkpoint, and nothing in the engine reads the section
    (deepspeed/runtime/activation_checkpointing/checkpointing.py, configure).
    """
    if "activation_checkpointing" in config.values and os.environ.get("RANK", "0") == "0":
        print(
            "note: activation_checkpointing in DeepSpeed's file does nothing for a Hugging Face "
            "model: what recomputes activations is --checkpointing"
        )


@contextlib.contextmanager
def refusals_as_sentences(config, *also: type[Exception]):
    """What DeepSpeed's parser or its engine refuses, by these exceptions or those in `also`."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    kinds = (AssertionError, NotImplementedError, TypeError, ValueError, ZeRORuntimeException)
    try:
        yield
    except (*kinds, *also) as e:
        config.refuse(f"DeepSpeed refuses it: {' '.join(str(e).split())}")


def refuse_type(config) -> None:
    """A type that DeepSpeed does not compute with on this device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if config.dtype == "float16" and not accelerator.is_fp16_supported():
        config.refuse(
            f"fp16 is enabled, and DeepSpeed does not compute with it on this "
            f'{accelerator.device_name()} (a CPU needs AVX512-FP16): write "auto", or use bf16'
        )
    if config.dtype == "bfloat16" and not accelerator.is_bf16_supported():
        config.refuse(f'this {accelerator.device_name()} has no bf16: write "auto", or use fp16')
    slow = accelerator.device_name() == "cpu" and not machine.fast_bfloat16()
    if config.dtype == "bfloat16" and slow and os.environ.get("RANK", "0") == "0":
        print(
            'note: this CPU has no instructions for bf16, a step can take minutes; "auto" in the '
            "place of true computes in float32"
        )
