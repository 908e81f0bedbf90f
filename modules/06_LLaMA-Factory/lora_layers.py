"""LoRA, rsLoRA, DoRA and PiSSA from scratch, with PEFT's names: one layer beside a frozen one.

Sources: LoRA arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, PiSSA 2404.02948.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Module):
    """y = W x + b + scaling * B A x, with W [out, in] frozen, A [rank, in] and B [out, rank].

    B begins as zeros, so that the model begins as it was. `use_rslora`: scaling alpha / sqrt(rank)
    instead of alpha / rank. `use_dora`: every row of W + scaling * B A gets a length that is learnt
    too. `pissa`: A and B begin as the largest singular values of W, and W keeps the rest.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        use_rslora: bool = False,
        use_dora: bool = False,
        pissa: bool = False,
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        weight = base.weight  # [out, in]
        self.lora_A = nn.Parameter(weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if pissa:
            self.begin_with_singular_values(rank)
        self.magnitude = nn.Parameter(weight.norm(dim=1)) if use_dora else None  # [out]

    @torch.no_grad()
    def begin_with_singular_values(self, rank: int) -> None:
        """B A is what the `rank` largest singular values make of W; the frozen W loses it."""
        if rank > min(self.base.weight.shape):
            raise ValueError(f"a layer of {tuple(self.base.weight.shape)} has no rank {rank}")
        left, values, right = torch.linalg.svd(self.base.weight, full_matrices=False)
        root = (values[:rank] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * right[:rank])
        self.lora_B.copy_(left[:, :rank] * root)
        self.base.weight -= self.delta()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in]; the result: [..., out]."""
        added = self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.magnitude is None:
            return self.base(x) + added
        # The length of a row counts as a constant for the gradient (section 4.3 of the paper).
        length = (self.base.weight + self.delta().detach()).norm(dim=1)
        result = (F.linear(x, self.base.weight) + added) * (self.magnitude / length)
        return result if self.base.bias is None else result + self.base.bias

    def delta(self) -> torch.Tensor:
        """What the adapter adds to W before lengths: [out, in]."""
        return self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs."""
        weight = self.base.weight + self.delta()
        if self.magnitude is not None:
            weight *= (self.magnitude / weight.norm(dim=1))[:, None]
        self.base.weight.copy_(weight)
        return self.base


def wrap(model: nn.Module, **settings) -> None:
    """Freeze the model and put a LoraLinear around every linear layer of its blocks, in place."""
    model.requires_grad_(False)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoraLinear(child, **settings))


def merge(model: nn.Module) -> None:
    """Every adapter is multiplied out and added to its layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                setattr(parent, name, child.merged())
