"""A small vLLM written from scratch (mini_vllm/, ten small files) against the real one: the same
requests, the same number of tokens.

    make mini-vllm                                                     # both engines, on the detected profile
    python modules/03_vllm/15_mini_vllm.py --only mini --blocks 64     # a cache too small for all: watch the preemptions
    python modules/03_vllm/15_mini_vllm.py --only mini --batched-tokens 64    # prompts in small chunks beside others' decoding
    python modules/03_vllm/15_mini_vllm.py --only mini --enforce-eager # on a GPU, without CUDA graphs: what they are worth
    python modules/03_vllm/15_mini_vllm.py --requests 256 --repeat 3   # the one that is worth quoting: medians

Look at: what the scheduler did, a line a second: prompts are read and tokens are made in the same
steps, a finished request's blocks go to the next one at once. Then at the ratio: what is left of
vLLM's speed in 850 lines. vLLM runs at its defaults, which includes compiling the model (a minute,
once); every repetition begins with an empty prefix cache.
"""

import argparse
import statistics
import time

from lab import data, fail, jobs, models, results
from lab.profile import load_profile


def run_mini(llm, requests, params) -> tuple[float, dict]:
    """(seconds, what the scheduler counted) of all requests at once, a line of its state every
    second.
    """
    scheduler, manager = llm.scheduler, llm.scheduler.block_manager
    manager.__init__(
        manager.num_blocks, manager.block_size
    )  # nothing of the last repetition is remembered
    scheduler.stats.clear()
    print(
        f"{'step':>7}{'running':>9}{'waiting':>9}{'tokens in step':>16}{'free blocks':>13}{'from cache':>12}{'preempted':>11}"
    )
    began = last = time.perf_counter()

    def watch(_):
        nonlocal last
        if time.perf_counter() - last > 1 or scheduler.stats["steps"] == 1:
            last, s = time.perf_counter(), scheduler.stats
            tokens = sum(seq.num_scheduled_tokens for seq in scheduler.running)
            print(
                f"{s['steps']:7}{len(scheduler.running):9}{len(scheduler.waiting):9}{tokens:16}{len(manager.free):13}{s['cached_tokens']:12}{s['preemptions']:11}",
                flush=True,
            )

    outputs = llm.generate([prompt for prompt, _ in requests], params, watch)
    seconds = time.perf_counter() - began
    assert [len(o["token_ids"]) for o in outputs] == [length for _, length in requests]
    assert len(manager.free) == manager.num_blocks, "a block was lost"
    return seconds, dict(scheduler.stats)


def run_vllm(folder, dtype: str, requests, engine_args: dict, repeat: int) -> list[float]:
    """Seconds of each repetition."""
    from vllm import LLM, SamplingParams

    print("  vllm: starting the engine", flush=True)
    llm = LLM(model=str(folder), dtype=dtype, disable_log_stats=True, **engine_args)
    llm.generate(["warm up"] * 4, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    params, seconds = (
        [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            for _, length in requests
        ],
        [],
    )
    for _ in range(repeat):
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [length for _, length in requests]
        print(f"  vllm: {seconds[-1]:.1f} s", flush=True)
    # before the last line of stdout: the engine logs while it stops
    llm.llm_engine.engine_core.shutdown()
    return seconds


def main() -> None:
    profile = load_profile()
    p = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=p.model,
        help="name in configs/models.yaml, hub id or folder (default: %(default)s)",
    )
    data.add_trace_flags(parser, p)
    parser.add_argument(
        "--repeat", type=int, default=1, help="the median of so many counts (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("mini", "vllm"), help="leave the other engine out")
    parser.add_argument(
        "--blocks",
        type=int,
        help="of mini_vllm's cache, 16 tokens each (default: what 1 GiB holds, on a GPU 6)",
    )
    parser.add_argument(
        "--batched-tokens",
        type=int,
        default=8192 if profile.device == "cuda" else 2048,
        help="most tokens of a step of mini_vllm (default: %(default)s)",
    )
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="mini_vllm without CUDA graphs (there are none on a CPU)",
    )
    args = parser.parse_args()
    if min(args.repeat, args.batched_tokens, 1 if args.blocks is None else args.blocks) < 1:
        fail("--repeat, --blocks and --batched-tokens must be at least 1")
    requests = data.trace_of(args)
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)
    engine_args = {
        flag.replace("-", "_"): value for flag, value in p.args.items() if flag != "enforce-eager"
    }  # its default is to compile
    tokens = sum(length for _, length in requests)
    metrics = {"request_count": len(requests), "output_tokens_count": tokens}

    # -----------------------------------------------------------------------------
    # 1. The small engine

    if args.only != "vllm":
        from mini_vllm import LLM, SamplingParams

        try:
            llm = LLM(folder, profile.device, profile.dtype, max_model_len=p.args["max-model-len"], max_num_batched_tokens=args.batched_tokens,
                      kv_cache_gib=6 if profile.device == "cuda" else 1, num_blocks=args.blocks, enforce_eager=args.enforce_eager)  # fmt: skip
            llm.generate(["warm up"] * 4, [SamplingParams(max_tokens=4, ignore_eos=True)] * 4)
            params = [SamplingParams(max_tokens=length, ignore_eos=True) for _, length in requests]
            runs = [run_mini(llm, requests, params) for _ in range(args.repeat)]
        except ValueError as e:
            fail(str(e))
        mini_s, counted = statistics.median(seconds for seconds, _ in runs), runs[-1][1]
        metrics |= {
            "mini_tok_per_s": round(tokens / mini_s, 1),
            "mini_steps_count": counted["steps"],
            "mini_preemptions_count": counted.get("preemptions", 0),
        }
        metrics |= {
            "mini_tokens_per_step_count": round(counted["computed_tokens"] / counted["steps"], 1)
        }
        metrics |= {
            "mini_prefix_hit_ratio": round(
                counted["cached_tokens"] / (counted["cached_tokens"] + counted["computed_tokens"]),
                4,
            )
        }
        del llm  # vLLM counts what is left on the card as taken
        if profile.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    # -----------------------------------------------------------------------------
    # 2. vLLM

    if args.only != "mini":
        vllm_s = statistics.median(
            run_vllm(folder, profile.dtype, requests, engine_args, args.repeat)
        )
        metrics |= {"vllm_tok_per_s": round(tokens / vllm_s, 1)}

    # -----------------------------------------------------------------------------
    # 3. Side by side

    print(
        f"\n{len(requests)} requests, {tokens} tokens out"
        + (f", medians of {args.repeat}" if args.repeat > 1 else "")
    )
    for name in ("mini", "vllm"):
        if (rate := metrics.get(f"{name}_tok_per_s")) is not None:
            print(f"{name:12}{rate:10.1f} tokens/s{tokens / rate:10.1f} s")
    if not args.only:
        metrics["mini_over_vllm_ratio"] = round(vllm_s / mini_s, 3)
        print(f"mini / vllm: {metrics['mini_over_vllm_ratio']:.2f}x")
    results.finish(__file__, metrics, vars(args), args.only or "")


if __name__ == "__main__":
    main()
