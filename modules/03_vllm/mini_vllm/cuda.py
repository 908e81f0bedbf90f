"""For GPUs: flash attention (arXiv 2307.08691) as vLLM 0.26 ships it, and CUDA graphs."""

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from mini_vllm.attention import Batch, TorchAttention
from mini_vllm.sequence import Sequence


class CudaAttention(TorchAttention):
    """With the same cache. The kernel takes bfloat16 and float16; on a 4090 it is version 2."""

    def prepare(self, batch: Batch):
        batch.metadata = {
            "max_seqlen_q": batch.max_query_len,
            "cu_seqlens_q": batch.query_start_loc,
            "max_seqlen_k": batch.max_seq_len,
            "seqused_k": batch.seq_lens,
            "block_table": batch.block_table,
            "causal": True,
            "fa_version": get_flash_attn_version(),
        }

    def attend(self, cache, batch: Batch, q, k, v):
        cache.flatten(1, 2)[:, batch.slot_mapping] = torch.stack((k, v))
        return flash_attn_varlen_func(q, *cache, **batch.metadata).flatten(1)


class CudaGraphs:
    """Decode steps, recorded once and replayed.

    The host starts one graph instead of some twenty kernels a layer. Shapes and addresses are
    fixed: one is recorded for each of some numbers of sequences, and a step padded to the next.
    """

    @torch.inference_mode()
    def __init__(self, runner, longest: int, max_num_seqs: int):
        if "num_experts_per_tok" in runner.config:
            raise ValueError(
                "no CUDA graph can record this mixture of experts (mlp.py): choose enforce_eager"
            )
        # `runner` is not kept: it has us, and in a circle neither would be freed.
        self.recordings = {}
        block_of_nobody = [runner.num_blocks]
        self.padding = Sequence([0], 1, num_scheduled_tokens=1, block_table=block_of_nobody)
        most_blocks = -(-longest // runner.block_size)  # of a sequence
        pool = torch.cuda.graph_pool_handle()
        sizes = {1, 2, 4, *range(8, max_num_seqs + 8, 8)}
        for size in sorted(sizes, reverse=True):  # the largest first: the others share its memory
            batch = runner.send(runner.prepare([self.padding] * size))
            batch.max_seq_len = longest
            batch.block_table = batch.block_table.new_zeros(size, most_blocks)
            runner.forward(batch)  # what libraries do at their first call must not be recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = runner.forward(batch)
            # It knows its tensors by their addresses only: kept with it, they live as long.
            self.recordings[size] = (graph, batch, logits)

    def forward(self, runner, seqs) -> Tensor:
        """Logits [S, vocabulary] of a step in which every sequence computes its last token."""
        size = min(size for size in self.recordings if size >= len(seqs))
        graph, batch, logits = self.recordings[size]
        padded = seqs + [self.padding] * (size - len(seqs))
        step = runner.send(runner.prepare(padded))
        changing = ("tokens", "positions", "slot_mapping", "seq_lens")  # of what the graph reads
        for name in changing:
            getattr(batch, name).copy_(getattr(step, name))
        batch.block_table[:, : step.block_table.shape[1]] = step.block_table
        graph.replay()
        return logits[: len(seqs)]
