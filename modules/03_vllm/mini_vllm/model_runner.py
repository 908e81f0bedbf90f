"""From scheduled sequences to tensors, through the model, to their next tokens.

An example of one step, with blocks of 4 tokens. A decodes: 5 of its 6 tokens are computed. B is
new: 3 tokens of its prompt of 7 still fit into this step.

                             A                        B
    token_ids                10 11 12 13 14 15        20 21 22 23 24 25 26
    num_computed_tokens      5                        0
    num_scheduled_tokens     1                        3
    block_table              7 2                      4 9

    `prepare` writes these lists, which `send` makes tensors of:

    tokens                   15                       20 21 22
    positions                5                        0 1 2
    slot_mapping             9                        16 17 18
    rows                     0
    seq_lens                 6                        3
    query_start_loc          0                        1             4
    block_table              7 2                      4 9

A's token 15 at position 5 goes into block_table[5 // 4] = 2, at offset 5 % 4 = 1: slot 2 * 4 + 1.
Its row 0 of the four has the logits of A's next token; B, in the middle of its prompt, has none.
"""

from array import array
from collections import defaultdict
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import Tensor

from mini_vllm.attention import Batch, CpuAttention, TorchAttention
from mini_vllm.model import Model, read_config, read_weights
from mini_vllm.sampler import sample
from mini_vllm.sequence import Sequence

KERNEL_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # vLLM's kernel for CPUs


class ModelRunner:
    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: str,
        block_size: int,
        kv_cache_gib: float,
        num_blocks: int | None,
        attention: str,
    ):
        self.config = read_config(folder)
        self.device = device
        self.dtype = getattr(torch, dtype)
        self.block_size = block_size
        self.model = Model(self.config, read_weights(folder, device, self.dtype))
        self.attention = self.backend(attention)
        self.graphs = None  # on a GPU: cuda.CudaGraphs
        kv_heads = self.config["num_key_value_heads"]
        head_dim = self.config["head_dim"]
        token_bytes = 2 * len(self.model.layers) * kv_heads * head_dim * self.dtype.itemsize
        self.num_blocks = num_blocks or int(kv_cache_gib * 2**30 // (block_size * token_bytes))
        blocks = self.num_blocks + 1  # one, unknown to the manager, for the padding of CUDA graphs
        shape = (blocks, block_size, kv_heads, head_dim)
        self.caches = [
            self.attention.cache(*shape, dtype=self.dtype, device=device) for _ in self.model.layers
        ]

    def backend(self, attention: str):
        """The attention called `attention`: "torch", or the "kernel" of this device."""
        head_dim = self.config["head_dim"]
        if attention == "torch":
            return TorchAttention()
        if self.device == "cuda":
            from mini_vllm.cuda import CudaAttention

            return CudaAttention()
        if self.block_size != 16 or head_dim not in KERNEL_HEAD_DIMS:
            raise ValueError(
                f"the kernel takes no blocks of {self.block_size} tokens with heads of {head_dim} "
                "numbers: choose attention=torch"
            )
        heads = self.config["num_attention_heads"]
        return CpuAttention(heads, self.config["num_key_value_heads"], head_dim, self.dtype)

    def prepare(self, seqs: list[Sequence]) -> dict[str, list[int]]:
        """The integers of a step, on the host: the table above."""
        step = defaultdict(list, rows=[], query_start_loc=[0])
        size = self.block_size
        width = max(len(seq.block_table) for seq in seqs)
        for seq in seqs:
            start = seq.num_computed_tokens
            end = start + seq.num_scheduled_tokens
            blocks = seq.block_table
            step["tokens"] += seq.token_ids[start:end]
            positions = range(start, end)
            step["positions"] += positions
            step["slot_mapping"] += [blocks[i // size] * size + i % size for i in positions]
            new_tokens = len(step["tokens"])
            if end == len(seq):  # computed to its end: the last token's logits choose the next
                step["rows"].append(new_tokens - 1)
            step["seq_lens"].append(end)
            step["query_start_loc"].append(new_tokens)
            step["block_table"] += blocks + [0] * (width - len(blocks))
        return step

    def send(self, lists: dict) -> Batch:
        """Those lists as tensors on the device, in one piece: each transfer is waited for."""
        numbers = torch.frombuffer(array("q", chain(*lists.values())), dtype=torch.int64)
        pieces = numbers.to(self.device).split([len(part) for part in lists.values()])
        tensors = dict(zip(lists, pieces, strict=True))
        for name in ("seq_lens", "query_start_loc", "block_table"):
            tensors[name] = tensors[name].int()  # as the kernels want them
        tensors["block_table"] = tensors["block_table"].view(len(lists["seq_lens"]), -1)
        return Batch(
            **tensors,
            max_query_len=max(end - start for start, end in pairwise(lists["query_start_loc"])),
            max_seq_len=max(lists["seq_lens"]),
        )

    def forward(self, batch: Batch) -> Tensor:
        """Logits [R, vocabulary] of the batch's `rows`."""

        def attend(layer, q, k, v):
            return self.attention.attend(self.caches[layer], batch, q, k, v)

        self.attention.prepare(batch)
        return self.model.forward(batch.tokens, batch.positions, attend, batch.rows)

    @torch.inference_mode()
    def run(self, seqs) -> list[int]:
        """Compute what is scheduled. The next token of each that is now computed to its end."""
        ending = [s for s in seqs if s.num_computed_tokens + s.num_scheduled_tokens == len(s)]
        all_decode = ending == seqs and all(seq.num_scheduled_tokens == 1 for seq in seqs)
        if self.graphs and all_decode:
            logits = self.graphs.forward(self, seqs)
        else:
            logits = self.forward(self.send(self.prepare(seqs)))
        return sample(logits, ending)
