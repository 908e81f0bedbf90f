"""Stages 0 to 2: every process holds the whole model.

    stage 0   all-reduce of the gradients; everybody updates everything            2 psi sent
    stage 1   reduce-scatter in the last micro-step; everybody updates a part,
              all-gather of the parameters                                         psi + psi
    stage 2   the same, but reduced in every micro-step, so that only the own
              part of the gradients is ever kept                                   psi + psi

psi is the number of parameters. An all-reduce is a reduce-scatter and an all-gather, which is why
dividing the optimizer costs nothing in traffic (arXiv 1910.02054, section 7). With `accumulate`
micro-steps, stage 2 sends (accumulate + 1) psi. A bucket goes as soon as its gradients are there.
"""

import torch
import torch.distributed as dist

from mini_zero.unit import Unit


class Buckets:
    """The parameters in units of about `bucket_size` numbers, last layer first.

    Backward makes the gradients in that order: while the card computes the next layer's, the last
    bucket is on its way.
    """

    def __init__(self, model: torch.nn.Module, stage: int, bucket_size: int, offload: bool):
        self.stage = stage
        self.units: list[Unit] = []
        self.under_way: list[tuple[dist.Work, torch.Tensor, Unit]] = []
        self.last_micro_step = True
        parameters = list(reversed(list(model.parameters())))
        bucket: list[torch.nn.Parameter] = []
        for parameter in parameters:
            bucket.append(parameter)
            if sum(each.numel() for each in bucket) >= bucket_size or parameter is parameters[-1]:
                unit = Unit(bucket)
                if stage > 0:
                    unit.divide(offload)
                unit.when_complete(self.ready)
                self.units.append(unit)
                bucket = []

    def ready(self, unit: Unit) -> None:
        """All gradients of the bucket are there; backward goes on meanwhile."""
        if self.stage == 2 or (self.stage == 1 and self.last_micro_step):
            unit.reduce_scatter()
        elif self.stage == 0 and self.last_micro_step:
            mean = unit.take_gradients() / unit.world
            work = dist.all_reduce(mean, async_op=True)
            self.under_way.append((work, mean, unit))

    def reduce(self) -> None:
        """After the last backward of a step: wait for what is under way."""
        for work, mean, unit in self.under_way:
            work.wait()
            for parameter, gradient in zip(unit.parameters, unit.views(mean), strict=True):
                parameter.grad = gradient
        self.under_way.clear()

    def gather(self) -> None:
        """After the update: everybody's parts, as the parameters of all."""
        if self.stage == 0:
            return
        for unit in self.units:
            kind = unit.parameters[0]
            whole = kind.new_empty(unit.size)
            dist.all_gather_into_tensor(whole, unit.master.data.to(kind.device, kind.dtype))
            for parameter, piece in zip(unit.parameters, unit.views(whole), strict=True):
                parameter.data.copy_(piece)
