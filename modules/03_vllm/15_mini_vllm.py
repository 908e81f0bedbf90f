"""A small vLLM written from scratch (mini_vllm/) against the real one: the same requests.

    make mini-vllm                        # both engines, on the detected profile
    python modules/03_vllm/15_mini_vllm.py --only mini --blocks 64          # watch the preemptions
    python modules/03_vllm/15_mini_vllm.py --only mini --batched-tokens 64  # prompts in chunks
    python modules/03_vllm/15_mini_vllm.py --only mini --enforce-eager      # no CUDA graphs
    python modules/03_vllm/15_mini_vllm.py --moe --enforce-eager            # a mixture of experts
    python modules/03_vllm/15_mini_vllm.py --requests 256 --repeat 3        # worth quoting: medians

In the second, 64 blocks are too few for all requests; in the third, small chunks of prompts are
read beside others' decoding; the fourth shows on a GPU what CUDA graphs are worth; the fifth runs a
small Qwen3-MoE of random weights, which mini_vllm cannot record in CUDA graphs (mini_vllm/mlp.py).

Look at: what the scheduler did, a line a second: prompts are read and tokens are made in the same
steps, a finished request's blocks go to the next one at once. Then at the ratio: what is left of
vLLM's speed in 850 lines. vLLM runs at its defaults, which includes compiling the model (a minute,
once); every repetition begins with an empty prefix cache.
"""

import argparse
import statistics
import time

from random_moe import random_moe

from lab import data, fail, jobs, models, results
from lab.profile import load_profile

HEADER = "   step  running  waiting  tokens in step  free blocks  from cache  preempted"
LINE = "{:7}{:9}{:9}{:16}{:13}{:12}{:11}"


def run_mini(llm, requests: list, params: list) -> tuple[float, dict]:
    """Seconds of all requests at once, and what the scheduler counted; its state every second."""
    llm.reset_prefix_cache()
    scheduler = llm.scheduler
    manager = scheduler.block_manager
    stats = scheduler.stats
    stats.clear()
    print(HEADER)
    began = time.perf_counter()
    last = began

    def watch(_) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < 1 and stats["steps"] > 1:
            return
        last = now
        in_step = sum(seq.num_scheduled_tokens for seq in scheduler.running)
        queues = (len(scheduler.running), len(scheduler.waiting))
        counts = (stats["cached_tokens"], stats["preemptions"])
        line = LINE.format(stats["steps"], *queues, in_step, len(manager.free), *counts)
        print(line, flush=True)

    outputs = llm.generate([prompt for prompt, _ in requests], params, watch)
    seconds = time.perf_counter() - began
    assert [len(output["token_ids"]) for output in outputs] == [length for _, length in requests]
    assert len(manager.free) == manager.num_blocks, "a block was lost"
    return seconds, dict(stats)


def run_vllm(folder, dtype: str, requests: list, engine_args: dict, repeat: int) -> list[float]:
    """Seconds of each repetition."""
    from vllm import LLM, SamplingParams

    print("  vllm: starting the engine", flush=True)
    llm = LLM(model=str(folder), dtype=dtype, disable_log_stats=True, **engine_args)
    llm.generate(["warm up"] * 4, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    prompts = [prompt for prompt, _ in requests]
    lengths = [length for _, length in requests]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    seconds = []
    for _ in range(repeat):
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
        print(f"  vllm: {seconds[-1]:.1f} s", flush=True)
    # Before the last line of stdout: the engine logs while it stops.
    llm.llm_engine.engine_core.shutdown()
    return seconds


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    on_gpu = profile.device == "cuda"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The model and the requests
    models.add_model_flag(parser, defaults.model)
    parser.add_argument(
        "--moe",
        action="store_true",
        help="a small Qwen3-MoE with random weights, made here; --model gives its tokenizer",
    )
    data.add_trace_flags(parser, defaults)
    # What runs, and how often
    parser.add_argument("--only", choices=("mini", "vllm"), help="leave the other engine out")
    parser.add_argument(
        "--repeat", type=int, default=1, help="the median of so many counts (default: %(default)s)"
    )
    # The small engine
    parser.add_argument(
        "--blocks",
        type=int,
        help="of mini_vllm's cache, 16 tokens each (default: what 1 GiB holds, on a GPU 6)",
    )
    parser.add_argument(
        "--batched-tokens",
        type=int,
        default=8192 if on_gpu else 2048,
        help="most tokens of a step of mini_vllm (default: %(default)s)",
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="mini_vllm without CUDA graphs (a CPU has none, and a mixture of experts)",
    )
    args = parser.parse_args()
    if min(args.repeat, args.batched_tokens, 1 if args.blocks is None else args.blocks) < 1:
        fail("--repeat, --blocks and --batched-tokens must be at least 1")
    requests = data.trace_of(args)
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)
    if args.moe:
        folder = random_moe(folder)
    tokens = sum(length for _, length in requests)
    metrics = {"request_count": len(requests), "output_tokens_count": tokens}
    seconds: dict[str, float] = {}  # of each engine

    # -----------------------------------------------------------------------------
    # 1. The small engine

    if args.only != "vllm":
        from mini_vllm import LLM, SamplingParams

        try:
            llm = LLM(
                folder,
                profile.device,
                profile.dtype,
                max_model_len=defaults.args["max-model-len"],
                max_num_batched_tokens=args.batched_tokens,
                kv_cache_gib=6 if on_gpu else 1,
                num_blocks=args.blocks,
                enforce_eager=args.enforce_eager,
            )
            llm.generate(["warm up"] * 4, [SamplingParams(max_tokens=4, ignore_eos=True)] * 4)
            params = [SamplingParams(max_tokens=length, ignore_eos=True) for _, length in requests]
            runs = [run_mini(llm, requests, params) for _ in range(args.repeat)]
        except ValueError as e:
            fail(str(e))
        seconds["mini"] = statistics.median(run_s for run_s, _ in runs)
        counts = runs[-1][1]
        steps = counts["steps"]
        computed = counts["computed_tokens"]
        cached = counts["cached_tokens"]
        metrics |= {
            "mini_tok_per_s": round(tokens / seconds["mini"], 1),
            "mini_steps_count": steps,
            "mini_preemptions_count": counts.get("preemptions", 0),
            "mini_tokens_per_step_count": round(computed / steps, 1),
            "mini_prefix_hit_ratio": round(cached / (cached + computed), 4),
        }
        del llm  # vLLM counts what is left on the card as taken
        if on_gpu:
            import torch

            torch.cuda.empty_cache()

    # -----------------------------------------------------------------------------
    # 2. vLLM, at its defaults: it compiles the model

    if args.only != "mini":
        engine_args = {flag.replace("-", "_"): value for flag, value in defaults.args.items()}
        engine_args.pop("enforce_eager", None)
        runs = run_vllm(folder, profile.dtype, requests, engine_args, args.repeat)
        seconds["vllm"] = statistics.median(runs)
        metrics["vllm_tok_per_s"] = round(tokens / seconds["vllm"], 1)

    # -----------------------------------------------------------------------------
    # 3. Side by side

    medians = f", medians of {args.repeat}" if args.repeat > 1 else ""
    print(f"\n{len(requests)} requests, {tokens} tokens out{medians}")
    for name, took in seconds.items():
        print(f"{name:12}{tokens / took:10.1f} tokens/s{took:10.1f} s")
    if not args.only:
        ratio = seconds["vllm"] / seconds["mini"]
        metrics["mini_over_vllm_ratio"] = round(ratio, 3)
        print(f"mini / vllm: {ratio:.2f}x")
    results.finish(__file__, metrics, vars(args), "moe" if args.moe else args.only or "")


if __name__ == "__main__":
    main()
