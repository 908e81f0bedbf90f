"""Expert parallelism: a mixture of experts whose experts are divided over processes.

    process 0   router   its tokens --all-to-all--> experts 0-3 --all-to-all--> back to their owners
    process 1   router   its tokens --all-to-all--> experts 4-7 --all-to-all--> back

Everything but the experts is data parallel: each process has its share of the batch. Backward sends
gradients the same ways in reverse, so an MoE layer makes four all-to-alls (GShard, arXiv
2006.16668). How many rows travel, the router decides anew each time: a small all-to-all of counts
goes first.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mini_parallel.gradients import all_reduce_gradients


class AllToAll(torch.autograd.Function):
    """Rows to other processes: `sent` and `received` say how many to and from each."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        """rows [sum of sent, hidden] -> [sum of received, hidden]"""
        ctx.sent = sent
        ctx.received = received
        return exchange(rows, sent, received)

    @staticmethod
    def backward(ctx, gradient):
        """The same way back: what was received is sent."""
        returned = exchange(gradient, ctx.received, ctx.sent)
        return returned, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    hidden = rows.shape[1]
    arriving = rows.new_empty(sum(received), hidden)
    leaving = rows.contiguous()
    dist.all_to_all_single(arriving, leaving, received, sent)
    return arriving


class DividedExperts(nn.Module):
    """This process's experts, in the place of all of them.

    `gate_up_proj` [experts / world, 2 * intermediate, hidden], `down_proj` [experts / world,
    hidden, intermediate]: slices of Qwen3MoeExperts' tensors.
    """

    def __init__(self, experts: nn.Module, rank: int, world: int):
        super().__init__()
        self.world = world
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        gate_up_proj = experts.gate_up_proj.data.chunk(world)[rank]
        down_proj = experts.down_proj.data.chunk(world)[rank]
        self.gate_up_proj = nn.Parameter(gate_up_proj.clone())
        self.down_proj = nn.Parameter(down_proj.clone())

    def forward(self, hidden, top_k_index, top_k_weights):
        """hidden [tokens, hidden], the router's choice [tokens, top_k] twice -> as hidden"""
        top_k = top_k_index.shape[1]
        chosen = top_k_index.flatten()  # [tokens * top_k]
        order = chosen.argsort(stable=True)  # rows by expert, and so by process
        token = order // top_k
        counts = chosen.bincount(minlength=self.num_experts)  # rows that go to each expert
        coming = torch.empty_like(counts)  # and that come: world x own experts
        dist.all_to_all_single(coming, counts)
        coming = coming.view(self.world, -1)
        sent = counts.view(self.world, -1).sum(1).tolist()
        received = coming.sum(1).tolist()

        leaving = hidden[token]
        rows = AllToAll.apply(leaving, sent, received)
        made = self.compute(rows, coming)
        back = AllToAll.apply(made, received, sent)

        share = top_k_weights.flatten()[order]
        weighted = back * share.unsqueeze(1)
        total = torch.zeros_like(hidden)
        return total.index_add(0, token, weighted)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each row through its expert. counts [world, own experts]: in this order they lie."""
        own = torch.arange(counts.shape[1], device=rows.device)
        every = own.repeat(self.world)  # 0 1 0 1: two experts, rows of two processes
        expert = every.repeat_interleave(counts.flatten())  # [rows]
        by_expert = expert.argsort(stable=True)
        sizes = counts.sum(0).tolist()
        shares = rows[by_expert].split(sizes)
        made = []
        for x, gate_up, down in zip(shares, self.gate_up_proj, self.down_proj, strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            inner = self.act_fn(gate) * up
            made.append(F.linear(inner, down))
        as_they_came = by_expert.argsort()
        return torch.cat(made)[as_they_came]


class ExpertParallel:
    """A Qwen3-MoE whose experts are divided, and whose batch is too."""

    def __init__(self, model: nn.Module):
        self.module = model
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.divided: list[nn.Parameter] = []
        for layer in model.get_decoder().layers:
            experts = DividedExperts(layer.mlp.experts, self.rank, self.world)
            layer.mlp.experts = experts
            self.divided += experts.parameters()
        divided = set(self.divided)
        self.whole = [weight for weight in model.parameters() if weight not in divided]

    def forward_backward(self, input_ids: Tensor) -> Tensor:
        """A step without its update. input_ids [batch, seq] -> this process's share of the loss."""
        mine = input_ids.chunk(self.world)[self.rank]
        output = self.module(input_ids=mine, labels=mine, use_cache=False)
        loss = output.loss
        loss.backward()
        all_reduce_gradients(self.whole, 1 / self.world)
        # The tokens of all processes have been here, each with the gradient of its own process's
        # mean: the sum is there already, and the mean over the processes is still to be taken.
        for weight in self.divided:
            weight.grad /= self.world
        return loss.detach() / self.world
