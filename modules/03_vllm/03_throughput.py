"""Why vLLM: the same requests of mixed length through transformers' static batches and through vLLM's continuous batching.

In a static batch every sequence waits for the longest one: the short ones' places are computed and thrown away. vLLM gives a
finished sequence's place to the next request at the very next step, and pages the KV cache so that many fit.

    python modules/03_vllm/03_throughput.py                       # on the detected profile
    python modules/03_vllm/03_throughput.py --batch-size 32       # a larger static batch wastes more, but reads the weights less often
    python modules/03_vllm/03_throughput.py --sigma 0             # all outputs equally long: what is left of the difference?

Look at: `useful` (share of the static batches' places that held a token somebody asked for), and the ratio of the two rates.
Output lengths are lognormal, as real traffic is skewed; both engines produce exactly the same number of tokens per request.
"""

import argparse
import time

from lab import data, fail, models, results
from lab.profile import load_profile


def run_transformers(folder, device: str, dtype: str, requests, batch_size: int) -> tuple[float, int]:
    """Static batches in order of arrival. Returns (seconds, places computed): each batch runs for its longest request."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()

    def generate(batch):
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt").to(device)
        longest = max(length for _, length in batch)
        model.generate(**inputs, min_new_tokens=longest, max_new_tokens=longest, do_sample=False)
        return longest * len(batch)

    generate([("warm up", 4)] * batch_size)
    began, places = time.perf_counter(), 0
    for start in range(0, len(requests), batch_size):
        places += generate(requests[start : start + batch_size])
        print(f"  transformers: {min(start + batch_size, len(requests))}/{len(requests)} requests, {time.perf_counter() - began:.0f} s", flush=True)
    return time.perf_counter() - began, places


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
    parser.add_argument("--batch-size", type=int, default=p.batch_size, help="of transformers' static batches (default: %(default)s)")
    args = parser.parse_args()
    if args.batch_size < 1:
        fail("--batch-size must be at least 1")
    requests = data.trace_of(args)
    folder = models.model_folder(args.model)

    tokens = sum(length for _, length in requests)
    lengths = sorted(length for _, length in requests)
    print(f"{len(requests)} requests, {tokens} tokens out: shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")

    static_s, places = run_transformers(folder, profile.device, profile.dtype, requests, args.batch_size)
    vllm_s = run_vllm(folder, profile.dtype, requests, {flag.replace("-", "_"): value for flag, value in p.args.items()})

    print(f"\n{'':32}{'tokens/s':>10}{'seconds':>10}{'useful':>9}")
    print(f"{f'transformers, batches of {args.batch_size}':32}{tokens / static_s:10.1f}{static_s:10.1f}{tokens / places:9.0%}")
    print(f"{'vLLM, continuous batching':32}{tokens / vllm_s:10.1f}{vllm_s:10.1f}{1:9.0%}")
    print(f"vLLM / transformers: {static_s / vllm_s:.1f}x")
    metrics = {"transformers_tok_per_s": round(tokens / static_s, 1), "vllm_tok_per_s": round(tokens / vllm_s, 1)}
    metrics |= {"vllm_over_transformers_ratio": round(static_s / vllm_s, 2), "static_useful_ratio": round(tokens / places, 3)}
    metrics |= {"request_count": len(requests), "output_tokens_count": tokens}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
