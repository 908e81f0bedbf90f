"""A training that is measured: three steps on random tokens, the peak of each part of a step.

scripts/calibrate.py runs `worker` in one process, or in one for each card by torchrun.
"""

import json
import os
import resource
from collections.abc import Callable
from typing import NamedTuple

from plan_parts import Request

from lab import ROOT, machine, models
from lab.planner.training import Training

STEPS = 3  # from the second step on, the optimizer's states exist


class Engine(NamedTuple):
    """A model ready to be trained, and the two steps that engines do differently."""

    forward: Callable  # of the token ids; .loss
    backward: Callable  # of the loss, once a micro-step
    end_micro_step: Callable  # DeepSpeed counts the micro-steps itself ...
    end_step: Callable  # ... the others step when told to


def worker(request: Request) -> None:
    """One process of a training: prints {part of a step: GiB at its peak}, the most of any."""
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

    measured = measured_steps(setup, engine, config.vocab_size, device)
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


def measured_steps(setup: Training, engine: Engine, vocabulary: int, device) -> dict[str, float]:
    """{part of a step: GiB at its peak, ...} of this process; on a CPU only the host's memory."""
    import torch

    autocast = setup.engine == "ddp" and setup.dtype == "bfloat16"
    measured: dict[str, float] = {}

    def lap(part: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            measured[f"{part}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()

    for _ in range(STEPS):
        for _ in range(setup.accumulate):
            shape = (setup.micro_batch, setup.seq_len)
            ids = torch.randint(0, vocabulary, shape, device=device)
            lap("between")
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = engine.forward(input_ids=ids, labels=ids, use_cache=False).loss
            lap("forward")
            engine.backward(loss)
            lap("backward")
            engine.end_micro_step()
        engine.end_step()
        lap("step")
    measured["peak_gib"] = max(measured.values(), default=0.0)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["context_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    measured["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return measured


def random_model(setup: Training, config, device, dtype):
    """A model with random weights of `dtype`, as the line's method trains it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if setup.method == "qlora":
        pack(model, device)
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if setup.method != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=setup.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model.train()


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
    model = random_model(setup, config, device, dtype)
    forward = model
    if setup.engine == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        computed = torch.bfloat16 if setup.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=computed)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif world > 1:
        cards = [device.index] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=cards)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5, weight_decay=0.0)

    def end_step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Engine(forward, torch.Tensor.backward, nothing, end_step)


def nothing() -> None:
    pass


def pack(model, device) -> None:
    """Put 4-bit layers in the place of the decoder's linear layers.

    nf4 with double quantisation, as LLaMA-Factory's quantization_bit: 4.
    """
    import torch

    layers = model.model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(layers.get_submodule(parent), leaf, packed(module).to(device))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def packed(linear):
    import bitsandbytes as bnb
    import torch

    small = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    small.weight = bnb.nn.Params4bit(
        linear.weight.data.cpu(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    )
    if linear.bias is not None:
        small.bias = torch.nn.Parameter(linear.bias.data)
    return small
