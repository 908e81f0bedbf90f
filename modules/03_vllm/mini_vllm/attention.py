"""Keys and values into blocks, and attention over them: plain torch, and vLLM's kernel for CPUs.

A backend makes one layer's `cache`, is told of every step by `prepare`, and computes `attend` in
every layer: q [T, heads, D], k and v [T, kv_heads, D] are the new tokens of all sequences one
behind another; the result is [T, heads * D].
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Batch:
    """One step of S sequences with T new tokens. An example stands in model_runner.py."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]: of each token in its sequence
    slot_mapping: Tensor  # int64 [T]: where its key and value go, block * block_size + offset
    rows: Tensor  # int64 [R]: tokens whose logits are wanted
    seq_lens: Tensor  # int32 [S]: tokens of each sequence with those of this step
    query_start_loc: Tensor  # int32 [S + 1]: where the new tokens of each sequence begin
    block_table: Tensor  # int32 [S, most blocks], padded with 0
    max_query_len: int
    max_seq_len: int
    metadata: object = None  # of the backend


class TorchAttention:
    """Each sequence alone, its blocks gathered into one row: slow, and short enough to believe."""

    def cache(self, *shape, **kwargs):
        # Keys [num_blocks, block_size, kv_heads, D], and values.
        return torch.zeros(2, *shape, **kwargs)

    def prepare(self, batch: Batch):
        """Nothing: a kernel plans its work here, before the first layer."""

    def attend(self, cache, batch: Batch, q, k, v):
        cache.flatten(1, 2)[:, batch.slot_mapping] = torch.stack((k, v))
        queries = q.split(batch.query_start_loc.diff().tolist())  # of each sequence's last tokens
        lengths = batch.seq_lens.tolist()
        outputs = []
        for query, length, blocks in zip(queries, lengths, batch.block_table, strict=True):
            keys, values = cache[:, blocks].flatten(1, 2)[:, :length]  # each [length, kv_heads, D]
            mask = q.new_ones(len(query), length, dtype=torch.bool)
            mask = mask.tril(length - len(query))  # a token sees itself and what is before it
            heads_first = [x.transpose(0, 1)[None] for x in (query, keys, values)]
            out = F.scaled_dot_product_attention(*heads_first, mask, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))  # [new, heads, D]
        return torch.cat(outputs).flatten(1)


class CpuAttention:
    """vLLM's paged attention for CPUs, called as its v1/attention/backends/cpu_attn.py (0.28)."""

    isa = "vec16"  # the kernel's variant that takes blocks of 16
    not_ours = {"alibi_slopes": None, "softcap": 0.0, "s_aux": None}  # what other models have

    def __init__(self, heads, kv_heads, head_dim, dtype):
        from vllm import _custom_ops  # loads the library of kernels

        self.ops = _custom_ops
        self.sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        self.sizes["dtype"] = dtype

    def cache(self, num_blocks, block_size, kv_heads, head_dim, **kwargs):
        both = torch.zeros(num_blocks, kv_heads, 2 * block_size, head_dim, **kwargs)
        return both.chunk(2, dim=2)  # keys and values of a block lie side by side

    def prepare(self, batch: Batch):
        lengths = {"seq_lens": batch.seq_lens, "query_start_loc": batch.query_start_loc}
        plan = self.ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(batch.seq_lens),
            **self.sizes,
            **lengths,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,  # long sequences in parts
        )
        batch.metadata = lengths | {"block_table": batch.block_table, "scheduler_metadata": plan}

    def attend(self, cache, batch: Batch, q, k, v):
        self.ops.cpu_attn_reshape_and_cache(k, v, *cache, batch.slot_mapping, self.isa)
        out = torch.empty_like(q)
        self.ops.cpu_attention_with_kv_cache(
            q,
            *cache,
            out,
            **batch.metadata,
            scale=self.sizes["head_dim"] ** -0.5,
            causal=True,
            sliding_window=-1,
            **self.not_ours,
        )
        return out.flatten(1)
