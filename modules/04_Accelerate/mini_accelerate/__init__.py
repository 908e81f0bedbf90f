"""A small Accelerate, from scratch on torch.distributed: what hides behind `prepare`.

accelerator.py   the Accelerator: the names and the meaning of Accelerate's
prepared.py      an optimizer that waits for the last micro-step, a DataLoader of a share
shares.py        which batches a process reads, and what is read twice at the end
"""

from mini_accelerate.accelerator import Accelerator

__all__ = ["Accelerator"]
