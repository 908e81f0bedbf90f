"""Keys and values into blocks, and attention over them: plain torch, and vLLM's kernel for CPUs.

A backend makes one layer's `cache`, is told of every step by `prepare`, and computes `attend` in
every layer: q [T, heads, D], k and v [T, kv_heads, D] are the new tokens of all sequences one
behind another; the result is [T, heads * D].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Batch:
    """One step of S sequences with T new tokens. An example stands in model_runner.py."""

    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]: of each token in its sequence
    slot_mapping: torch.Tensor  # int64 [T]: where its key and value go, block * block_size + offset
    rows: torch.Tensor  # int64 [R]: tokens whose logits are wanted
    seq_lens: torch.Tensor  # int32 [S]: tokens of each sequence with those of this step
    query_start_loc: torch.Tensor  # int32 [S + 1]: where the new tokens of each sequence begin
    block_table: torch.Tensor  # int32 [S, most blocks], padded with 0
    max_query_len: int
    max_seq_len: int
    metadata: object = None  # of the backend


class TorchAttention:
    """Each sequence alone, its blocks gathered into one row: slow, and short enough to believe."""

    def cache(self, num_blocks, block_size, kv_heads, head_dim, **kwargs) -> torch.Tensor:
        return torch.zeros(2, num_blocks, block_size, kv_heads, head_dim, **kwargs)

    def prepare(self, batch: Batch) -> None:
        """Nothing: a kernel plans its work here, before the first layer."""

    def attend(self, cache, batch: Batch, q, k, v) -> torch.Tensor:
        block_size = cache.shape[2]
        keys, values = cache.flatten(1, 2)  # each [num_blocks * block_size, kv_heads, D]
        keys[batch.slot_mapping] = k
        values[batch.slot_mapping] = v
        offsets = torch.arange(block_size, device=q.device)
        starts = batch.query_start_loc.tolist()
        outputs = []
        for i, length in enumerate(batch.seq_lens.tolist()):
            block_starts = batch.block_table[i] * block_size  # [most blocks]
            slots = (block_starts[:, None] + offsets).flatten()[:length]
            query = q[starts[i] : starts[i + 1]]  # [new, heads, D]
            # The new tokens are the sequence's last; each sees itself and what is before it.
            causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            mask = causal[-len(query) :]  # [new, length]
            heads_first = [x.transpose(0, 1)[None] for x in (query, keys[slots], values[slots])]
            out = F.scaled_dot_product_attention(*heads_first, mask, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))  # [new, heads, D]
        return torch.cat(outputs).flatten(1)


class CpuAttention:
    """vLLM's paged attention for CPUs, called as its v1/attention/backends/cpu_attn.py (0.28)."""

    isa = "vec16"  # the kernel's variant that takes blocks of 16

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        from vllm import _custom_ops  # loads the library of kernels

        self.ops = _custom_ops
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype

    def cache(self, num_blocks, block_size, kv_heads, head_dim, **kwargs) -> tuple:
        # Keys and values of a block side by side.
        both = torch.zeros(num_blocks, kv_heads, 2 * block_size, head_dim, **kwargs)
        return both.chunk(2, dim=2)

    def prepare(self, batch: Batch) -> None:
        batch.metadata = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            seq_lens=batch.seq_lens,
            dtype=self.dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,  # long sequences in parts
        )

    def attend(self, cache, batch: Batch, q, k, v) -> torch.Tensor:
        keys, values = cache
        self.ops.cpu_attn_reshape_and_cache(k, v, keys, values, batch.slot_mapping, self.isa)
        out = torch.empty_like(q)
        self.ops.cpu_attention_with_kv_cache(
            q,
            keys,
            values,
            out,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=self.head_dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0.0,
            scheduler_metadata=batch.metadata,
            s_aux=None,
        )
        return out.flatten(1)
