"""What prefix caching saves where prompts begin alike: the same requests twice, once so that nothing may be shared.

Agents, chats and few-shot prompts send the same beginning again and again. vLLM keeps a block's keys and values under the hash of its
tokens and of all before it, so that a later request with the same beginning skips their prefill. A `cache_salt` of its own makes a
request's hashes different from all others': the same engine and the same tokens, and nothing is found.

    make prefix-caching
    python modules/03_vllm/07_prefix_caching.py --shared-tokens 64     # a short beginning saves little
    python modules/03_vllm/07_prefix_caching.py --answer-tokens 128    # and so do long answers: decoding is not saved

Look at: time to the first token, and tokens/s; the share of prompt tokens found in the cache is vLLM's own counter. Plot: runs/03_vllm/prefix_caching.png.
"""

import argparse
import random
import statistics

from lab import engine, fail, jobs, models, results
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    p = profile.throughput
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=p.requests, help="how many (default: %(default)s)")
    parser.add_argument("--shared-tokens", type=int, default=p.args["max-model-len"] * 3 // 4, help="of the common beginning (default: %(default)s)")
    parser.add_argument("--own-tokens", type=int, default=32, help="of each request's own end (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=16, help="of each answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens (default: %(default)s)")
    args, flags = parser.parse_known_args()
    if min(args.requests, args.shared_tokens, args.own_tokens, args.answer_tokens) < 1:
        fail("--requests, --shared-tokens, --own-tokens and --answer-tokens must be at least 1")
    whole = args.shared_tokens + args.own_tokens + args.answer_tokens
    if whole > p.args["max-model-len"]:
        fail(f"beginning, end and answer are {whole} tokens, the profile's max-model-len is {p.args['max-model-len']}: shorten one")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    from vllm import SamplingParams

    rng = random.Random(args.seed)
    beginning = [rng.randrange(1000, 10000) for _ in range(args.shared_tokens)]  # any words will do: their prefill costs the same
    prompts = [beginning + [rng.randrange(1000, 10000) for _ in range(args.own_tokens)] for _ in range(args.requests)]
    params = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)

    # -----------------------------------------------------------------------------
    # 1. The same requests, salted and not

    vllm = engine.start(folder, profile.dtype, p.args, flags)
    engine.warm_up(vllm)
    metrics: dict[str, float] = {"request_count": args.requests}
    first: dict[str, list[float]] = {}
    for way in ("apart", "shared"):
        before = engine.counters(vllm)
        salts = [{"cache_salt": f"request {i}"} if way == "apart" else {} for i in range(args.requests)]
        seconds, timings, _ = engine.drive(vllm, [({"prompt_token_ids": prompt, **salt}, params) for prompt, salt in zip(prompts, salts, strict=True)])
        after = engine.counters(vllm)
        hits, asked = (after[f"prefix_cache_{what}"] - before[f"prefix_cache_{what}"] for what in ("hits", "queries"))
        first[way] = sorted(t.first - t.sent for t in timings)
        metrics |= {f"{way}_hit_ratio": round(hits / asked, 4), f"{way}_ttft_median_s": round(statistics.median(first[way]), 4)}
        metrics |= {f"{way}_tok_per_s": round(sum(len(t.tokens) for t in timings) / seconds, 1)}
    engine.stop(vllm)

    print(f"\n{args.requests} requests of {args.shared_tokens} common and {args.own_tokens} own tokens, answers of {args.answer_tokens}")
    print(f"{'prefixes':12}{'found in the cache':>20}{'median TTFT':>14}{'tokens/s':>10}")
    for way in first:
        print(f"{way:12}{metrics[f'{way}_hit_ratio']:20.1%}{metrics[f'{way}_ttft_median_s']:12.3f} s{metrics[f'{way}_tok_per_s']:10.1f}")
    metrics["ttft_ratio"] = round(metrics["apart_ttft_median_s"] / metrics["shared_ttft_median_s"], 2)
    metrics["throughput_ratio"] = round(metrics["shared_tok_per_s"] / metrics["apart_tok_per_s"], 2)
    print(f"shared: first token {metrics['ttft_ratio']:.1f}x sooner, {metrics['throughput_ratio']:.1f}x the tokens/s")

    # -----------------------------------------------------------------------------
    # 2. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for way, times in first.items():
        ax.step(times, range(1, len(times) + 1), where="post", label=f"{way}: {metrics[f'{way}_hit_ratio']:.0%} found in the cache")
    ax.set(xlabel="seconds since all were sent", ylabel="requests with their first token", title="Prefill that is not done twice", xlim=(0, None), ylim=(0, None))
    ax.legend()
    results.picture(__file__, "prefix_caching", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
