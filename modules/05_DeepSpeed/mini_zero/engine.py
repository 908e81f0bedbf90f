"""The engine: DeepSpeed's four calls, over one of the two ways to divide a model.

loss = engine(**batch).loss     # forward
engine.backward(loss)           # gradients, divided by the number of micro-steps
engine.step()                   # after the last micro-step: reduce, update, gather
"""

from pathlib import Path

import torch

from mini_zero import checkpoint
from mini_zero.zero3 import Layers
from mini_zero.zero12 import Buckets


class Engine:
    """A model whose training is divided over the processes of torch.distributed.

    `stage` 0 to 3. `layers`: the modules that stage 3 gathers one by one (a decoder's blocks).
    `bucket_size`: numbers that stages 0 to 2 reduce together. `offload`: the optimizer's states lie
    in the host's memory, and the host updates them. `optimizer`: a class that works number by
    number, as AdamW and SGD do.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stage: int,
        learning_rate: float,
        *,
        layers: list[torch.nn.Module] = (),
        accumulate: int = 1,
        bucket_size: int = 5_000_000,
        offload: bool = False,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    ):
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO has stages 0 to 3, not {stage}")
        if offload and stage == 0:
            raise ValueError("stage 0 divides no optimizer that could be offloaded")
        self.model = model
        self.stage = stage
        self.accumulate = accumulate
        self.micro_step = 0
        if stage == 3:
            self.divided = Layers(model, list(layers), offload)
        else:
            self.divided = Buckets(model, stage, bucket_size, offload)
        updated = list(model.parameters())
        if stage > 0:
            updated = [unit.master for unit in self.divided.units]
        self.optimizer = optimizer(updated, lr=learning_rate, weight_decay=0.0)

    def __call__(self, **batch):
        self.divided.last_micro_step = self.micro_step == self.accumulate - 1
        return self.model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulate).backward()
        self.micro_step += 1

    def step(self) -> None:
        """Update the parameters, if this was the last micro-step; else nothing."""
        if self.micro_step < self.accumulate:
            return
        self.micro_step = 0
        self.divided.reduce()
        if self.stage > 0:
            for unit in self.divided.units:
                unit.give_optimizer_its_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.divided.gather()

    # -----------------------------------------------------------------------------
    # States to go on from, on any number of processes

    def save_checkpoint(self, folder: Path) -> None:
        """Into an empty folder, by all processes, after a whole step."""
        checkpoint.save(self, folder)

    def load_checkpoint(self, folder: Path) -> None:
        checkpoint.load(self, folder)

    # -----------------------------------------------------------------------------
    # What this process holds between backward and step, in bytes

    def bytes_held(self) -> dict[str, int]:
        """{parameters, gradients, optimizer}, each kind as zero_states.py counts it."""
        if self.stage == 3:
            weights = [unit.part_of_weights for unit in self.divided.units]
        else:
            weights = list(self.model.parameters())
        gradients = [parameter.grad for parameter in self.model.parameters()]
        gradients += [unit.grad for unit in self.divided.units]
        gradients += [mean for _, mean, _ in getattr(self.divided, "under_way", [])]
        states = [unit.master for unit in self.divided.units]
        for state in self.optimizer.state.values():
            states += [state["exp_avg"], state["exp_avg_sq"]]
        return {
            "parameters": total_bytes(weights),
            "gradients": total_bytes(gradients),
            "optimizer": total_bytes(states),
        }


def total_bytes(tensors: list[torch.Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
