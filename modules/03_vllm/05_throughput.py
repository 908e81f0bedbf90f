"""Why vLLM: the same requests through transformers' static batches and vLLM's continuous batching.

In a static batch every sequence waits for the longest one: the short ones' places are computed and
thrown away. vLLM gives a finished sequence's place to the next request at the very next step, and
pages the KV cache so that many fit.

    python modules/03_vllm/05_throughput.py                     # on the detected profile
    python modules/03_vllm/05_throughput.py --batch-size 8 32   # larger static batches waste more
    python modules/03_vllm/05_throughput.py --compile           # transformers at its best
    python modules/03_vllm/05_throughput.py --sigma 0           # all outputs equally long

A larger static batch reads the weights less often; `--compile` gives transformers a static KV cache
and a compiled decode step; with outputs equally long one sees what is left of the difference.

Look at: `useful` (share of the static batches' places that held a token somebody asked for), and
the ratio of the two rates. Output lengths are lognormal, as real traffic is skewed; both engines
produce exactly the same number of tokens per request.
"""

import argparse
import itertools
import time

from lab import data, fail, jobs, models, results
from lab.profile import load_profile
from lab.table import table


def run_vllm(folder, dtype: str, requests, engine_args: dict) -> float:
    """Seconds for all requests, sent at once: vLLM's scheduler forms every step's batch anew."""
    import gc

    import torch
    from vllm import LLM, SamplingParams

    gc.collect()
    torch.cuda.empty_cache()  # vLLM counts what transformers left on the card as taken
    print("  vllm: starting the engine", flush=True)
    llm = LLM(model=str(folder), dtype=dtype, disable_log_stats=True, **engine_args)
    llm.generate(["warm up"] * 4, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    prompts = [prompt for prompt, _ in requests]
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in requests
    ]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert made == sum(length for _, length in requests), f"vLLM made {made} tokens"
    # Before the last line of stdout: the engine logs while it stops.
    llm.llm_engine.engine_core.shutdown()
    return seconds


def load_transformers(folder, device: str, dtype: str):
    """(tokenizer, model) of transformers, ready to generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return tokenizer, model.to(device).eval()


def run_transformers(
    tokenizer, model, requests: list[tuple[str, int]], batch_size: int, compiled: bool
) -> tuple[float, int]:
    """Static batches in order of arrival, each for as long as its longest request.

    Returns (seconds, places computed). `compiled`: a KV cache of fixed size, so that the decode
    step can be compiled (and is one CUDA graph on a GPU).
    """
    import torch

    longest_prompt = max(len(tokenizer(prompt)["input_ids"]) for prompt, _ in requests)
    longest_answer = max(length for _, length in requests)
    caches: dict[int, dict] = {}  # by batch size: the last batch may be smaller

    def generate(batch: list[tuple[str, int]]) -> int:
        """Answer all of `batch`; returns the places computed."""
        prompts = [prompt for prompt, _ in batch]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
        tokens = max(length for _, length in batch)
        if compiled and len(batch) in caches:
            caches[len(batch)]["past_key_values"].reset()
        elif compiled:
            caches[len(batch)] = static_cache(model, longest_prompt + longest_answer)
        options = caches.get(len(batch), {})
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(**inputs, **options, **exactly, do_sample=False)
        return tokens * len(batch)

    generate([("warm up", 4)] * min(batch_size, len(requests)))
    places = 0
    began = time.perf_counter()
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        places += generate(batch)
        done = f"{start + len(batch)}/{len(requests)} requests"
        print(f"  transformers: {done}, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    if compiled:
        torch.compiler.reset()  # what was compiled for this batch size, and its CUDA graphs
    return seconds, places


def static_cache(model, tokens: int) -> dict:
    """Options of `generate` for a KV cache of fixed size and a compiled decode step."""
    from transformers import CompileConfig, StaticCache

    config = CompileConfig()
    config._compile_all_devices = True  # else only on a GPU
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    return {"past_key_values": cache, "compile_config": config}


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The model and the requests
    models.add_model_flag(parser, defaults.model)
    data.add_trace_flags(parser, defaults)
    # How hard transformers tries
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[defaults.batch_size],
        help=f"of transformers' static batches, one or several (default: {defaults.batch_size})",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="transformers also with a static KV cache and its decode step compiled",
    )
    args = parser.parse_args()
    if min(args.batch_size) < 1:
        fail("--batch-size must be at least 1")
    requests = data.trace_of(args)
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    tokens = sum(length for _, length in requests)
    lengths = sorted(length for _, length in requests)
    spread = f"shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
    print(f"{len(requests)} requests, {tokens} tokens out: {spread}")

    # -----------------------------------------------------------------------------
    # 1. transformers, each way that was asked for; then vLLM

    tokenizer, model = load_transformers(folder, profile.device, profile.dtype)
    ways = {}  # (batch size, compiled): (seconds, places computed)
    for size, compiled in itertools.product(args.batch_size, sorted({False, args.compile})):
        print(f"  transformers: batches of {size}{', compiling' if compiled else ''}", flush=True)
        ways[size, compiled] = run_transformers(tokenizer, model, requests, size, compiled)
    del model
    engine_args = {flag.replace("-", "_"): value for flag, value in defaults.args.items()}
    vllm_s = run_vllm(folder, profile.dtype, requests, engine_args)

    # -----------------------------------------------------------------------------
    # 2. Side by side: vLLM against transformers' best

    rows = []
    metrics: dict[str, float] = {}
    for (size, compiled), (seconds, places) in ways.items():
        name = f"transformers, batches of {size}{', static cache, compiled' if compiled else ''}"
        useful = f"{tokens / places:.0%}"
        rows.append([name, f"{tokens / seconds:.1f}", f"{seconds:.1f}", useful])
        key = f"batch_{size}{'_compiled' if compiled else ''}_tok_per_s"
        metrics[key] = round(tokens / seconds, 1)
    rows.append(["vLLM, continuous batching", f"{tokens / vllm_s:.1f}", f"{vllm_s:.1f}", "100%"])
    print()
    table(["", "tokens/s", "seconds", "useful"], rows)

    static_s, places = min(ways.values())
    best = ", its best" if len(ways) > 1 else ""
    print(f"vLLM / transformers{best}: {static_s / vllm_s:.1f}x")
    metrics |= {
        "transformers_tok_per_s": round(tokens / static_s, 1),
        "vllm_tok_per_s": round(tokens / vllm_s, 1),
        "vllm_over_transformers_ratio": round(static_s / vllm_s, 2),
        "static_useful_ratio": round(tokens / places, 3),
        "request_count": len(requests),
        "output_tokens_count": tokens,
    }
    results.finish(__file__, metrics, vars(args), "best" if len(ways) > 1 else "")


if __name__ == "__main__":
    main()
