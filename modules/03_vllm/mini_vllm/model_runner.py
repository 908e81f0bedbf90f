"""From scheduled sequences to tensors, through the model, to their next tokens."""

from array import array
from itertools import accumulate, chain
from pathlib import Path

import torch

from mini_vllm.attention import Batch, CpuAttention, TorchAttention
from mini_vllm.model import Model, read_config, read_weights
from mini_vllm.sampler import sample
from mini_vllm.sequence import Sequence


class ModelRunner:
    def __init__(self, folder: Path, device: str, dtype: str, block_size: int, kv_cache_gib: float, num_blocks: int | None, attention: str):
        config = self.config = read_config(folder)
        self.device, self.block_size, self.dtype, self.graphs = device, block_size, getattr(torch, dtype), None
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
        token_bytes = 2 * len(self.model.layers) * kv_heads * dim * self.dtype.itemsize
        self.num_blocks = num_blocks or int(kv_cache_gib * 2**30 // (block_size * token_bytes))
        shape = self.num_blocks + 1, block_size, kv_heads, dim  # the one more, which the manager does not know, is for padding
        self.caches = [self.attention.cache(*shape, dtype=self.dtype, device=device) for _ in self.model.layers]

    def batch(self, seqs: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
        """(token ids [T], positions [T], rows whose logits are wanted, the rest) of a step. Built on the host, sent in one piece."""
        spans = [range(s.num_computed_tokens, s.num_computed_tokens + s.num_scheduled_tokens) for s in seqs]
        tokens = [t for s, span in zip(seqs, spans, strict=True) for t in s.token_ids[span.start : span.stop]]
        slots = [s.block_table[p // self.block_size] * self.block_size + p % self.block_size for s, span in zip(seqs, spans, strict=True) for p in span]
        ends, lengths = list(accumulate(map(len, spans))), [span.stop for span in spans]
        rows = [end - 1 for s, length, end in zip(seqs, lengths, ends, strict=True) if length == len(s)]  # the last token of who is computed to its end
        width = max(len(s.block_table) for s in seqs)
        table = [block for s in seqs for block in s.block_table + [0] * (width - len(s.block_table))]
        parts = tokens, list(chain(*spans)), slots, rows, lengths, [0, *ends], table
        sent = torch.frombuffer(array("q", chain(*parts)), dtype=torch.int64).to(self.device).split([len(part) for part in parts])
        tokens, positions, slots, rows, seq_lens, query_start, table = (*sent[:4], *(part.int() for part in sent[4:]))
        return tokens, positions, rows, Batch(slots, table.view(-1, width), seq_lens, query_start, max(map(len, spans)), max(lengths))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.attention.prepare(batch)
        return self.model.forward(tokens, positions, lambda i, q, k, v: self.attention.attend(self.caches[i], batch, q, k, v), rows)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence]) -> list[int]:
        """Compute the scheduled tokens of `seqs`. Returns the next token of each that is now computed to its end."""
        ending = [s for s in seqs if s.num_computed_tokens + s.num_scheduled_tokens == len(s)]
        decode = len(ending) == len(seqs) == sum(s.num_scheduled_tokens for s in seqs)
        return sample(self.graphs.forward(self, seqs) if self.graphs and decode else self.forward(*self.batch(seqs)), ending)
