"""Context parallelism: a model whose sequences are divided, with ring attention in its layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_parallel.gradients import all_reduce_gradients
from mini_parallel.ring import Ring, RingAttention

IGNORED = -100  # the label of a position that has none


class ContextParallel:
    """A model of transformers: each process has all weights and a shard of the positions."""

    def __init__(self, model: nn.Module):
        from transformers import AttentionInterface

        self.module = model
        self.ring = Ring()
        AttentionInterface.register("ring", self.attention)
        model.set_attn_implementation("ring")

    def attention(self, module, query, key, value, attention_mask, scaling, **_):
        """What transformers calls: query [b, heads, s, D], key and value [b, kv_heads, s, D]."""
        kv_heads = key.shape[1]
        q = query.unflatten(1, (kv_heads, -1))  # heads that share a key and a value, by group
        k = key.unsqueeze(2)
        v = value.unsqueeze(2)
        out = RingAttention.apply(q, k, v, scaling, self.ring)
        out = out.flatten(1, 2)
        return out.transpose(1, 2), None  # [b, s, heads, D]

    def shard(self, whole: Tensor) -> Tensor:
        """[batch, seq] -> [batch, seq / world]"""
        shards = whole.chunk(self.ring.world, dim=1)
        return shards[self.ring.rank]

    def forward_backward(self, input_ids: Tensor) -> Tensor:
        """A step without its update. input_ids [batch, seq] -> this process's share of the loss."""
        # Shifted first, then divided: the label of a shard's last token is in the next shard.
        labels = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        output = self.module(
            input_ids=self.shard(input_ids),
            position_ids=self.shard(positions[None]),
            use_cache=False,
        )
        logits = output.logits.flatten(0, 1)
        here = self.shard(labels).flatten()
        total = F.cross_entropy(logits, here, ignore_index=IGNORED, reduction="sum")
        everywhere = (labels != IGNORED).sum()  # the last shard has a label less than the others
        loss = total / everywhere
        loss.backward()
        all_reduce_gradients(self.module.parameters())  # a sum, as the loss is
        return loss.detach()
