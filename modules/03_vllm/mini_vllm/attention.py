"""Keys and values into blocks, and attention over blocks: by plain torch, to read and to compare with, and by vLLM's CPU kernel.

A backend makes one layer's `cache`, is told of every step by `prepare`, and computes `attend` in every layer: q [T, heads, D], k and v
[T, kv_heads, D] are the new tokens of all sequences one behind another; the result is [T, heads * D]. cuda.py holds the one for GPUs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Batch:
    """One step's sequences (S of them, T new tokens) as tensors."""
    slots: torch.Tensor  # int64 [T]: where each new token goes, block * block_size + offset
    block_table: torch.Tensor  # int32 [S, most blocks], padded with 0
    seq_lens: torch.Tensor  # int32 [S]: tokens of each sequence with those of this step
    query_start: torch.Tensor  # int32 [S+1]: where the new tokens of each sequence begin
    max_query_len: int
    max_seq_len: int
    metadata: object = None  # of the backend


class TorchAttention:
    """Each sequence alone: gather its blocks into one row of keys, and let torch compute. Slow, and short enough to believe."""

    def cache(self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, **kwargs) -> torch.Tensor:
        return torch.zeros(2, num_blocks, block_size, kv_heads, head_dim, **kwargs)

    def prepare(self, batch: Batch) -> None:
        """Nothing: a kernel plans its work here, before the first layer."""

    def attend(self, cache, batch: Batch, q, k, v) -> torch.Tensor:
        keys, values = cache.flatten(1, 2)  # each [num_blocks * block_size, kv_heads, head_dim]
        keys[batch.slots], values[batch.slots] = k, v
        slots = torch.arange(len(keys), device=q.device).view(cache.shape[1:3])[batch.block_table].flatten(1)
        starts, rows = batch.query_start.tolist(), []
        for i, length in enumerate(batch.seq_lens.tolist()):
            new = slice(starts[i], starts[i + 1])
            query, key, value = (x.transpose(0, 1)[None] for x in (q[new], keys[slots[i, :length]], values[slots[i, :length]]))
            # The new tokens are the last ones of the sequence; each sees itself and what is before it.
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[new.start - new.stop :]
            rows.append(F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(rows).flatten(1)


class CpuAttention:
    """vLLM's paged attention kernel for CPUs, called as vllm/v1/attention/backends/cpu_attn.py (0.28) does."""
    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        from vllm import _custom_ops  # loads the library of kernels
        self.ops, self.shape, self.dtype = _custom_ops, (heads, kv_heads, head_dim), dtype

    def cache(self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, **kwargs) -> tuple:
        return torch.zeros(num_blocks, kv_heads, 2 * block_size, head_dim, **kwargs).chunk(2, dim=2)  # keys and values of a block side by side

    def prepare(self, batch: Batch) -> None:
        options = (batch.seq_lens, self.dtype, batch.query_start, True, -1, "vec16", True)  # causal, no window, blocks of 16, long sequences in parts
        batch.metadata = self.ops.cpu_attn_get_scheduler_metadata(len(batch.seq_lens), *self.shape, *options)

    def attend(self, cache, batch: Batch, q, k, v) -> torch.Tensor:
        self.ops.cpu_attn_reshape_and_cache(k, v, *cache, batch.slots, "vec16")
        out, options = torch.empty_like(q), (q.shape[-1] ** -0.5, True, None, -1)  # scale, causal, no ALiBi, no window
        self.ops.cpu_attention_with_kv_cache(q, *cache, out, batch.query_start, batch.seq_lens, *options, batch.block_table, 0.0, batch.metadata, None)
        return out.flatten(1)
