"""The training loops that 10_accelerate_overhead.py times: DDP's, Accelerate's, DeepSpeed's.

Each function takes a model on its device and gives back its loop: `step()` trains on the next batch
and returns the mean loss of all processes, a float, so that the host has waited for the device;
`end()` lets go of what the engine keeps of the model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lab import data


class Setting(NamedTuple):
    """What all loops share."""

    blocks: torch.Tensor  # [blocks, seq_len], token ids
    micro_batch: int
    device: torch.device
    bf16: bool
    learning_rate: float = 2e-5


class Loop(NamedTuple):
    """A training, step by step."""

    step: Callable[[], float]
    end: Callable[[], object]


class OnlyLoss(torch.nn.Module):
    """The model, but it returns its loss and keeps the logits to itself."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return {"loss": self.model(**batch)["loss"]}


def adamw(model: torch.nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)


def share_of(setting: Setting) -> DataLoader:
    """This process's batches, as 01_train_ddp.py deals them out."""
    share = DistributedSampler(setting.blocks, shuffle=False)
    return DataLoader(setting.blocks, batch_size=setting.micro_batch, sampler=share)


def mean(loss: torch.Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def native(model: torch.nn.Module, setting: Setting) -> Loop:
    """As in 01_train_ddp.py."""
    optimizer = adamw(model, setting)
    model = DistributedDataParallel(model)
    batches = data.endless(share_of(setting))

    def step() -> float:
        batch = next(batches).to(setting.device)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return mean(loss.detach())

    return Loop(step, lambda: None)


def accelerate(
    model: torch.nn.Module,
    setting: Setting,
    only_loss: bool = False,
    own_loader: bool = False,
    bucket_view: bool = False,
) -> Loop:
    """As in 02_train_accelerate.py; each flag takes one suspect out."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one Accelerator after another in one process
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)] if bucket_view else []
    precision = "bf16" if setting.bf16 else "no"
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
    optimizer = adamw(model, setting)
    if only_loss:
        model = OnlyLoss(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = share_of(setting)
    if not own_loader:
        loader = accelerator.prepare(DataLoader(setting.blocks, batch_size=setting.micro_batch))
    batches = data.endless(loader)

    def step() -> float:
        batch = next(batches)
        if own_loader:
            batch = batch.to(setting.device)
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch)["loss"]
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), reduction="mean").item()

    return Loop(step, accelerator.free_memory)


def deepspeed_0(model: torch.nn.Module, setting: Setting, autocast: bool = False) -> Loop:
    """DeepSpeed with nothing divided: as configs/z0.json, or float32 weights and autocast.

    Autocast is what the loops above do. Then gradients are float32 too; they travel in bf16.
    """
    import deepspeed

    kind = {"bf16": {"enabled": setting.bf16}}
    if autocast:
        kind = {"torch_autocast": {"enabled": setting.bf16, "dtype": "bfloat16"}}
        kind["communication_data_type"] = "bf16" if setting.bf16 else "fp32"
    settings = {"lr": setting.learning_rate, "weight_decay": 0.0, "torch_adam": True}
    config = {
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": settings},
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "gradient_accumulation_steps": 1,
        **kind,
    }
    parameters = model.parameters()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    batches = data.endless(share_of(setting))

    def step() -> float:
        batch = next(batches).to(setting.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        return mean(loss.detach().float())

    return Loop(step, engine.destroy)


LOOPS: dict[str, Callable[..., Loop]] = {
    "native_ddp": native,
    "accelerate": accelerate,
    "accelerate_only_loss": lambda model, setting: accelerate(model, setting, only_loss=True),
    "accelerate_own_loader": lambda model, setting: accelerate(model, setting, own_loader=True),
    "accelerate_bucket_view": lambda model, setting: accelerate(model, setting, bucket_view=True),
    "native_ddp_again": native,
    "deepspeed_0": deepspeed_0,
    "deepspeed_0_autocast": lambda model, setting: deepspeed_0(model, setting, autocast=True),
}
