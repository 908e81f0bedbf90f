"""What paging the KV cache buys: the same requests in the same memory, reserved by two rules.

An engine that gives every request one contiguous piece must make it as long as the longest answer
allowed: the pool holds a few. Paging (arXiv 2309.06180) gives a block when it is needed: the pool
holds as many as their tokens fill. Here both rules drive vLLM: for the first, no more requests are
sent at a time than contiguous pieces would fit in the pool; for the second, all are.

    make paging
    python modules/03_vllm/06_paging.py --slots 8    # a larger pool: so many contiguous pieces
    python modules/03_vllm/06_paging.py --sigma 0    # all answers of one length
    python modules/03_vllm/06_paging.py --load-format dummy

Flags that this script does not know go to vLLM.
Look at: the share of the reserved room in which nothing ever stands, for both rules, and the ratio
of the two rates, which is the paper's 2-4x. Plot: runs/03_vllm/paging.png.
"""

import argparse

from closed_loop import drive, warm_up  # the file beside this one

from lab import data, engine, fail, jobs, models, results
from lab.profile import load_profile
from lab.table import table


def reserved_for_nothing(
    lengths: list[tuple[int, int]], piece: int, block: int
) -> tuple[float, float]:
    """Shares of token-steps reserved and not filled, (contiguous, paged); exact, from `lengths`.

    `lengths`: (prompt, output) tokens of each request; `piece` and `block`: tokens reserved at a
    time under either rule.
    """
    filled = contiguous = paged = 0
    for prompt, output in lengths:
        for tokens in range(prompt + 1, prompt + output + 1):  # one step after the other
            filled += tokens
            contiguous += piece
            paged += -(-tokens // block) * block
    return 1 - filled / contiguous, 1 - filled / paged


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_model_flag(parser, defaults.model)
    data.add_trace_flags(parser, defaults)
    parser.add_argument(
        "--slots",
        type=int,
        default=4,
        help="contiguous pieces that the pool would hold (default: %(default)s)",
    )
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
    tokens = sum(output for _, output in lengths)
    longest = max(prompt for prompt, _ in lengths) + args.max_tokens
    block = 16 if profile.device == "cuda" else 32  # vLLM's choice, its CPU kernel's least
    piece = -(-longest // block) * block
    pool = args.slots * piece
    rules = f"{args.slots} pieces of {piece}, or {pool // block} blocks of {block}"
    print(f"{len(trace)} requests, {tokens} tokens out; a pool of {pool} tokens: {rules}")
    contiguous_waste, paged_waste = reserved_for_nothing(lengths, piece, block)
    waste = {"contiguous": contiguous_waste, "paged": paged_waste}

    # -----------------------------------------------------------------------------
    # 2. The two rules: at most as many requests at a time as there are pieces, or all of them

    sizes = {
        "block-size": block,
        "num-gpu-blocks-override": pool // block + 1,  # one is vLLM's own, always empty
        "no-enable-prefix-caching": True,
    }
    vllm = engine.start(folder, profile.dtype, {**defaults.args, **sizes}, flags)
    warm_up(vllm)
    requests = [
        (prompt, SamplingParams(temperature=0, max_tokens=output, ignore_eos=True))
        for prompt, output in trace
    ]
    runs = {
        "contiguous": drive(vllm, requests, window=args.slots),
        "paged": drive(vllm, requests),
    }
    preemptions = engine.counters(vllm)["num_preemptions"]
    engine.stop(vllm)

    rows = []
    metrics = {
        "pool_tok_count": pool,
        "request_count": len(trace),
        "paged_preemptions_count": int(preemptions),
    }
    for rule, run in runs.items():
        assert [len(timing.tokens) for timing in run.timings] == [output for _, output in lengths]
        mean = sum(requests_held for _, requests_held in run.held) / len(run.held)
        rows.append([rule, f"{waste[rule]:.1%}", f"{mean:.1f}", f"{run.tok_per_s:.1f}"])
        metrics |= {
            f"{rule}_waste_ratio": round(waste[rule], 4),
            f"{rule}_mean_requests_count": round(mean, 2),
            f"{rule}_tok_per_s": round(run.tok_per_s, 1),
        }
    print()
    table(["", "reserved for nothing", "requests at once", "tokens/s"], rows)
    ratio = runs["paged"].tok_per_s / runs["contiguous"].tok_per_s
    metrics["paged_over_contiguous_ratio"] = round(ratio, 2)
    print(f"paged / contiguous: {ratio:.2f}x, {preemptions:.0f} preemptions")

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layout = {"figsize": (9, 3.6), "layout": "constrained", "width_ratios": (1, 2)}
    fig, (left, right) = plt.subplots(1, 2, **layout)
    used = [1 - share for share in waste.values()]
    left.bar(list(waste), used, color="C0", label="tokens")
    left.bar(list(waste), waste.values(), bottom=used, color="lightgrey", label="nothing")
    left.set(ylabel="share of the reserved room", title="what stands in the KV cache")
    left.legend()
    for rule, run in runs.items():
        seconds, requests_held = zip(*run.held, strict=True)
        label = f"{rule}: {run.tok_per_s:.0f} tokens/s"
        right.step(seconds, requests_held, where="post", label=label)
    right.set(xlabel="seconds", ylabel="requests at once", ylim=(0, None))
    right.set_title("the same requests in the same memory")
    right.legend()
    results.picture(__file__, "paging", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
