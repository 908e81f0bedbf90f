"""Latency against throughput of the running server, by vLLM's own `vllm bench serve`, and the knee of its goodput.

Two ways to load it. Closed loop: N clients, each sends its next request when its last is answered, so a slow server is asked less.
Open loop: requests arrive at a rate (Poisson), whether or not the server keeps up, as strangers do. Goodput counts only the requests
that met both objectives, a first token in time and then tokens as fast as promised.

    make vllm-serve                                            # first, if it is not running
    make vllm-bench
    make vllm-bench ARGS="--slo-ttft-ms 300 --slo-tpot-ms 50"  # promise more: the knee comes earlier

Look at: the knee, the last of rising loads at which 90 % of the requests met both; beyond it tokens/s may still grow while goodput falls
and, in the open loop, the queue grows as long as the load lasts. Exit code 1 if a request failed.
Plot: runs/03_vllm/bench.png; what vLLM itself prints: runs/03_vllm/bench.log.
"""

import argparse
import contextlib
import os
import shlex
import sys

from lab import RUNS, engine, fail, results, shown
from lab.profile import load_profile

GOOD = 0.9  # the share of requests that must meet the objectives


def knee(shares: list[float]) -> int | None:
    """Index of the last of rising loads with at least GOOD good requests; a lighter one that has fewer was disturbed, not overloaded."""
    return max((i for i, share in enumerate(shares) if share >= GOOD), default=None)


def draw(points: dict[str, list[dict]], knees: dict[str, int | None], args):
    """Three latencies against tokens/s, and requests served, and served well, against requests sent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 7, "axes.titlesize": 10})
    fig, axes = plt.subplots(2, 2, figsize=(8, 5.9), layout="constrained")
    for ax, name, title in zip(axes.flat, ("ttft", "itl", "e2e"), ("first token (TTFT)", "between tokens (ITL)", "whole answer (E2E)"), strict=False):
        for (kind, sweep), colour, words in zip(points.items(), ("C0", "C1"), ("closed loop, N at once", "open loop, N requests/s"), strict=True):
            x, p50, p99 = ([m[key] for m in sweep] for key in ("tok_per_s", f"{name}_p50_ms", f"{name}_p99_ms"))
            ax.plot(x, p50, "o-", ms=4, color=colour, label=f"p50, {words}")
            ax.plot(x, p99, "o:", ms=4, color=colour, mfc="white", label=f"p99, {words}")
            for m, *at in zip(sweep, x, p50, strict=True):
                ax.annotate(f"{m['load']:g}", at, (0, -11), textcoords="offset points", fontsize=7, color=colour, ha="center")
            if (at := knees[kind]) is not None:
                ax.plot(x[at], p50[at], "o", ms=13, mfc="none", mec=colour, mew=2, label="knee" if kind == "rate" else None)
        if name != "e2e":
            ax.axhline({"ttft": args.slo_ttft_ms, "itl": args.slo_tpot_ms}[name], color="grey", lw=1, label="objective (of ITL: a request's mean)")
        ax.set(yscale="log", xlabel="output tokens/s", ylabel="ms", title=title)
        ax.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_locator=ticker.NullLocator())
    axes[0, 0].legend(loc="upper left")
    ax, (rates, served, good) = axes[1, 1], ([m[key] for m in points["rate"]] for key in ("load", "req_per_s", "goodput_req_per_s"))
    for y, style, words in ((rates, "k--", "sent"), (served, "C1o-", "served"), (good, "C2^-", "served within the objectives (goodput)")):
        ax.plot(rates, y, style, ms=4, label=words)
    if knees["rate"] is not None:
        ax.axvline(rates[knees["rate"]], color="C1", lw=1, label="knee")
    ax.set(xlabel="requests/s sent (open loop)", ylabel="requests/s", title=f"first token in {args.slo_ttft_ms:g} ms, {args.slo_tpot_ms:g} ms a token")
    ax.legend(loc="upper left")
    return fig


def main() -> None:
    profile = load_profile()
    p = profile.bench
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=f"http://127.0.0.1:{profile.serve.port}", help="the server (default: %(default)s)")
    parser.add_argument("--concurrencies", type=int, nargs="+", default=list(p.concurrencies), metavar="N", help="closed loop (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=list(p.rates), metavar="R", help="open loop, requests/s (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=p.prompts, help="requests a point; more where they are under 3 rounds or 6 s (default: %(default)s)")
    parser.add_argument("--input-tokens", type=int, default=p.input_tokens, help="mean, 50 %% more or less (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=p.output_tokens, help="mean, 50 %% more or less (default: %(default)s)")
    parser.add_argument("--slo-ttft-ms", type=float, default=p.slo_ttft_ms, help="objective: the first token within (default: %(default)s)")
    parser.add_argument("--slo-tpot-ms", type=float, default=p.slo_tpot_ms, help="objective: a request's mean time a token after it (default: %(default)s)")
    args = parser.parse_args()
    if min(*args.concurrencies, args.prompts) < 1 or min(args.input_tokens, args.output_tokens) < 2:
        fail("--concurrencies and --prompts must be at least 1, --input-tokens and --output-tokens at least 2")
    if not 0 < min(*args.rates, args.slo_ttft_ms, args.slo_tpot_ms) or max(args.rates) == float("inf"):
        fail("--rates, --slo-ttft-ms and --slo-tpot-ms must be positive, --rates finite")

    import openai

    key = os.environ["OPENAI_API_KEY"] = os.environ.get("VLLM_API_KEY", "unused")  # vLLM's benchmark takes it from the former
    model = engine.served_model(openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0))

    # -----------------------------------------------------------------------------
    # 1. vLLM's benchmark, imported once; every point is one `vllm bench serve`, typed or called

    (RUNS / "03_vllm").mkdir(parents=True, exist_ok=True)
    log = (RUNS / "03_vllm" / "bench.log").open("w")  # stays open: vLLM's logger keeps it
    print("importing vLLM's benchmark: about 15 s on 2 cores", flush=True)
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from vllm.benchmarks import serve

        theirs = serve.FlexibleArgumentParser()
        serve.add_cli_args(theirs)
        tokenizer = serve.get_tokenizer(model.root)
    common = ["--base-url", args.address, "--model", model.root, "--served-model-name", model.id, "--temperature", "0", "--ignore-eos"]
    common += ["--dataset-name", "random", "--random-input-len", str(args.input_tokens), "--random-output-len", str(args.output_tokens)]
    common += ["--random-range-ratio", "0.5"]  # were all answers of one length, all would end, and all prompts begin, at once
    common += ["--goodput", f"ttft:{args.slo_ttft_ms:g}", f"tpot:{args.slo_tpot_ms:g}", "--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99", "--save-detailed"]

    def bench(prompts: int, seed: int, load: list[str]) -> dict:
        """vLLM's result, and under `wrong` what went wrong: it counts an answer that was cut off as completed, and good."""
        flags = theirs.parse_args(words := [*common, "--num-prompts", str(prompts), "--seed", str(seed), *load])
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            print(shlex.join(["vllm", "bench", "serve", *words]))
            asked = [request.expected_output_len for request in serve.get_samples(flags, tokenizer)]  # the same seed, the same lengths
            result = serve.main(flags)
        got = zip(result["errors"], result["output_lens"], asked, strict=True)
        return result | {"wrong": [error or f"{n} of {length} tokens" for error, n, length in got if error or n != length]}

    # -----------------------------------------------------------------------------
    # 2. The two sweeps

    loads = [("concurrency", c, max(args.prompts, 3 * c), ["--max-concurrency", str(c)]) for c in sorted(set(args.concurrencies))]
    loads += [("rate", r, max(args.prompts, round(6 * r)), ["--request-rate", f"{r:g}"]) for r in sorted(set(args.rates))]
    vllm = "vllm" if profile.device == "cuda" else "python -m lab.vllm_cli"
    print(f"a point by hand: {vllm} bench serve {shlex.join([*common, '--num-prompts', str(loads[0][2]), '--seed', '1', *loads[0][3]])}", flush=True)
    bench(8, 0, ["--max-concurrency", "8"])  # to warm up
    points, metrics, wrong = {"concurrency": [], "rate": []}, {"slo_ttft_ms": args.slo_ttft_ms, "slo_tpot_ms": args.slo_tpot_ms}, 0
    for i, (kind, load, prompts, flags) in enumerate(loads, 1):
        if not points[kind]:
            print(f"\n{kind:>12}  requests   req/s  goodput   good  tokens/s   TTFT ms p50/p99   ITL ms p50/p99   E2E ms p50/p99")
        print(f"{load:12g}{prompts:10}", end="", flush=True)
        r = bench(prompts, i, flags)  # other prompts at every point: none is in the prefix cache
        m = {"req_per_s": r["request_throughput"], "goodput_req_per_s": r["request_goodput"], "good_ratio": r["request_goodput"] * r["duration"] / prompts, "tok_per_s": r["output_throughput"]}
        m |= {f"{ours}_p{q}_ms": r[f"p{q}_{vllms}_ms"] for ours, vllms in (("ttft", "ttft"), ("itl", "itl"), ("e2e", "e2el")) for q in (50, 99)}
        m = {name: round(float(value), 3) for name, value in m.items()}
        print(f"{m['req_per_s']:8.2f}{m['goodput_req_per_s']:9.2f}{m['good_ratio']:7.0%}{m['tok_per_s']:10.1f}", end="")
        print("".join(f"{m[f'{name}_p50_ms']:10.0f}/{m[f'{name}_p99_ms']:<6.0f}" for name in ("ttft", "itl", "e2e")), flush=True)
        print("".join(f"  failed: {words.strip().splitlines()[-1][:200]}\n" for words in sorted(set(r["wrong"]))[:3]), end="")
        wrong += len(r["wrong"])
        if not r["completed"]:
            sys.exit(f"error: every request of this point failed: the server's log and {shown(log.name)} say why")
        points[kind].append(m | {"load": load})
        metrics |= {f"{kind}_{load:g}_{name}": value for name, value in m.items()}

    # -----------------------------------------------------------------------------
    # 3. The knee of each sweep

    knees = {kind: knee([m["good_ratio"] for m in sweep]) for kind, sweep in points.items()}
    for (kind, at), unit in zip(knees.items(), ("at once", "requests/s"), strict=True):
        best = {"load": 0, "goodput_req_per_s": 0} if at is None else points[kind][at]
        note = " (no load here keeps the objectives)" if at is None else " (the heaviest load here: the knee may lie beyond)" if best is points[kind][-1] else ""
        print(f"knee: {best['load']:g} {unit}, goodput {best['goodput_req_per_s']:.2f} requests/s{note}")
        metrics |= {f"knee_{kind}_{'count' if kind == 'concurrency' else 'req_per_s'}": best["load"], f"knee_{kind}_goodput_req_per_s": best["goodput_req_per_s"]}
    results.picture(__file__, "bench", draw(points, knees, args))
    results.finish(__file__, metrics | {"failed_count": wrong}, vars(args) | {"model": model.id})
    sys.exit(f"error: {wrong} requests failed: what was measured beside them does not count" if wrong else 0)


if __name__ == "__main__":
    main()
