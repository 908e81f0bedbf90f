"""Why vLLM: the same requests of mixed length through transformers' static batches and through vLLM's continuous batching.

In a static batch every sequence waits for the longest one: the short ones' places are computed and thrown away. vLLM gives a
finished sequence's place to the next request at the very next step, and pages the KV cache so that many fit.

    python modules/03_vllm/05_throughput.py                       # on the detected profile
    python modules/03_vllm/05_throughput.py --batch-size 8 32     # a larger static batch wastes more, but reads the weights less often
    python modules/03_vllm/05_throughput.py --compile             # transformers at its best: static KV cache, decode step compiled
    python modules/03_vllm/05_throughput.py --sigma 0             # all outputs equally long: what is left of the difference?

Look at: `useful` (share of the static batches' places that held a token somebody asked for), and the ratio of the two rates.
Output lengths are lognormal, as real traffic is skewed; both engines produce exactly the same number of tokens per request.
"""

import argparse
import itertools
import time

from lab import data, fail, jobs, models, results
from lab.profile import load_profile


def load_transformers(folder, device: str, dtype: str):
    """(tokenizer, model) of transformers, ready to generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def run_transformers(tokenizer, model, requests, batch_size: int, compiled: bool) -> tuple[float, int]:
    """Static batches in order of arrival, each for as long as its longest request. Returns (seconds, places computed).

    `compiled`: a KV cache of fixed size, so that the decode step can be compiled (and is one CUDA graph on a GPU).
    """
    import torch
    from transformers import CompileConfig, StaticCache

    longest = max(len(ids) for ids in tokenizer([prompt for prompt, _ in requests])["input_ids"]) + max(length for _, length in requests)
    caches: dict[int, dict] = {}

    def generate(batch):
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt").to(model.device)
        tokens = max(length for _, length in batch)
        if compiled:
            if len(batch) not in caches:
                config = CompileConfig()
                config._compile_all_devices = True  # else only on a GPU
                caches[len(batch)] = {"past_key_values": StaticCache(config=model.config, max_cache_len=longest), "compile_config": config}
            else:
                caches[len(batch)]["past_key_values"].reset()
        model.generate(**inputs, **caches.get(len(batch), {}), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return tokens * len(batch)

    generate([("warm up", 4)] * min(batch_size, len(requests)))
    began, places = time.perf_counter(), 0
    for start in range(0, len(requests), batch_size):
        places += generate(requests[start : start + batch_size])
        print(f"  transformers: {min(start + batch_size, len(requests))}/{len(requests)} requests, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    if compiled:
        torch.compiler.reset()  # what was compiled for this batch size, and its CUDA graphs
    return seconds, places


def run_vllm(folder, dtype: str, requests, engine_args: dict) -> float:
    """All requests at once; vLLM's scheduler forms the batch of every step anew. Returns seconds."""
    import gc

    import torch
    from vllm import LLM, SamplingParams

    gc.collect()
    torch.cuda.empty_cache()  # vLLM counts what transformers left on the card as taken
    print("  vllm: starting the engine", flush=True)
    llm = LLM(model=str(folder), dtype=dtype, disable_log_stats=True, **engine_args)
    llm.generate(["warm up"] * 4, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in requests]
    began = time.perf_counter()
    outputs = llm.generate([prompt for prompt, _ in requests], params)
    seconds = time.perf_counter() - began
    made = sum(len(o.outputs[0].token_ids) for o in outputs)
    assert made == sum(length for _, length in requests), f"vLLM made {made} tokens"
    llm.llm_engine.engine_core.shutdown()  # before the last line of stdout: the engine logs while it stops
    return seconds


def main() -> None:
    profile = load_profile()
    p = profile.throughput
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    data.add_trace_flags(parser, p)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[p.batch_size], help=f"of transformers' static batches, one or several (default: {p.batch_size})")
    parser.add_argument("--compile", action="store_true", help="transformers also with a static KV cache and its decode step compiled")
    args = parser.parse_args()
    if min(args.batch_size) < 1:
        fail("--batch-size must be at least 1")
    requests = data.trace_of(args)
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    tokens = sum(length for _, length in requests)
    lengths = sorted(length for _, length in requests)
    print(f"{len(requests)} requests, {tokens} tokens out: shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")

    # -----------------------------------------------------------------------------
    # 1. transformers, each way that was asked for; then vLLM

    tokenizer, model = load_transformers(folder, profile.device, profile.dtype)
    ways = {}
    for size, compiled in itertools.product(args.batch_size, (False, True) if args.compile else (False,)):
        print(f"  transformers: batches of {size}{', compiling' if compiled else ''}", flush=True)
        ways[size, compiled] = run_transformers(tokenizer, model, requests, size, compiled)
    del model
    vllm_s = run_vllm(folder, profile.dtype, requests, {flag.replace("-", "_"): value for flag, value in p.args.items()})

    # -----------------------------------------------------------------------------
    # 2. Side by side: vLLM against transformers' best

    print(f"\n{'':44}{'tokens/s':>10}{'seconds':>10}{'useful':>9}")
    metrics: dict[str, float] = {}
    for (size, compiled), (seconds, places) in ways.items():
        print(f"{f'transformers, batches of {size}' + (', static cache, compiled' if compiled else ''):44}{tokens / seconds:10.1f}{seconds:10.1f}{tokens / places:9.0%}")
        metrics[f"batch_{size}{'_compiled' if compiled else ''}_tok_per_s"] = round(tokens / seconds, 1)
    static_s, places = min(ways.values())
    print(f"{'vLLM, continuous batching':44}{tokens / vllm_s:10.1f}{vllm_s:10.1f}{1:9.0%}")
    print(f"vLLM / transformers{', its best' if len(ways) > 1 else ''}: {static_s / vllm_s:.1f}x")
    metrics |= {"transformers_tok_per_s": round(tokens / static_s, 1), "vllm_tok_per_s": round(tokens / vllm_s, 1)}
    metrics |= {"vllm_over_transformers_ratio": round(static_s / vllm_s, 2), "static_useful_ratio": round(tokens / places, 3)}
    metrics |= {"request_count": len(requests), "output_tokens_count": tokens}
    results.finish(__file__, metrics, vars(args), "best" if len(ways) > 1 else "")


if __name__ == "__main__":
    main()
