"""The engine as its user sees it: add requests, step until they are finished, abort some."""

import json
from pathlib import Path

from mini_vllm.block_manager import BlockManager
from mini_vllm.model_runner import ModelRunner
from mini_vllm.scheduler import Scheduler
from mini_vllm.sequence import SamplingParams, Sequence


def eos_tokens(folder: Path, config: dict) -> list[int | None]:
    """The tokens that end an answer: generation_config.json says it, or the model's config."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else config
    eos = settings.get("eos_token_id")
    return eos if isinstance(eos, list) else [eos]


class LLM:
    def __init__(
        self,
        model,
        device: str = "cpu",
        dtype: str = "bfloat16",
        *,
        max_model_len: int = 2048,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        kv_cache_gib: float = 1.0,
        num_blocks: int | None = None,
        attention: str = "kernel",
        enforce_eager: bool = False,
    ):
        """`model`: folder. The cache has `num_blocks` blocks, or what `kv_cache_gib` GiB hold.

        `attention`: kernel (vLLM's) or torch. `enforce_eager`: no CUDA graphs.
        """
        folder = Path(model)
        runner = ModelRunner(folder, device, dtype, block_size, kv_cache_gib, num_blocks, attention)
        self.model_runner = runner
        from transformers import AutoTokenizer  # now: it takes seconds; a refused model needs none

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.longest = min(  # tokens of a request, its answer with it
            max_model_len, runner.config["max_position_embeddings"], runner.num_blocks * block_size
        )
        if device == "cuda" and attention == "kernel" and not enforce_eager:
            from mini_vllm.cuda import CudaGraphs

            runner.graphs = CudaGraphs(runner, self.longest, max_num_seqs)
        blocks = BlockManager(runner.num_blocks, block_size)
        eos = eos_tokens(folder, runner.config)
        self.scheduler = Scheduler(blocks, max_num_seqs, max_num_batched_tokens, eos)

    def request(self, prompt, params) -> Sequence:
        """A checked request, not added yet. ValueError where it could never be finished."""
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(tokens) + params.max_tokens > self.longest:
            raise ValueError(
                f"{len(tokens)} tokens of prompt and {params.max_tokens} of output are more than "
                f"the {self.longest} that a request may have here"
            )
        return Sequence(tokens, len(tokens), params)

    def add_request(self, prompt: str | list[int], params: SamplingParams) -> Sequence:
        """The waiting request; once it is `finished`, `completion_token_ids` are its answer."""
        seq = self.request(prompt, params)
        self.scheduler.waiting.append(seq)
        return seq

    def reset_prefix_cache(self):
        """Forget what finished requests left in the cache. While none runs."""
        blocks = self.scheduler.block_manager
        self.scheduler.block_manager = BlockManager(blocks.num_blocks, blocks.block_size)

    def abort(self, seq: Sequence):
        """Nobody waits for this request any more."""
        self.scheduler.abort(seq)

    def step(self) -> list[Sequence]:
        """One pass of the model over what the scheduler chose. Returns who finished."""
        scheduled = self.scheduler.schedule()
        token_ids = self.model_runner.run(scheduled)
        return self.scheduler.postprocess(scheduled, token_ids)

    def generate(self, prompts: list, params: list[SamplingParams], watch=lambda llm: None):
        """{text, token_ids} for each prompt, in order. `watch(self)` is called after every step."""
        # All are checked before one is added: where one is refused, none is left behind.
        seqs = [self.request(*request) for request in zip(prompts, params, strict=True)]
        self.scheduler.waiting += seqs
        while not all(seq.finished for seq in seqs):
            self.step()
            watch(self)
        answers = [seq.completion_token_ids for seq in seqs]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [{"text": text, "token_ids": ids} for text, ids in zip(texts, answers, strict=True)]
