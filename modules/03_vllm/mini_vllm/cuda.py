"""For GPUs: paged attention by the flash attention that vLLM 0.26 ships (arXiv 2307.08691), and decode steps as CUDA graphs."""

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from mini_vllm.attention import TorchAttention
from mini_vllm.sequence import Sequence


class CudaAttention(TorchAttention):
    """With the same cache; bfloat16 and float16 only, as the kernel, of which there are versions: 3 on Hopper, 2 on a 4090."""
    def prepare(self, batch) -> None:
        options = {"max_seqlen_q": batch.max_query_len, "cu_seqlens_q": batch.query_start, "max_seqlen_k": batch.max_seq_len, "seqused_k": batch.seq_lens}
        options |= {"block_table": batch.block_table, "causal": True, "fa_version": get_flash_attn_version()}
        batch.metadata = lambda q, k, v: flash_attn_varlen_func(q, k, v, **options)

    def attend(self, cache, batch, q, k, v) -> torch.Tensor:
        keys, values = cache.flatten(1, 2)
        keys[batch.slots], values[batch.slots] = k, v
        return batch.metadata(q, *cache).flatten(1)


class CudaGraphs:
    """Decode steps, recorded once and replayed: the host starts one graph instead of some twenty kernels in every layer.
    A graph has fixed shapes and addresses: one is recorded for each of some numbers of sequences, and a step is padded to the next."""

    @torch.inference_mode()
    def __init__(self, runner, longest: int, max_num_seqs: int):
        self.graphs, pool = {}, torch.cuda.graph_pool_handle()  # the runner has us: did we keep it, neither would be freed
        self.padding = Sequence([0], 1, num_scheduled_tokens=1, block_table=[runner.num_blocks])  # one token in the block of nobody
        for size in sorted({1, 2, 4, *range(8, max_num_seqs + 8, 8)}, reverse=True):  # the largest first: the others share its memory
            inputs = *_, batch = runner.batch([self.padding] * size)
            batch.max_seq_len, batch.block_table = longest, batch.block_table.new_zeros(size, -(-longest // runner.block_size))
            runner.forward(*inputs)  # what libraries do at their first call must not be recorded
            with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=pool):
                logits = runner.forward(*inputs)
            self.graphs[size] = graph, inputs, logits  # the inputs stay where the graph reads them

    def forward(self, runner, seqs: list[Sequence]) -> torch.Tensor:
        """Logits [S, vocabulary] of a step in which every sequence computes its last token."""
        graph, (tokens, positions, _, batch), logits = self.graphs[min(size for size in self.graphs if size >= len(seqs))]
        new_tokens, new_positions, _, new = runner.batch(seqs + [self.padding] * (len(logits) - len(seqs)))
        tokens[:], positions[:], batch.slots[:], batch.seq_lens[:] = new_tokens, new_positions, new.slots, new.seq_lens
        batch.block_table[:, : new.block_table.shape[1]] = new.block_table
        graph.replay()
        return logits[: len(seqs)]
