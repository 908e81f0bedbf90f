"""Stage 3: the parameters are divided too, and a layer's are gathered when it is needed.

    forward    gather layer 1, compute, free; gather layer 2, ...                     psi sent
    backward   gather layer n, compute its gradients, reduce-scatter them, free; ...  psi + psi

While a layer computes, the next one is already being gathered (prefetch), so at most two layers lie
there whole. What is outside of the layers (embedding, norm, output) is needed at both ends of a
pass: it is gathered at the beginning of the forward pass and freed when its gradients are reduced,
once instead of twice. Source: arXiv 1910.02054, section 5.3; the freeing of a storage in place is
FSDP's (torch/distributed/fsdp/_flat_param.py).
"""

import torch
import torch.distributed as dist

from mini_zero.unit import Unit


class Gathered(Unit):
    """A unit whose parameters are views into `whole` [size], which is there only while needed.

    `part_of_weights`: this process's part as it is computed with [part].
    """

    def __init__(self, parameters: list[torch.nn.Parameter], offload: bool):
        super().__init__(parameters)
        self.divide(offload)
        self.whole = self.flat([parameter.data for parameter in parameters])
        self.part_of_weights = self.whole[self.own].clone()
        for parameter, view in zip(parameters, self.views(self.whole), strict=True):
            parameter.data = view
        self.bytes = self.whole.untyped_storage().nbytes()
        self.under_way: dist.Work | None = None
        self.is_there = True
        self.free()

    def begin_gather(self) -> None:
        if self.is_there:
            return
        self.whole.untyped_storage().resize_(self.bytes)
        self.under_way = dist.all_gather_into_tensor(
            self.whole, self.part_of_weights, async_op=True
        )
        self.is_there = True

    def gather(self) -> None:
        self.begin_gather()
        if self.under_way is not None:
            self.under_way.wait()
            self.under_way = None

    def free(self) -> None:
        """Give the memory back; views that autograd has kept see the next gathering."""
        self.whole.untyped_storage().resize_(0)
        self.is_there = False

    def update_weights(self) -> None:
        self.part_of_weights.copy_(self.master.data)


class Layers:
    """The model in units: each of its layers, and the rest."""

    def __init__(self, model: torch.nn.Module, layers: list[torch.nn.Module], offload: bool):
        self.most_there = 0  # layers that lay there whole at the same time
        inside = {parameter for layer in layers for parameter in layer.parameters()}
        outside = [parameter for parameter in model.parameters() if parameter not in inside]
        self.rest = Gathered(outside, offload)
        self.layers = [Gathered(list(layer.parameters()), offload) for layer in layers]
        self.units = [self.rest, *self.layers]
        model.register_forward_pre_hook(lambda *_: self.rest.gather())
        for number, layer in enumerate(layers):
            self.hook(number, layer)
        for unit in self.units:
            unit.when_complete(self.ready)

    def hook(self, number: int, layer: torch.nn.Module) -> None:
        unit = self.layers[number]
        layer.register_forward_pre_hook(lambda *_: self.need(number, number + 1))
        layer.register_forward_hook(lambda *_: unit.free())
        layer.register_full_backward_pre_hook(lambda *_: self.need(number, number - 1))

    def need(self, number: int, next_number: int) -> None:
        """This layer now, and the next one soon."""
        self.layers[number].gather()
        if 0 <= next_number < len(self.layers):
            self.layers[next_number].begin_gather()
        there = sum(unit.is_there for unit in self.layers)
        self.most_there = max(self.most_there, there)

    def ready(self, unit: Gathered) -> None:
        """All gradients of the unit are there, and nothing needs its weights any more."""
        unit.reduce_scatter()
        unit.free()

    def reduce(self) -> None:
        """Nothing is left to do: every layer was reduced as its gradients came."""

    def gather(self) -> None:
        """After the update: no process needs more than its part yet."""
        for unit in self.units:
            unit.update_weights()
