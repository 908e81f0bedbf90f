"""What DeepSpeed would take in silence, or end with a traceback: one sentence, exit code 2.

It says nothing of a key that it does not know, of an optimizer's misspelt argument it says too
late, and "auto" it only knows where transformers has replaced it.
"""

import contextlib
import importlib.util
import json
import math
import os

import ds_keys
from ds_config import MONITORS, leaves

from lab import fail, machine

CHOOSES_ITSELF = {"zenflow", "leaf_module", "autotuning"}  # there DeepSpeed itself knows "auto"
# What only stage 3 reads, beside sub_group_size and stage3_*; as by default it is let pass.
# (deepspeed/runtime/engine.py, _configure_zero_optimizer; runtime/zero/partition_parameters.py)
OF_STAGE_3 = {
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    *("zero_quantized_gradients", "memory_efficient_linear", "override_module_apply"),
    *("pipeline_loading_checkpoint", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("save_muon_momentum_buffer_in_memory", "leaf_module"),
}
# Sections that do nothing in train.py: why, and what would.
WITHOUT_EFFECT = {
    # DeepSpeed keeps it for deepspeed.checkpointing.checkpoint, and a model of Hugging Face calls
    # torch's (deepspeed/runtime/activation_checkpointing/checkpointing.py, configure).
    "activation_checkpointing": "does nothing for a Hugging Face model: what recomputes "
    "activations is --checkpointing",
    "compile": "does nothing here: it waits for engine.compile(), which train.py does not call",
    "data_efficiency": "does nothing here: it chooses from the data that deepspeed.initialize is "
    "given, and train.py deals out its own",
    "pipeline": "does nothing here: it is for a PipelineModule, which no Hugging Face model is",
}
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
NUMBERS = ("lr", "betas", "eps", "weight_decay")  # of AdamW
DEEPSPEED_OWN = {"adagrad": "DeepSpeedCPUAdagrad", "lamb": "FusedLamb", "lion": "FusedLion"}


def refuse_flags(args, world: int) -> None:
    """One process, but to go on with what several have begun; an adapter of no rank."""
    if world < 2 and not args.resume:
        fail(
            f"ZeRO divides states over the processes and needs at least 2, here is {world}: "
            "make train-z2, or deepspeed --num_gpus=2 train.py ..."
        )
    if args.lora_rank is not None and args.lora_rank < 1:
        fail(f"--lora-rank is {args.lora_rank}: give a whole number above 0")


def check(config) -> None:
    """Everything that DeepSpeed would take in silence or end with a traceback."""
    refuse_auto(config)
    check_sections(config)
    check_optimizer(config)
    check_scheduler(config)
    check_types(config)
    check_keys(config)
    check_machine(config)
    note_without_effect(config)


def refuse_auto(config) -> None:
    clipping = config.values.get("gradient_clipping", 0)
    if type(clipping) not in (int, float) or not 0 <= clipping < math.inf:
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
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.config import CompileConfig, HybridEngineConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    monitors = DeepSpeedMonitorConfig.model_fields
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        **{name: monitors[name].annotation for name in MONITORS},
    }
    for name, model in models.items():
        try:
            model(**config.values.get(name, {}))
        except ValidationError as e:
            error = e.errors()[0]
            key = ".".join([name, *map(str, error["loc"])])
            if error["type"] == "extra_forbidden":
                fields = model.model_fields.items()
                known = {field for field, _ in fields} | {info.alias or "" for _, info in fields}
                known = ds_keys.alike(str(error["loc"][-1]), known) or ": take it out"
                config.refuse(f"DeepSpeed knows no {key}{known}")
            value = json.dumps(error["input"], default=str) if error["loc"] else "refused"
            config.refuse(f"{key} is {value}: {error['msg'].removeprefix('Value error, ')}")
    # stage3_max_live_parameters is max_live_parameters to the model, which takes both names.
    for key, field in DeepSpeedZeroConfig.model_fields.items():
        by_other_name = (field.alias or "").startswith("stage3_") and key in config.zero
        switched = key in OF_STAGE_3 and config.zero.get(key, field.default) != field.default
        if config.stage < 3 and (by_other_name or switched):
            config.refuse_without_effect(key, 3)
    offload = config.zero.get("offload_optimizer") or {}
    if config.stage < 3 and offload.get("super_offload"):
        config.refuse_without_effect("offload_optimizer.super_offload", 3)
    if config.zero.get("legacy_stage1"):
        config.refuse("zero_optimization.legacy_stage1 is gone from DeepSpeed: take it out")


def check_optimizer(config) -> None:
    """Its type, and the arguments that its class takes."""
    import inspect

    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    optimizer = config.values["optimizer"]
    kind = optimizer["type"]
    params = dict(optimizer["params"])
    betas = params.get("betas", [0, 0])
    if not isinstance(betas, list) or len(betas) != 2:
        right = "write two numbers, such as [0.9, 0.999]"
        config.refuse(f"optimizer.params.betas is {json.dumps(betas)}: {right}")
    if "max_grad_norm" in params:
        config.refuse("optimizer.params.max_grad_norm is gradient_clipping to DeepSpeed: move it")
    of_torch = [name for name, kind_ in vars(torch.optim).items() if isinstance(kind_, type)]
    if kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in of_torch:
        known = ds_keys.alike(kind, [*DEEPSPEED_OPTIMIZERS, *of_torch])
        config.refuse(f"there is no optimizer.type {kind}{known or ': write AdamW'}")
    if kind.lower() in ("adam", "adamw"):
        offloaded = any(config.offloads(key, "optimizer") for key in config.zero)
        own = DeepSpeedCPUAdam if offloaded else FusedAdam
        taken = torch.optim.AdamW if params.pop("torch_adam", False) else own
        for name in ("adam_w_mode", "fp32_optimizer_states"):  # DeepSpeed takes them out
            params.pop(name, None)
        numbers = {key: params[key] for key in NUMBERS if key in params}
        weight = torch.nn.Parameter(torch.zeros(1))
    elif kind in of_torch or kind.lower() in DEEPSPEED_OWN:
        taken = own_optimizer(kind.lower()) or getattr(torch.optim, kind)
        numbers = {}
        weight = None
    else:  # Muon sorts its arguments itself; mup is another package
        return
    if params.get("amsgrad") and taken.__module__.startswith("deepspeed"):
        config.refuse(f"{taken.__name__} has no amsgrad: take it out of optimizer.params")
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
        made = getattr(lr_schedules, kind)(optimizer, **scheduler.get("params", {}))
    except (TypeError, ValueError) as e:
        config.refuse(f"{kind} does not take scheduler.params as they are: {e}")
    warmup = scheduler.get("params", {}).get("warmup_type")
    if warmup and warmup != made.warmup_type:
        config.refuse(f"there is no warmup_type {json.dumps(warmup)}: write linear or log")


def check_types(config) -> None:
    """Names of types, by DeepSpeed's own list of them."""
    from deepspeed.runtime.config import DtypeEnum

    for section in ("data_types", "torch_autocast"):
        for key, value in config.values.get(section, {}).items():
            known = (
                value is None or isinstance(value, str) and value in DtypeEnum._value2member_map_
            )
            if key.endswith("dtype") and not known:
                config.refuse(f"{section}.{key} is {json.dumps(value)}: write bf16, fp16 or fp32")


def check_keys(config) -> None:
    """What DeepSpeed's own parser refuses, never asks for, or takes for something else."""
    import deepspeed

    settings = ds_keys.watched(config.values)
    with refusals_as_sentences(config, AttributeError, KeyError, deepspeed.DeepSpeedConfigError):
        try:
            deepspeed.DeepSpeedConfig(settings)
        finally:  # where the parser stumbles over a type, the key is named first
            ds_keys.refuse_other_types(config, settings)
    ds_keys.refuse_unread(config, settings)
    for key in ("steps_per_print", "gradient_predivide_factor"):
        if config.values.get(key) == 0:
            config.refuse(f"{key} is 0, by which DeepSpeed divides: take it out")


def check_machine(config) -> None:
    """What this environment, or train.py, cannot do."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    for name, package in PACKAGES.items():
        enabled = config.values.get(name, {}).get("enabled")
        if enabled and importlib.util.find_spec(package) is None:
            config.refuse(f"{name} is enabled, and there is no Python package {package} here")
    on_cpu = get_accelerator().device_name() == "cpu"
    if config.values.get("tensor_parallel", {}).get("autotp_size", 0) > 1:
        config.refuse("tensor_parallel wants equal data in its processes: train.py divides it")
    quantized = [key for key in config.zero if "_quantized_" in key and config.zero[key]]
    if quantized and (on_cpu or cpp_extension.CUDA_HOME is None):
        config.refuse(f"{quantized[0]} compiles kernels of CUDA: it needs a GPU, and nvcc")


def note_without_effect(config) -> None:
    """Sections that are right and do nothing, said once."""
    if os.environ.get("RANK", "0") == "0":
        for name, why in WITHOUT_EFFECT.items():
            if name in config.values:
                print(f"note: {name} in DeepSpeed's file {why}")


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
