"""Gradients of parameters that several processes have.

One all-reduce a parameter, after the backward pass: the simplest form. mini_zero puts them into
buckets and sends them while backward goes on.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist


def all_reduce_gradients(
    parameters: Iterable[torch.nn.Parameter],
    scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Sum the gradients over the group, times `scale`: 1 / processes makes it the mean."""
    for parameter in parameters:
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad *= scale
