"""Paged attention on a GPU, by the flash attention that vLLM 0.26 ships (arXiv 2307.08691). Without CUDA graphs: the host starts every kernel."""

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func


class CudaAttention:
    """As the backends of attention.py; bfloat16 and float16 only, as the kernel."""

    version = get_flash_attn_version()  # 3 on Hopper, 2 on a 4090

    def cache(self, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, **kwargs) -> torch.Tensor:
        return torch.zeros(2, num_blocks, block_size, kv_heads, head_dim, **kwargs)

    def prepare(self, batch) -> None:
        lengths = {"max_seqlen_q": batch.max_query_len, "cu_seqlens_q": batch.query_start, "max_seqlen_k": batch.max_seq_len, "seqused_k": batch.seq_lens}
        batch.metadata = lambda q, k, v: flash_attn_varlen_func(q, k, v, **lengths, fa_version=self.version, causal=True, block_table=batch.block_table)

    def attend(self, cache, batch, q, k, v) -> torch.Tensor:
        flat = cache.flatten(1, 2)  # [2, num_blocks * block_size, kv_heads, head_dim]
        flat[0, batch.slots], flat[1, batch.slots] = k, v
        return batch.metadata(q, cache[0], cache[1]).flatten(1)
