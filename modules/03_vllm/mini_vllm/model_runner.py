"""From scheduled sequences to tensors, through the model, to their next tokens."""

from itertools import accumulate
from pathlib import Path

import torch

from mini_vllm.attention import Batch, CpuAttention, TorchAttention
from mini_vllm.model import Model, read_config, read_weights
from mini_vllm.sampler import sample
from mini_vllm.sequence import Sequence


class ModelRunner:
    def __init__(self, folder: Path, device: str, dtype: str, block_size: int, kv_cache_gib: float, num_blocks: int | None, attention: str):
        config = self.config = read_config(folder)
        self.device, self.block_size, self.dtype = device, block_size, getattr(torch, dtype)
        self.model = Model(config, read_weights(folder, device, self.dtype))
        heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        if attention == "torch":
            self.attention = TorchAttention()
        elif device == "cuda":
            from mini_vllm.cuda import CudaAttention
            self.attention = CudaAttention()
        elif block_size == 16 and dim in (32, 64, 80, 96, 112, 128, 160, 192, 224, 256):
            self.attention = CpuAttention(heads, kv_heads, dim, self.dtype)
        else:
            raise ValueError(f"the kernel takes no blocks of {block_size} tokens with heads of {dim} numbers: choose attention=torch")
        block_bytes = 2 * config["num_hidden_layers"] * block_size * kv_heads * dim * self.dtype.itemsize
        self.num_blocks = num_blocks or int(kv_cache_gib * 2**30 // block_bytes)
        self.caches = [self.attention.cache(self.num_blocks, block_size, kv_heads, dim, dtype=self.dtype, device=device) for _ in self.model.layers]

    def batch(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
        """(token ids [T], positions [T], rows whose logits are wanted, the rest) of a step. Built on the host, sent once."""
        spans = [(s.num_computed_tokens, s.num_computed_tokens + s.num_scheduled_tokens) for s in seqs]
        tokens = [t for s, (a, b) in zip(seqs, spans, strict=True) for t in s.token_ids[a:b]]
        positions = [p for a, b in spans for p in range(a, b)]
        slots = [s.block_table[p // self.block_size] * self.block_size + p % self.block_size for s, (a, b) in zip(seqs, spans, strict=True) for p in range(a, b)]
        ends = list(accumulate(b - a for a, b in spans))
        rows = [end - 1 for s, (_, b), end in zip(seqs, spans, ends, strict=True) if b == len(s)]  # the last token of who is computed to its end
        width = max(len(s.block_table) for s in seqs)
        table = [s.block_table + [0] * (width - len(s.block_table)) for s in seqs]
        tokens, positions, slots, rows = (torch.tensor(x, dtype=torch.int64).to(self.device) for x in (tokens, positions, slots, rows))
        rest = (torch.tensor(x, dtype=torch.int32).to(self.device) for x in (table, [b for _, b in spans], [0, *ends]))
        return tokens, positions, rows, Batch(slots, *rest, max(b - a for a, b in spans), max(b for _, b in spans), self.block_size)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence]) -> list[int]:
        """Compute the scheduled tokens of `seqs`. Returns the next token of each that is now computed to its end."""
        tokens, positions, rows, batch = self.batch(seqs)
        self.attention.prepare(batch)
        logits = self.model.forward(tokens, positions, lambda i, q, k, v: self.attention.attend(self.caches[i], batch, q, k, v), rows)
        return sample(logits, [s for s in seqs if s.num_computed_tokens + s.num_scheduled_tokens == len(s)])
