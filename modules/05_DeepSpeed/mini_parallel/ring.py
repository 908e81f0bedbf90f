"""Ring attention: the sequence divided over processes (arXiv 2310.01889).

Every process has a shard of the positions and computes everything for them alone, but attention
needs the keys and values of all positions before. So K and V travel around the ring, while each
process attends to the shard that is there; the parts of a row's softmax are put together by their
log-sum-exp (online softmax, as in flash attention).

    hop 0   process 2 attends to its own shard, causally
    hop 1   ... to shard 1, whole         (process 0 now has shard 2: later, nothing to do)
    hop 2   ... to shard 0, whole

In backward K and V travel again, and dK and dV with them, until they are home. Shards are
contiguous here, so the last process attends to `world` shards and the first to one; zigzag (process
r has chunks r and 2 world - 1 - r) makes that even.
"""

import torch
import torch.distributed as dist
from torch import Tensor

INFINITY = float("inf")


class Ring:
    """All processes in a circle. `pairs`: (query, key) pairs attended to in forward passes."""

    def __init__(self):
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.following = (self.rank + 1) % self.world
        self.previous = (self.rank - 1) % self.world
        self.pairs = 0

    def begin_passing(self, tensor: Tensor) -> tuple[Tensor, list[dist.Work]]:
        """`tensor` to the following process; what the previous one passes, once waited for."""
        arriving = torch.empty_like(tensor)
        if self.rank % 2 == 0:
            going = dist.isend(tensor, self.following)
            coming = dist.irecv(arriving, self.previous)
        else:  # someone must listen first: on a GPU the messages of a pair go in turn
            coming = dist.irecv(arriving, self.previous)
            going = dist.isend(tensor, self.following)
        return arriving, [going, coming]

    def source(self, hop: int) -> int:
        """Whose shard is here after so many hops."""
        return (self.rank - hop) % self.world

    def count(self, s: int, causal: bool) -> None:
        """A block of s queries and s keys."""
        self.pairs += s * (s + 1) // 2 if causal else s * s


def wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def scores_of(q: Tensor, k: Tensor, scaling: float, causal: bool) -> Tensor:
    """q [b, kv_heads, group, s, D], k [b, kv_heads, 1, s, D] -> [b, kv_heads, group, s, s]"""
    scores = q @ k.mT * scaling
    if not causal:
        return scores
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -INFINITY)


class RingAttention(torch.autograd.Function):
    """This process's queries over the keys and values of all."""

    @staticmethod
    def forward(ctx, q, k, v, scaling, ring):
        """q [b, kv_heads, group, s, D], k and v [b, kv_heads, 1, s, D] -> as q"""
        kv = torch.stack([k, v])  # one message: [2, b, kv_heads, 1, s, D]
        ctx.ring = ring
        ctx.scaling = scaling
        own = kv
        out = torch.zeros_like(q)
        lse = torch.full_like(q[..., :1], -INFINITY)  # log of a row's sum of exponentials
        for hop in range(ring.world):
            travels = hop < ring.world - 1
            if travels:
                arriving, works = ring.begin_passing(kv)
            source = ring.source(hop)
            if source <= ring.rank:
                causal = source == ring.rank
                ring.count(q.shape[-2], causal)
                scores = scores_of(q, kv[0], scaling, causal)
                block_lse = scores.logsumexp(-1, keepdim=True)
                both = torch.logaddexp(lse, block_lse)
                weights = (scores - both).exp()
                out = out * (lse - both).exp() + weights @ kv[1]
                lse = both
            if travels:
                wait(works)
                kv = arriving
        ctx.save_for_backward(q, own, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        """dS = P * (dP - D), where D is the row's sum of d_out * out (flash attention's form)."""
        q, kv, out, lse = ctx.saved_tensors
        ring = ctx.ring
        row = (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q)
        d_kv = torch.zeros_like(kv)
        for hop in range(ring.world):
            travels = hop < ring.world - 1
            if travels:
                arriving, works = ring.begin_passing(kv)
            source = ring.source(hop)
            if source <= ring.rank:
                k, v = kv
                scores = scores_of(q, k, ctx.scaling, causal=source == ring.rank)
                weights = (scores - lse).exp()
                d_weights = d_out @ v.mT
                d_scores = weights * (d_weights - row) * ctx.scaling
                d_q += d_scores @ k
                # The heads of a group share a key and a value, so their gradients add up.
                d_kv[0] += (d_scores.mT @ q).sum(2, keepdim=True)
                d_kv[1] += (weights.mT @ d_out).sum(2, keepdim=True)
            if travels:
                wait(works)
                kv = arriving
            d_kv, works = ring.begin_passing(d_kv)  # after the last hop it is home
            wait(works)
        d_k, d_v = d_kv
        return d_q, d_k, d_v, None, None
