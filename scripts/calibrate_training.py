"""A training that is measured, on random tokens: the peak of each part of a step, then its time.

scripts/calibrate.py runs `worker` in one process, or in one for each card by torchrun.
"""

import json
import os
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

from plan_parts import Request

from lab import ROOT, machine, models
from lab.planner.training import Training

STEPS = 3  # from the second step on, the optimizer's states exist
TIMED = 5  # steps more, of which nothing but the time is measured


class Engine(NamedTuple):
    """A model ready to be trained, and the two steps that engines do differently."""

    forward: Callable  # of the token ids; .loss
    backward: Callable  # of the loss, once a micro-step
    end_micro_step: Callable  # DeepSpeed counts the micro-steps itself ...
    end_step: Callable  # ... the others step when told to


def worker(request: Request) -> None:
    """One process of a training: prints {part of a step: GiB at its peak, step_ms: its time}.

    Of all processes the most.
    """
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig

    setup = request.setup
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if machine.gpus():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    config = AutoConfig.for_model(**models.config(request.model))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if setup.engine == "deepspeed":
        engine = deepspeed_engine(setup, config, device, backend)
    else:
        if world > 1:
            dist.init_process_group(backend)
        engine = torch_engine(setup, config, device, world)

    measured = measured_steps(setup, engine, config, device)
    everyone = [measured]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, measured)
    if rank == 0:
        most = {name: round(max(each[name] for each in everyone), 3) for name in measured}
        most["host_gib"] = round(sum(each["host_gib"] for each in everyone), 2)
        print("measured " + json.dumps(most), flush=True)
    if world > 1:
        dist.barrier()
        os._exit(0)  # gloo's threads can abort an orderly end, and there is nothing left to keep


def measured_steps(setup: Training, engine: Engine, config, device) -> dict[str, float]:
    """{part of a step: GiB at its peak, ..., step_ms: a step's time} of this process.

    On a CPU no memory but the host's.
    """
    import torch

    autocast = setup.engine == "ddp" and setup.dtype == "bfloat16"
    measured: dict[str, float] = {}

    def lap(part: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            measured[f"{part}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()

    def step(lap: Callable) -> None:
        for _ in range(setup.accumulate):
            inputs = random_inputs(setup, config, device)
            lap("between")
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = engine.forward(**inputs, use_cache=False).loss
            lap("forward")
            engine.backward(loss)
            lap("backward")
            engine.end_micro_step()
        engine.end_step()
        lap("step")

    for _ in range(STEPS):
        step(lap)
    measured["peak_gib"] = max(measured.values(), default=0.0)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["context_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    measured["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    began = time.perf_counter()
    for _ in range(TIMED):
        step(nothing)
    if device.type == "cuda":
        torch.cuda.synchronize()
    measured["step_ms"] = 1e3 * (time.perf_counter() - began) / TIMED
    return measured


def random_inputs(setup: Training, config, device) -> dict:
    """Random tokens; of Qwen's vision-language models also one picture a sequence."""
    import torch

    vocabulary = config.get_text_config().vocab_size
    shape = (setup.micro_batch, setup.seq_len)
    ids = torch.randint(0, vocabulary, shape, device=device)
    if not setup.image_tokens:
        return {"input_ids": ids, "labels": ids}
    vision = config.vision_config
    merged = vision.spatial_merge_size  # patches of a side that become one token
    rows = torch.tensor([1, merged, merged * setup.image_tokens], device=device)
    grid = rows.repeat(setup.micro_batch, 1)  # frames, rows and columns of patches
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), patch, device=device)
    # No token of a picture but in its place.
    ids[ids >= vocabulary - 1000] = 0
    ids[:, 1 : 1 + setup.image_tokens] = config.image_token_id
    return {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


# -----------------------------------------------------------------------------
# A model with random weights


def model_class(config):
    """The class that trains this config: one for text, another where pictures are read too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    reads_pictures = hasattr(config, "vision_config")
    return AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM


def prepared(model, setup: Training):
    """The model with the line's checkpointing and adapters; a vision tower is frozen."""
    reads_pictures = hasattr(model.config, "vision_config")
    if setup.checkpointing and reads_pictures:
        checkpoint_as_llamafactory(model)
    elif setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if setup.method != "full":
        from peft import LoraConfig, get_peft_model

        adapted = r".*language_model\..*_proj" if reads_pictures else "all-linear"
        lora = LoraConfig(r=setup.lora_rank, target_modules=adapted, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model.train()


def checkpoint_as_llamafactory(model) -> None:
    """Only blocks with trained weights, so no frozen tower (lab/planner/tower.py)."""
    from llamafactory.hparams import ModelArguments
    from llamafactory.model.model_utils.checkpointing import prepare_model_for_training

    prepare_model_for_training(model, ModelArguments(model_name_or_path="random weights"))


def random_model(setup: Training, config, device, dtype):
    """All of it at once, as DeepSpeed takes it; ZeRO-3 divides each weight as it is made."""
    import torch

    torch.manual_seed(0)
    with device:
        model = model_class(config).from_config(config, dtype=dtype)
    if setup.method == "qlora":
        pack(model.get_decoder().layers, device)
    return prepared(model, setup)


def model_in_pieces(setup: Training, config, device, dtype, divide: Callable):
    """Layer by layer: made, packed and given to `divide`, so that no card holds all of it."""
    import torch
    from accelerate import init_empty_weights

    torch.manual_seed(0)
    with init_empty_weights():  # parameters without memory; buffers are real
        model = model_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    layers = model.get_decoder().layers
    model = prepared(model, setup)
    for layer in layers:
        fill(layer, device)
        if setup.method == "qlora":
            pack(layer, device)
        divide(layer)
    fill(model, device)
    divide(model)
    return model


def fill(module, device) -> None:
    """Give random values to the parameters below `module` that have no memory yet.

    Trained ones are made in fp32, as PyTorch's engines hold them.
    """
    import torch

    made: dict[int, torch.nn.Parameter] = {}  # a tied parameter has two owners
    for owner in module.modules():
        for name, empty in list(owner._parameters.items()):
            if empty is None or not empty.is_meta:
                continue
            if id(empty) not in made:
                dtype = torch.float32 if empty.requires_grad else empty.dtype
                values = torch.empty(empty.shape, dtype=dtype, device=device).normal_(std=0.02)
                made[id(empty)] = torch.nn.Parameter(values, empty.requires_grad)
            owner._parameters[name] = made[id(empty)]
        for name, buffer in list(owner._buffers.items()):
            owner._buffers[name] = None if buffer is None else buffer.to(device)


def pack(module, device) -> None:
    """Put 4-bit layers in the place of the linear layers below `module`, but for adapters.

    nf4 with double quantisation, as LLaMA-Factory's quantization_bit: 4.
    """
    import torch

    for name, linear in list(module.named_modules()):
        if type(linear) is torch.nn.Linear and "lora_" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, packed(linear, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def packed(linear, device):
    """A 4-bit layer with these weights. FSDP divides what is stored as 16-bit numbers."""
    import bitsandbytes as bnb
    import torch

    kind = {"quant_type": "nf4", "quant_storage": torch.bfloat16, "compress_statistics": True}
    with torch.device("meta"):
        small = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.bfloat16,
            **kind,
        )
    weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, module=small, **kind)
    small.weight = weight.to(device)  # this packs it
    if linear.bias is not None:
        small.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
    return small


def trained(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def deepspeed_settings(setup: Training) -> dict:
    """Module 05's file of this stage, with the line's values."""
    file = ROOT / f"modules/05_DeepSpeed/configs/z{setup.zero}.json"
    settings = json.loads(file.read_text())
    settings["bf16"] = {"enabled": setup.dtype == "bfloat16"}
    settings["train_micro_batch_size_per_gpu"] = setup.micro_batch
    settings["gradient_accumulation_steps"] = setup.accumulate
    optimizer = settings["optimizer"]["params"]
    optimizer["lr"] = 1e-5
    zero = settings["zero_optimization"]
    if setup.zero:
        zero["reduce_bucket_size"] = setup.bucket
    if setup.offloads:
        optimizer.pop("torch_adam")
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if setup.offloads_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return settings


def deepspeed_engine(setup: Training, config, device, backend: str) -> Engine:
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(backend)
    settings = deepspeed_settings(setup)
    dividing = HfDeepSpeedConfig(settings)  # while it lives, stage 3 divides what is built
    dtype = torch.float32 if setup.dtype == "float32" else torch.bfloat16
    model = random_model(setup, config, device, dtype)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained(model), config=settings)
    engine.dividing = dividing
    return Engine(engine, engine.backward, engine.step, nothing)


def torch_engine(setup: Training, config, device, world: int) -> Engine:
    """PyTorch alone, DDP or FSDP2: trained weights in fp32, computed with in bf16."""
    import torch

    frozen_in_16_bits = not setup.full and setup.dtype != "float32"
    dtype = torch.bfloat16 if frozen_in_16_bits else torch.float32
    divide = fsdp(setup, device) if setup.engine == "fsdp" else nothing
    model = model_in_pieces(setup, config, device, dtype, divide)
    forward = model
    if setup.engine == "ddp" and world > 1:
        cards = [device.index] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=cards)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5, weight_decay=0.0)

    def end_step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Engine(forward, torch.Tensor.backward, nothing, end_step)


def fsdp(setup: Training, device) -> Callable:
    """FSDP2 for a module: bf16 in the computation, and where it rests as the line says."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    computed = torch.bfloat16 if setup.dtype == "bfloat16" else None
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=computed)}
    if setup.offloads:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    return lambda module: fully_shard(module, **options)


def nothing(*_) -> None:
    pass
