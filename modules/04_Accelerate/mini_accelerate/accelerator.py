"""The Accelerator: one object that knows how many processes there are, and what that changes.

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).loss)
        optimizer.step()            # does nothing before the last micro-step
        optimizer.zero_grad()
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mini_accelerate.prepared import Loader, Optimizer


def from_launcher(name: str) -> int:
    """A number that torchrun puts into the environment; 0 where nobody launched this process."""
    return int(os.environ.get(name, "0"))


class Accelerator:
    """Accelerate's names, for data parallel training in one process or several.

    `sync_gradients`: whether this micro-step ends a step. `mixed_precision`: no or bf16.
    """

    def __init__(self, gradient_accumulation_steps: int = 1, mixed_precision: str = "no"):
        self.process_index = from_launcher("RANK")
        self.num_processes = from_launcher("WORLD_SIZE") or 1
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind, from_launcher("LOCAL_RANK"))
        if self.num_processes > 1:
            torch.get_device_module(self.device).set_device(self.device)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.mixed_precision = mixed_precision
        self.micro_step = 0
        self.sync_gradients = True
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[Optimizer] = []
        self.loader: Loader | None = None  # the one that was iterated over last

    # -----------------------------------------------------------------------------
    # Preparing

    def prepare(self, *objects):
        """Each object as it has to be with several processes, in the same order."""
        prepared = tuple(self.prepare_one(each) for each in objects)
        return prepared if len(prepared) > 1 else prepared[0]

    def prepare_one(self, each):
        if isinstance(each, torch.nn.Module):
            return self.prepare_model(each)
        if isinstance(each, torch.optim.Optimizer):
            self.optimizers.append(Optimizer(each, self))
            return self.optimizers[-1]
        return Loader(each, self)

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """On the device, under autocast where asked for, and in DDP where there are others."""
        model.to(self.device)
        if self.mixed_precision == "bf16":
            forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
            model.forward = forward
        if self.num_processes > 1:
            model = DistributedDataParallel(model)
        self.models.append(model)
        return model

    # -----------------------------------------------------------------------------
    # A step

    @contextlib.contextmanager
    def accumulate(self, model: torch.nn.Module) -> Iterator[None]:
        """A micro-step: only the last of a step lets gradients travel."""
        self.micro_step += 1
        self.sync_gradients = self.micro_step % self.gradient_accumulation_steps == 0
        waits = not self.sync_gradients and self.num_processes > 1
        with model.no_sync() if waits else contextlib.nullcontext():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.gradient_accumulation_steps).backward()

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """The sum, or the mean, of everybody's tensor."""
        total = tensor.clone()
        if self.num_processes > 1:
            dist.all_reduce(total)
        return total / self.num_processes if reduction == "mean" else total

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everybody's rows, one process after another. [rows, ...] -> [processes x rows, ...]"""
        if self.num_processes == 1:
            return tensor
        rows = self.num_processes * len(tensor)
        everyone = tensor.new_empty(rows, *tensor.shape[1:])
        dist.all_gather_into_tensor(everyone, tensor.contiguous())
        return everyone

    def gather_for_metrics(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, without the rows that the last round read a second time."""
        rows = self.gather(tensor)
        if self.loader is None or not self.loader.ended:
            return rows
        wanted = len(rows) - self.loader.share.extra
        return rows[:wanted]

    # -----------------------------------------------------------------------------
    # Keeping

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.module if isinstance(model, DistributedDataParallel) else model

    def get_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return self.unwrap_model(model).state_dict()

    def save_state(self, folder: str) -> None:
        """Models and optimizers once, the random numbers of each process."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.process_index == 0:
            states = [each.state_dict() for each in self.with_states()]
            torch.save(states, Path(folder, "states.pt"))
        own = {"random": torch.get_rng_state(), "micro_step": self.micro_step}
        torch.save(own, self.own_file(folder))
        if self.num_processes > 1:
            dist.barrier()

    def load_state(self, folder: str) -> None:
        states = torch.load(Path(folder, "states.pt"), map_location="cpu")
        for each, state in zip(self.with_states(), states, strict=True):
            each.load_state_dict(state)
        own = torch.load(self.own_file(folder))
        torch.set_rng_state(own["random"])
        self.micro_step = own["micro_step"]

    def with_states(self) -> list:
        """The models and optimizers that were prepared, without what is around them."""
        models = [self.unwrap_model(model) for model in self.models]
        return models + [prepared.optimizer for prepared in self.optimizers]

    def own_file(self, folder: str) -> Path:
        return Path(folder, f"process_{self.process_index}.pt")

    def free_memory(self, *_) -> None:
        self.models.clear()
        self.optimizers.clear()
        self.loader = None

    def end_training(self) -> None:
        if self.num_processes > 1:
            dist.destroy_process_group()
