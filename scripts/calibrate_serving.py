"""A server that is measured: vLLM's engine with random weights, how long it decodes and reads.

scripts/calibrate.py runs this file as a process of its own, with the engine's options as JSON, and
reads what vLLM says of its memory in what it writes.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams

BATCHES = (1, 8, 32, 128)  # requests that decode together
PROMPT = 16  # tokens of each
ANSWER = 128
PREFILLS = ((1, 1024), (8, 1024), (1, 8192))  # prompts read at once, and tokens of each
REPEATS = 3


def main() -> None:
    llm = LLM(**json.loads(sys.argv[1]))
    print("measured " + json.dumps(times(llm)), flush=True)


def times(llm: LLM) -> dict[str, float]:
    """{batch_<b>_step_ms, prefill_<prompts>x<tokens>_ms}: of those that this server can hold."""
    limits = llm.llm_engine.vllm_config
    longest = limits.model_config.max_model_len
    most = limits.scheduler_config.max_num_seqs
    vocabulary = limits.model_config.get_vocab_size()
    sent = 0

    def seconds(batch: int, prompt_tokens: int, answer_tokens: int) -> float:
        """The shortest time in which `batch` prompts, every one new, are answered."""
        nonlocal sent
        params = SamplingParams(
            temperature=0, max_tokens=answer_tokens, ignore_eos=True, detokenize=False
        )
        took = []
        for _ in range(1 + REPEATS):  # the first compiles what is compiled at first use
            prompts = []
            for _ in range(batch):
                sent += 1
                ids = [(17 * sent + 31 * j) % vocabulary for j in range(prompt_tokens)]
                prompts.append({"prompt_token_ids": ids})
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            took.append(time.perf_counter() - began)
        return min(took[1:])

    measured = {}
    for batch in BATCHES:
        if batch <= most and PROMPT + ANSWER < longest:
            decoding = seconds(batch, PROMPT, ANSWER + 1) - seconds(batch, PROMPT, 1)
            measured[f"batch_{batch}_step_ms"] = round(1e3 * decoding / ANSWER, 3)
    for prompts, tokens in PREFILLS:
        if prompts <= most and tokens < longest:
            took = seconds(prompts, tokens, 1)
            measured[f"prefill_{prompts}x{tokens}_ms"] = round(1e3 * took, 3)
    return measured


if __name__ == "__main__":
    main()
