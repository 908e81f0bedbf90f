"""Tensor parallelism with its backward pass (Megatron-LM, arXiv 1909.08053, section 3).

A column-parallel matrix has some of the outputs (q, k, v, gate, up), the row-parallel one behind it
the same of the inputs (o, down); module 03's 16_tensor_parallel.py has the forward pass alone. Two
functions stand around such a pair, each the other's backward:

    x -- f -- column -- row -- g --> y        f   forward nothing,    backward all-reduce
                                              g   forward all-reduce, backward nothing

f: every process's columns give a part of the gradient of x, which has to be the sum. So a layer,
which is two such pairs (attention, MLP), speaks twice forward and twice backward.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


def all_reduced(x: Tensor) -> Tensor:
    """The sum of all processes' `x`, as a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class CopyToRegion(torch.autograd.Function):
    """f: into the region in which every process computes its part."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduced(gradient)


class ReduceFromRegion(torch.autograd.Function):
    """g: out of it."""

    @staticmethod
    def forward(ctx, x):
        return all_reduced(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


copy_to_region = CopyToRegion.apply
reduce_from_region = ReduceFromRegion.apply


class ColumnParallelLinear(nn.Module):
    """Some outputs of a linear layer; its weight is [outputs / world, inputs]."""

    def __init__(self, linear: nn.Linear, rank: int, world: int):
        super().__init__()
        self.weight = part(linear.weight, 0, rank, world)
        self.bias = None
        if linear.bias is not None:
            self.bias = part(linear.bias, 0, rank, world)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """All outputs from some inputs, summed; its weight is [outputs, inputs / world]."""

    def __init__(self, linear: nn.Linear, rank: int, world: int):
        super().__init__()
        self.weight = part(linear.weight, 1, rank, world)
        self.bias = linear.bias  # whole, and added once, behind the sum

    def forward(self, x: Tensor) -> Tensor:
        of_these = F.linear(x, self.weight)
        y = reduce_from_region(of_these)
        return y if self.bias is None else y + self.bias


def part(whole: nn.Parameter, dim: int, rank: int, world: int) -> nn.Parameter:
    parts = whole.data.chunk(world, dim)
    return nn.Parameter(parts[rank].clone())


class TensorParallel:
    """A Qwen2 or Qwen3 whose attention heads and MLPs are divided over all processes.

    Embedding, norms and lm_head stay whole: every process computes them from the same numbers, so
    their gradients are already equal.
    """

    def __init__(self, model: nn.Module):
        self.module = model
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        if model.config.num_key_value_heads % self.world:
            raise ValueError(f"the KV heads are not divided by {self.world} processes")
        for layer in model.get_decoder().layers:
            self.divide(layer.self_attn)
            self.divide(layer.mlp)
            self.join(layer)

    def divide(self, block: nn.Module) -> None:
        """Put this process's parts in the place of the block's matrices."""
        for name, linear in list(block.named_children()):
            if name in COLUMN:
                divided = ColumnParallelLinear(linear, self.rank, self.world)
            elif name in ROW:
                divided = RowParallelLinear(linear, self.rank, self.world)
            else:
                continue
            setattr(block, name, divided)

    def join(self, layer: nn.Module) -> None:
        """What backward has to sum, besides the rows' sums in forward."""
        # f stands once before q, k and v (and once before gate and up), not before each of them.
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda norm, inputs, output: copy_to_region(output))
        # Qwen3 norms each head with weights that all heads share: a process sees its heads' part
        # of their gradient.
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name, None)
            if norm is not None:
                norm.weight.register_hook(all_reduced)

    def forward_backward(self, input_ids: Tensor) -> Tensor:
        """A step without its update. input_ids [batch, seq] -> this process's share of the loss."""
        output = self.module(input_ids=input_ids, labels=input_ids, use_cache=False)
        loss = output.loss
        loss.backward()
        return loss.detach() / self.world
