"""A server that is measured: vLLM's engine with random weights, how long it decodes and reads.

scripts/calibrate.py runs this file as a process of its own, with the engine's options as JSON, and
reads what vLLM says of its memory in what it writes. The times are the engine's own: a request
carries when it was scheduled, and when it had its first token and its last.
"""

import json
import sys

from vllm import LLM, SamplingParams

BATCHES = (1, 8, 32, 128)  # requests that decode together
PROMPT = 16  # tokens of each
ANSWER = 128
PREFILLS = ((1, 1024), (8, 1024), (1, 8192))  # prompts sent at once, and tokens of each
REPEATS = 3


def main() -> None:
    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=False)
    print("measured " + json.dumps(times(llm)), flush=True)


def times(llm: LLM) -> dict[str, float]:
    """{batch_<b>_step_ms, prefill_<prompts>x<tokens>_ms}: of those that this server can hold."""
    limits = llm.llm_engine.vllm_config
    longest = limits.model_config.max_model_len
    most = limits.scheduler_config.max_num_seqs
    vocabulary = limits.model_config.get_vocab_size()
    sent = 0

    def answered(batch: int, prompt_tokens: int, answer_tokens: int) -> list:
        """The engine's times of `batch` requests, every prompt a new one."""
        nonlocal sent
        length = {"max_tokens": answer_tokens, "ignore_eos": True}
        params = SamplingParams(temperature=0, detokenize=False, **length)
        prompts = []
        for _ in range(batch):
            sent += 1
            ids = [(17 * sent + 31 * j) % vocabulary for j in range(prompt_tokens)]
            prompts.append({"prompt_token_ids": ids})
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.metrics for output in outputs]

    def decoding(batch: int) -> float:
        """Seconds of a step while all decode: from the last first token to the last token."""
        requests = answered(batch, PROMPT, ANSWER)
        all_began = max(request.first_token_ts for request in requests)
        all_ended = max(request.last_token_ts for request in requests)
        return (all_ended - all_began) / (ANSWER - 1)

    def reading(prompts: int, tokens: int) -> float:
        """Seconds from the first that is scheduled to the last first token."""
        requests = answered(prompts, tokens, 1)
        all_ended = max(request.first_token_ts for request in requests)
        return all_ended - min(request.scheduled_ts for request in requests)

    def shortest(measure, *sizes: int) -> float:
        """In ms. The first time compiles what is compiled at first use, and does not count."""
        took = [measure(*sizes) for _ in range(1 + REPEATS)]
        return round(1e3 * min(took[1:]), 3)

    measured = {}
    for batch in BATCHES:
        if batch <= most and PROMPT + ANSWER <= longest:
            measured[f"batch_{batch}_step_ms"] = shortest(decoding, batch)
    for prompts, tokens in PREFILLS:
        if prompts <= most and tokens < longest:
            measured[f"prefill_{prompts}x{tokens}_ms"] = shortest(reading, prompts, tokens)
    return measured


if __name__ == "__main__":
    main()
