"""What `prepare` makes of an optimizer and of a DataLoader."""

import torch
from torch.utils.data import DataLoader

from mini_accelerate.shares import ShareOfBatches


class Optimizer:
    """An optimizer that waits for the last micro-step."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator):
        self.optimizer = optimizer
        self.accelerator = accelerator

    def step(self) -> None:
        if self.accelerator.sync_gradients:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.accelerator.sync_gradients:
            self.optimizer.zero_grad()


class Loader:
    """This process's batches of a DataLoader, on its device."""

    def __init__(self, loader: DataLoader, accelerator):
        place = accelerator.process_index
        self.share = ShareOfBatches(loader.batch_sampler, place, accelerator.num_processes)
        self.loader = DataLoader(
            loader.dataset, batch_sampler=self.share, collate_fn=loader.collate_fn
        )
        self.accelerator = accelerator
        self.ended = False  # whether the batch at hand is the last

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.accelerator.loader = self
        self.ended = False
        for number, batch in enumerate(self.loader, 1):
            self.ended = number == len(self)
            yield batch.to(self.accelerator.device)
