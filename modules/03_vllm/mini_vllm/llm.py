"""The engine as its user sees it: add requests, step until they are finished, abort those nobody waits for."""

import json
from pathlib import Path

from mini_vllm.block_manager import BlockManager
from mini_vllm.model_runner import ModelRunner
from mini_vllm.scheduler import Scheduler
from mini_vllm.sequence import SamplingParams, Sequence


class LLM:
    def __init__(self, model, device: str = "cpu", dtype: str = "bfloat16", *, max_model_len: int = 2048, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048,
                 block_size: int = 16, kv_cache_gib: float = 1.0, num_blocks: int | None = None, attention: str = "kernel", enforce_eager: bool = False):  # fmt: skip
        """`model`: folder. The cache has `num_blocks` blocks, or what `kv_cache_gib` GiB hold. `attention`: kernel (vLLM's) or torch. `enforce_eager`: no CUDA graphs."""
        runner = self.model_runner = ModelRunner(folder := Path(model), device, dtype, block_size, kv_cache_gib, num_blocks, attention)
        eos = (json.loads(file.read_text()) if (file := folder / "generation_config.json").is_file() else runner.config).get("eos_token_id")
        from transformers import AutoTokenizer  # now, for it takes seconds and a refused model needs none
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.longest = min(max_model_len, runner.config["max_position_embeddings"], runner.num_blocks * block_size)  # tokens of a request
        if device == "cuda" and attention == "kernel" and not enforce_eager:
            from mini_vllm.cuda import CudaGraphs
            runner.graphs = CudaGraphs(runner, self.longest, max_num_seqs)
        manager, eos_token_ids = BlockManager(runner.num_blocks, block_size), eos if isinstance(eos, list) else [eos]
        self.scheduler = Scheduler(manager, max_num_seqs, max_num_batched_tokens, eos_token_ids)
        self.abort = self.scheduler.abort  # (seq): nobody waits for this request any more

    def request(self, prompt: str | list[int], params: SamplingParams) -> Sequence:
        """A checked request, not added yet. ValueError where it could never be finished."""
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if not tokens:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(tokens) + params.max_tokens > self.longest:
            raise ValueError(f"{len(tokens)} tokens of prompt and {params.max_tokens} of output are more than the {self.longest} that a request may have here")
        return Sequence(tokens, len(tokens), params)

    def add_request(self, prompt: str | list[int], params: SamplingParams) -> Sequence:
        """The request as it waits; it will be `finished`, and its tokens in `completion_token_ids`."""
        self.scheduler.waiting.append(seq := self.request(prompt, params))
        return seq

    def step(self) -> list[Sequence]:
        """One pass of the model over what the scheduler chose. Returns who finished."""
        scheduled = self.scheduler.schedule()
        return self.scheduler.postprocess(scheduled, self.model_runner.run(scheduled))

    def generate(self, prompts: list, params: list[SamplingParams], watch=lambda llm: None) -> list[dict]:
        """{text, token_ids} for each prompt, in their order. `watch(self)` is called after every step."""
        seqs = [self.request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]  # one that is refused leaves none behind
        self.scheduler.waiting += seqs
        while not all(seq.finished for seq in seqs):
            self.step()
            watch(self)
        return [{"text": self.tokenizer.decode(s.completion_token_ids, skip_special_tokens=True), "token_ids": s.completion_token_ids} for s in seqs]
