"""Latency against throughput of the running server, by vLLM's own `vllm bench serve`, and the knee
of its goodput.

Two ways to load it. Closed loop: N clients, each sends its next request when its last is answered,
so a slow server is asked less. Open loop: requests arrive at a rate (Poisson), whether or not the
server keeps up, as strangers do. Goodput counts only the requests that met both objectives, a first
token in time and then tokens as fast as promised.

    make vllm-serve                                            # first, if it is not running
    make vllm-bench
    make vllm-bench ARGS="--slo-ttft-ms 300 --slo-tpot-ms 50"  # promise more: an earlier knee
    make vllm-bench ARGS="--answers 30"                        # longer, where the machine is fast

Only the load that stands is judged. A closed loop begins with N prompts at once, which never
happens again: its first N requests are left out. An open loop begins with an empty server: what it
sends in the time of two answers is left out. From then until the last request is sent is a point's
window, planned to last ten answers of a lone client, or 60 s where those take longer. Rates count
what the server did within the window, latencies and good requests those that were sent within it.

Look at: the knee, the last of rising loads at which 90 % of the requests met both; beyond it
tokens/s may still grow while goodput falls and, in the open loop, the queue grows as long as the
load lasts. Exit code 1 if a request failed.
Plot: runs/03_vllm/bench.png. What vLLM prints, of whole points: runs/03_vllm/bench.log.
"""

import argparse
import contextlib
import math
import os
import shlex
import sys

from lab import RUNS, engine, fail, results, shown
from lab.profile import load_profile

GOOD = 0.9  # the share of requests that must meet the objectives
LONGEST_S = 60  # of the windows that are asked for


def main() -> None:
    profile = load_profile()
    p = profile.bench
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--address", default=f"http://127.0.0.1:{profile.serve.port}",
        help="the server (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrencies", type=int, nargs="+", default=list(p.concurrencies), metavar="N",
        help="closed loop (default: %(default)s)",
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(p.rates), metavar="R",
        help="open loop, requests/s (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts", type=int, default=p.prompts,
        help="judged requests a point, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--answers", type=float, default=10,
        help="length of a point's window, in answers of a lone client (default: %(default)s)",
    )
    parser.add_argument(
        "--input-tokens", type=int, default=p.input_tokens,
        help="mean, 50 %% more or less (default: %(default)s)",
    )
    parser.add_argument(
        "--output-tokens", type=int, default=p.output_tokens,
        help="mean, 50 %% more or less (default: %(default)s)",
    )
    parser.add_argument(
        "--slo-ttft-ms", type=float, default=p.slo_ttft_ms,
        help="objective: the first token within (default: %(default)s)",
    )
    parser.add_argument(
        "--slo-tpot-ms", type=float, default=p.slo_tpot_ms,
        help="objective: a request's mean time a token after it (default: %(default)s)",
    )
    args = parser.parse_args()
    if min(args.concurrencies) < 1 or min(args.prompts, args.input_tokens, args.output_tokens) < 2:
        fail(
            "--concurrencies must be at least 1, "
            "--prompts, --input-tokens and --output-tokens at least 2"
        )
    positive = [*args.rates, args.answers, args.slo_ttft_ms, args.slo_tpot_ms]
    if not 0 < min(positive) or max(args.rates) == float("inf"):
        fail("--rates, --answers, --slo-ttft-ms and --slo-tpot-ms must be positive, --rates finite")

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
    # 2. How long an answer takes a lone client, which says how long a point must last

    vllm = "vllm" if profile.device == "cuda" else "python -m lab.vllm_cli"
    by_hand = shlex.join([*common, "--num-prompts", "20", "--seed", "1", "--max-concurrency", "4"])
    print(f"a point by hand: {vllm} bench serve {by_hand}", flush=True)
    alone = bench(5, 0, ["--max-concurrency", "1"])
    nothing_came = f"the server's log and {shown(log.name)} say why"
    if not alone["completed"]:
        sys.exit(f"error: the first requests failed: {nothing_came}")
    gaps = sum(sum(of_one) for of_one in alone["itls"])
    answer_s = (sum(alone["ttfts"]) + gaps) / alone["completed"]
    seconds = min(LONGEST_S, args.answers * answer_s)
    print(f"a lone client's answer takes {answer_s:.2f} s: windows of {seconds:.3g} s", flush=True)

    # -----------------------------------------------------------------------------
    # 3. The two sweeps

    points: dict[str, list[dict]] = {"concurrency": [], "rate": []}
    metrics = {"slo_ttft_ms": args.slo_ttft_ms, "slo_tpot_ms": args.slo_tpot_ms}
    metrics |= {"answer_alone_s": round(answer_s, 3)}
    wrong = len(alone["wrong"])

    def measure(kind: str, load: float, lead: int, rate: float, flags: list[str]) -> dict:
        """One point: `lead` requests to begin with, then those of a window at `rate` requests/s."""
        nonlocal wrong
        if not points[kind]:
            print(f"\n{kind:>12}  sent  window s   req/s  goodput   good  tokens/s", end="")
            print("   TTFT ms p50/p99   ITL ms p50/p99   E2E ms p50/p99")
        prompts = lead + max(args.prompts, 1 + math.ceil(rate * seconds))
        print(f"{load:12g}{prompts:6}", end="", flush=True)
        seed = 1 + len(points["concurrency"] + points["rate"])  # other prompts at every point
        result = bench(prompts, seed, flags)
        wrong += len(result["wrong"])
        point = steady(result, lead, args.slo_ttft_ms, args.slo_tpot_ms)
        if point:
            print(f"{point['window_s']:10.1f}{point['req_per_s']:8.2f}", end="")
            print(f"{point['goodput_req_per_s']:9.2f}{point['good_ratio']:7.0%}", end="")
            print(f"{point['tok_per_s']:10.1f}", end="")
            for name in ("ttft", "itl", "e2e"):
                print(f"{point[f'{name}_p50_ms']:10.0f}/{point[f'{name}_p99_ms']:<6.0f}", end="")
            print(flush=True)
        for words in sorted(set(result["wrong"]))[:3]:
            print(f"  failed: {words.strip().splitlines()[-1][:200]}")
        if not point:
            sys.exit(f"error: hardly a request of this point was answered: {nothing_came}")
        points[kind].append(point | {"load": load})
        metrics.update({f"{kind}_{load:g}_{name}": value for name, value in point.items()})
        return point

    # A closed loop's rate is not known beforehand: at best every client is served as fast as at the
    # lighter load before.
    per_client = 1 / answer_s
    for clients in sorted(set(args.concurrencies)):
        flags = ["--max-concurrency", str(clients)]
        point = measure("concurrency", clients, clients, clients * per_client, flags)
        per_client = point["req_per_s"] / clients
    for rate in sorted(set(args.rates)):
        lead = math.ceil(2 * rate * answer_s)
        measure("rate", rate, lead, rate, ["--request-rate", f"{rate:g}"])

    # -----------------------------------------------------------------------------
    # 4. The knee of each sweep

    knees = {kind: knee([m["good_ratio"] for m in sweep]) for kind, sweep in points.items()}
    for (kind, at), unit in zip(knees.items(), ("at once", "requests/s"), strict=True):
        best = {"load": 0, "goodput_req_per_s": 0} if at is None else points[kind][at]
        note = " (no load here keeps the objectives)" if at is None else " (the heaviest load here: the knee may lie beyond)" if best is points[kind][-1] else ""
        print(f"knee: {best['load']:g} {unit}, goodput {best['goodput_req_per_s']:.2f} requests/s{note}")
        metrics |= {f"knee_{kind}_{'count' if kind == 'concurrency' else 'req_per_s'}": best["load"], f"knee_{kind}_goodput_req_per_s": best["goodput_req_per_s"]}
    results.picture(__file__, "bench", draw(points, knees, args))
    results.finish(__file__, metrics | {"failed_count": wrong}, vars(args) | {"model": model.id})
    sys.exit(f"error: {wrong} requests failed: what was measured beside them does not count" if wrong else 0)


# -----------------------------------------------------------------------------
# What a point says, and where the knee is


def steady(result: dict, lead: int, slo_ttft_ms: float, slo_tpot_ms: float) -> dict | None:
    """A point's metrics without its first `lead` requests, until the last one is sent.

    `result` is that of `vllm bench serve --save-detailed`. None where too few were answered.
    """
    import numpy as np

    columns = ("start_times", "ttfts", "itls", "output_lens", "errors")
    rows = zip(*(result[name] for name in columns), strict=True)
    answers = sorted(row[:4] for row in rows if not row[4])
    if len(answers) < lead + 2:
        return None
    sent = answers[lead:]
    begin, end = sent[0][0], sent[-1][0]
    served, tokens = 0, 0.0
    for start, ttft, gaps, length in answers:
        arrivals = start + ttft + np.cumsum([0, *gaps])  # a piece may hold several tokens
        inside = (arrivals > begin) & (arrivals <= end)
        served += bool(inside[-1])
        tokens += length * inside.mean()
    latencies = {
        "ttft": [ttft for _, ttft, _, _ in sent],
        "itl": [gap for _, _, gaps, _ in sent for gap in gaps],
        "e2e": [ttft + sum(gaps) for _, ttft, gaps, _ in sent],
    }
    per_token = [sum(gaps) / max(length - 1, 1) for _, _, gaps, length in sent]
    good = [
        1000 * ttft <= slo_ttft_ms and 1000 * tpot <= slo_tpot_ms
        for ttft, tpot in zip(latencies["ttft"], per_token, strict=True)
    ]
    window_s = end - begin
    metrics = {
        "window_s": window_s,
        "req_per_s": served / window_s,
        "goodput_req_per_s": np.mean(good) * served / window_s,
        "good_ratio": np.mean(good),
        "tok_per_s": tokens / window_s,
    }
    for name, seconds in latencies.items():
        metrics |= {f"{name}_p{q}_ms": 1000 * np.percentile(seconds or [0], q) for q in (50, 99)}
    rounded = {name: round(float(value), 3) for name, value in metrics.items()}
    return {"sent_count": len(result["errors"])} | rounded


def knee(shares: list[float]) -> int | None:
    """Index of the last of rising loads with at least GOOD good requests.

    A lighter load that has fewer was disturbed, not overloaded.
    """
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


if __name__ == "__main__":
    main()
