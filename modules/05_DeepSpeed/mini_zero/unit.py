"""Some parameters as one vector, of which each process owns one part.

The vector is padded to a multiple of the number of processes, so that all parts are equally long:

    parameters  [a a a a|b b b|c c]        9 numbers in three tensors
    vector      [a a a a b b b c c 0]      10 for 2 processes
    parts       [a a a a b][b b c c 0]     of rank 0, of rank 1

A collective then moves a whole unit in one call. DeepSpeed lays its groups out in this way too
(flatten_dense_tensors_aligned), and FSDP its units.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist


class Unit:
    """Parameters that are reduced, updated and gathered together.

    `master`: this process's part in fp32 [part], what the optimizer updates, once divided.
    `grad`: the mean gradient of this part [part], None where there is none yet.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.parameters = parameters
        self.world = dist.get_world_size()
        numbers = sum(parameter.numel() for parameter in parameters)
        self.part = -(-numbers // self.world)  # rounded up
        self.size = self.part * self.world
        rank = dist.get_rank()
        self.own = slice(rank * self.part, (rank + 1) * self.part)
        self.master: torch.nn.Parameter | None = None
        self.grad: torch.Tensor | None = None

    def divide(self, offload: bool) -> None:
        """Take the own part; offloaded, it lies on the host."""
        mine = self.flat([parameter.data for parameter in self.parameters])[self.own]
        home = "cpu" if offload else mine.device
        self.master = torch.nn.Parameter(mine.to(home, torch.float32, copy=True))

    def flat(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """`tensors` one after another, and zeros to the end. [size]"""
        vector = tensors[0].new_zeros(self.size)
        offset = 0
        for tensor in tensors:
            vector[offset : offset + tensor.numel()] = tensor.reshape(-1)
            offset += tensor.numel()
        return vector

    def views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of `vector` [size] in the shapes of the parameters."""
        pieces = []
        offset = 0
        for parameter in self.parameters:
            piece = vector[offset : offset + parameter.numel()]
            pieces.append(piece.view(parameter.shape))
            offset += parameter.numel()
        return pieces

    def cut(self, vector: torch.Tensor) -> torch.Tensor:
        """The own part of a vector whose padding was another number of processes' [part]."""
        numbers = sum(parameter.numel() for parameter in self.parameters)
        whole = self.flat([vector[:numbers]])
        return whole[self.own].clone()

    def when_complete(self, act: Callable[["Unit"], None]) -> None:
        """Call `act` with this unit whenever backward has made all of its gradients."""
        missing = set(self.parameters)

        def has_gradient(parameter: torch.nn.Parameter) -> None:
            missing.discard(parameter)
            if not missing:
                missing.update(self.parameters)
                act(self)

        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(has_gradient)

    def take_gradients(self) -> torch.Tensor:
        """The gradients as one vector [size]; the parameters have none afterwards."""
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:  # unused in this micro-step
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        vector = self.flat(gradients)
        for parameter in self.parameters:
            parameter.grad = None
        return vector

    def reduce_scatter(self) -> None:
        """The mean of all processes' gradients, of which each keeps its part: size numbers sent."""
        mean = self.take_gradients() / self.world
        part = mean.new_empty(self.part)
        dist.reduce_scatter_tensor(part, mean)
        self.grad = part if self.grad is None else self.grad + part

    def give_optimizer_its_gradient(self) -> None:
        self.master.grad = self.grad.to(self.master.device, torch.float32)
        self.grad = None
