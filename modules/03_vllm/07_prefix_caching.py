"""What prefix caching saves where prompts begin alike: the same requests, shared and kept apart.

Agents, chats and few-shot prompts send the same beginning again and again. vLLM keeps a block's
keys and values under the hash of its tokens and of all before it, so that a later request with the
same beginning skips their prefill. A `cache_salt` of its own makes a request's hashes different
from all others': the same engine and the same tokens, and nothing is found.

    make prefix-caching
    python modules/03_vllm/07_prefix_caching.py --shared-tokens 200   # less is found, less is saved
    python modules/03_vllm/07_prefix_caching.py --answer-tokens 96    # long answers leave less, too

Only prefill is saved, not decoding, and only whole blocks are found: of 200 tokens the first 128 on
a CPU, where vLLM's blocks have 128 tokens, and 192 on a GPU, where they have 16.
Look at: time to the first token, and tokens/s; the share of prompt tokens found in the cache is
vLLM's own counter. Plot: runs/03_vllm/prefix_caching.png.
"""

import argparse
import random
import statistics

from closed_loop import drive, warm_up  # the file beside this one

from lab import engine, fail, jobs, models, results
from lab.profile import load_profile
from lab.table import table


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_model_flag(parser, defaults.model)
    parser.add_argument(
        "--requests", type=int, default=defaults.requests, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--shared-tokens",
        type=int,
        default=defaults.args["max-model-len"] * 3 // 4,
        help="of the common beginning (default: %(default)s)",
    )
    parser.add_argument(
        "--own-tokens",
        type=int,
        default=32,
        help="of each request's own end (default: %(default)s)",
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=16, help="of each answer (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default: %(default)s)")
    args, flags = parser.parse_known_args()
    if min(args.requests, args.shared_tokens, args.own_tokens, args.answer_tokens) < 1:
        fail("--requests, --shared-tokens, --own-tokens and --answer-tokens must be at least 1")
    whole = args.shared_tokens + args.own_tokens + args.answer_tokens
    if whole > defaults.args["max-model-len"]:
        limit = f"the profile's max-model-len is {defaults.args['max-model-len']}"
        fail(f"beginning, end and answer are {whole} tokens, {limit}: shorten one")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    from vllm import SamplingParams

    # Any tokens will do: their prefill costs the same.
    rng = random.Random(args.seed)
    beginning = [rng.randrange(1000, 10000) for _ in range(args.shared_tokens)]
    prompts = []
    for _ in range(args.requests):
        prompts.append(beginning + [rng.randrange(1000, 10000) for _ in range(args.own_tokens)])
    params = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)

    # -----------------------------------------------------------------------------
    # 1. The same requests, salted so that nothing may be shared, and not

    vllm = engine.start(folder, profile.dtype, defaults.args, flags)
    warm_up(vllm)
    apart = [
        {"prompt_token_ids": prompt, "cache_salt": f"request {number}"}
        for number, prompt in enumerate(prompts)
    ]
    shared = [{"prompt_token_ids": prompt} for prompt in prompts]
    metrics: dict[str, float] = {"request_count": args.requests}
    rows = []
    first: dict[str, list[float]] = {}  # of each way: when each request had its first token
    for way, salted in {"apart": apart, "shared": shared}.items():
        before = engine.counters(vllm)
        run = drive(vllm, [(prompt, params) for prompt in salted])
        after = engine.counters(vllm)

        asked = after["prefix_cache_queries"] - before["prefix_cache_queries"]
        hits = after["prefix_cache_hits"] - before["prefix_cache_hits"]
        first[way] = sorted(timing.first - timing.sent for timing in run.timings)
        median = statistics.median(first[way])
        rows.append([way, f"{hits / asked:.1%}", f"{median:.3f} s", f"{run.tok_per_s:.1f}"])
        metrics |= {
            f"{way}_hit_ratio": round(hits / asked, 4),
            f"{way}_ttft_median_s": round(median, 4),
            f"{way}_tok_per_s": round(run.tok_per_s, 1),
        }
    engine.stop(vllm)

    lengths = f"{args.shared_tokens} common and {args.own_tokens} own tokens"
    print(f"\n{args.requests} requests of {lengths}, answers of {args.answer_tokens}")
    table(["prefixes", "found in the cache", "median TTFT", "tokens/s"], rows)
    sooner = metrics["apart_ttft_median_s"] / metrics["shared_ttft_median_s"]
    faster = metrics["shared_tok_per_s"] / metrics["apart_tok_per_s"]
    metrics |= {"ttft_ratio": round(sooner, 2), "throughput_ratio": round(faster, 2)}
    print(f"shared: first token {sooner:.1f}x sooner, {faster:.1f}x the tokens/s")

    # -----------------------------------------------------------------------------
    # 2. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for way, times in first.items():
        label = f"{way}: {metrics[f'{way}_hit_ratio']:.0%} found in the cache"
        ax.step(times, range(1, len(times) + 1), where="post", label=label)
    ax.set(xlabel="seconds since all were sent", ylabel="requests with their first token")
    ax.set(title="Prefill that is not done twice", xlim=(0, None), ylim=(0, None))
    ax.legend()
    results.picture(__file__, "prefix_caching", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
