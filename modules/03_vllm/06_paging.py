"""What paging the KV cache buys: the same engine, the same pool of memory, the same requests; only who may reserve what differs.

An engine that gives every request one contiguous piece must make it as long as the longest answer allowed: the pool holds a few. Paging
(arXiv 2309.06180) gives a block when it is needed: the pool holds as many as their tokens fill. Here both rules drive vLLM: for the
first, no more requests are sent at a time than contiguous pieces would fit in the pool; for the second, all are.

    make paging
    python modules/03_vllm/06_paging.py --slots 8            # a larger pool: so many contiguous pieces
    python modules/03_vllm/06_paging.py --sigma 0            # all answers of one length
    python modules/03_vllm/06_paging.py --load-format dummy  # flags that this script does not know go to vLLM

Look at: the share of the reserved room in which nothing ever stands, for both rules, and the ratio of the two rates, which is the
paper's 2-4x. Plot: runs/03_vllm/paging.png.
"""

import argparse

from lab import data, engine, fail, jobs, models, results
from lab.profile import load_profile


def reserved_for_nothing(lengths: list[tuple[int, int]], piece: int, block: int) -> tuple[float, float]:
    """Shares of token-steps reserved and not filled, (contiguous, paged), of requests of (prompt, output) tokens; exact, from the lengths."""
    filled = contiguous = paged = 0
    for prompt, output in lengths:
        for tokens in range(prompt + 1, prompt + output + 1):
            filled += tokens
            contiguous += piece
            paged += -(-tokens // block) * block
    return 1 - filled / contiguous, 1 - filled / paged


def main() -> None:
    profile = load_profile()
    p = profile.throughput
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    data.add_trace_flags(parser, p)
    parser.add_argument("--slots", type=int, default=4, help="contiguous pieces that the pool would hold (default: %(default)s)")
    args, flags = parser.parse_known_args()
    if args.slots < 1:
        fail("--slots must be at least 1")
    trace = data.trace_of(args)
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    # -----------------------------------------------------------------------------
    # 1. The pool: so many pieces of the longest prompt and the longest answer allowed

    from transformers import AutoTokenizer
    from vllm import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lengths = [(len(tokenizer(prompt)["input_ids"]), output) for prompt, output in trace]
    block = 16 if profile.device == "cuda" else 32  # vLLM's choice there, and the least its CPU kernel likes
    piece = -(-(max(prompt for prompt, _ in lengths) + args.max_tokens) // block) * block
    pool = args.slots * piece
    print(f"{len(trace)} requests, {sum(o for _, o in lengths)} tokens out; a pool of {pool} tokens: {args.slots} pieces of {piece}, or {pool // block} blocks of {block}")
    waste = reserved_for_nothing(lengths, piece, block)

    # -----------------------------------------------------------------------------
    # 2. The two rules

    sizes = {"block-size": block, "num-gpu-blocks-override": pool // block + 1, "no-enable-prefix-caching": True}  # one block is vLLM's own, always empty
    vllm = engine.start(folder, profile.dtype, {**p.args, **sizes}, flags)
    engine.warm_up(vllm)
    requests = [(prompt, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)) for prompt, output in trace]
    tokens = sum(output for _, output in lengths)
    rates, held = {}, {}
    for rule, window in (("contiguous", args.slots), ("paged", 0)):
        seconds, timings, held[rule] = engine.drive(vllm, requests, window)
        assert [len(t.tokens) for t in timings] == [output for _, output in lengths]
        rates[rule] = tokens / seconds
    preemptions = engine.counters(vllm)["num_preemptions"]
    engine.stop(vllm)

    print(f"\n{'':12}{'reserved for nothing':>22}{'requests at once':>18}{'tokens/s':>10}")
    metrics = {"pool_tok_count": pool, "request_count": len(trace), "paged_preemptions_count": int(preemptions)}
    for rule, share in zip(rates, waste, strict=True):
        mean = sum(n for _, n in held[rule]) / len(held[rule])
        print(f"{rule:12}{share:22.1%}{mean:18.1f}{rates[rule]:10.1f}")
        metrics |= {f"{rule}_waste_ratio": round(share, 4), f"{rule}_mean_requests_count": round(mean, 2), f"{rule}_tok_per_s": round(rates[rule], 1)}
    metrics["paged_over_contiguous_ratio"] = round(rates["paged"] / rates["contiguous"], 2)
    print(f"paged / contiguous: {metrics['paged_over_contiguous_ratio']:.2f}x, {preemptions:.0f} preemptions")

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(1, 2))
    left.bar(list(rates), [1 - w for w in waste], color="C0", label="tokens")
    left.bar(list(rates), waste, bottom=[1 - w for w in waste], color="lightgrey", label="nothing")
    left.set(ylabel="share of the reserved room", title="what stands in the KV cache")
    left.legend()
    for rule in held:
        right.step([t for t, _ in held[rule]], [n for _, n in held[rule]], where="post", label=f"{rule}: {rates[rule]:.0f} tokens/s")
    right.set(xlabel="seconds", ylabel="requests at once", title="the same requests in the same memory", ylim=(0, None))
    right.legend()
    results.picture(__file__, "paging", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
