"""Latency against throughput of the running server, by `vllm bench serve`, and its goodput's knee.

Two ways to load it. Closed loop: N clients, each sends its next request when its last is answered,
so a slow server is asked less. Open loop: requests arrive at a rate (Poisson), whether or not the
server keeps up, as strangers do. Goodput counts only the requests that met both objectives, a first
token in time and then tokens as fast as promised. What is promised is either in milliseconds, as
the GPU profiles say it, or a multiple of what a lone client sees in the same run (`--slack`).

    make vllm-serve                                            # first, if it is not running
    make vllm-bench
    make vllm-bench ARGS="--slo-ttft-ms 300 --slo-tpot-ms 50"  # promise more: an earlier knee
    make vllm-bench ARGS="--slack 3"                           # the same, relative
    make vllm-bench ARGS="--answers 30"                        # longer, where the machine is fast

Only the load that stands is judged. A closed loop begins with N prompts at once, which never
happens again: its first N requests are left out. An open loop begins with an empty server: what it
sends in the time of two answers is left out. From then until the last request is sent is a point's
window, planned to last so many answers of a lone client (`--answers`), at most 60 s. Rates count
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

from bench_picture import draw  # the files beside this one
from bench_points import answers, check, knee, objectives, steady

from lab import RUNS, engine, results, shown
from lab.profile import load_profile

LONGEST_S = 60  # of the windows that are asked for
SLACK = 5  # objectives in answers of a lone client, where none are given
UNITS = {"concurrency": ("at once", "count"), "rate": ("requests/s", "req_per_s")}
HEADER = (
    "\n{:>12}  sent  window s   req/s  goodput   good  tokens/s"
    "   TTFT ms p50/p99   ITL ms p50/p99   E2E ms p50/p99"
)


class Benchmark:
    """vLLM's own benchmark, imported once: each `run` is one `vllm bench serve`."""

    def __init__(self, flags: list[str], tokenizer: str, log):
        """`flags`: what all runs have in common; `log`: an open file for what it prints."""
        print("importing vLLM's benchmark: about 15 s on 2 cores", flush=True)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            from vllm.benchmarks import serve

            self.parser = serve.FlexibleArgumentParser()
            serve.add_cli_args(self.parser)
            self.tokenizer = serve.get_tokenizer(tokenizer)
        self.serve = serve
        self.flags = flags
        self.log = log

    def run(self, prompts: int, seed: int, load: list[str]) -> dict:
        """vLLM's result, and under `wrong` what went wrong.

        vLLM counts an answer that was cut off as completed, and good.
        """
        line = [*self.flags, "--num-prompts", str(prompts), "--seed", str(seed), *load]
        options = self.parser.parse_args(line)
        with contextlib.redirect_stdout(self.log), contextlib.redirect_stderr(self.log):
            print(shlex.join(["vllm", "bench", "serve", *line]))
            # The same seed, the same lengths.
            requests = self.serve.get_samples(options, self.tokenizer)
            result = self.serve.main(options)
        lengths = [request.expected_output_len for request in requests]
        wrong = []
        for error, got, asked in zip(result["errors"], result["output_lens"], lengths, strict=True):
            if error or got != asked:
                wrong.append(error or f"{got} of {asked} tokens")
        return result | {"wrong": wrong}


def main() -> None:
    profile = load_profile()
    defaults = profile.bench
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The server
    engine.add_address_flag(parser, profile)
    # The loads, and how long each is judged
    parser.add_argument(
        "--concurrencies",
        type=int,
        nargs="+",
        default=list(defaults.concurrencies),
        metavar="N",
        help="closed loop (default: %(default)s)",
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=list(defaults.rates),
        metavar="R",
        help="open loop, requests/s (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=defaults.prompts,
        help="judged requests a point, at least (default: %(default)s)",
    )
    parser.add_argument(
        "--answers",
        type=float,
        default=defaults.answers,
        help="length of a point's window, in answers of a lone client (default: %(default)s)",
    )
    # The requests
    parser.add_argument(
        "--input-tokens",
        type=int,
        default=defaults.input_tokens,
        help="mean, 50 %% more or less (default: %(default)s)",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        default=defaults.output_tokens,
        help="mean, 50 %% more or less (default: %(default)s)",
    )
    # What is promised
    lone = f"--slack {SLACK} times a lone client's"
    parser.add_argument(
        "--slack",
        type=float,
        default=SLACK,
        help="objectives that are not given: so many times a lone client's (default: %(default)s)",
    )
    parser.add_argument(
        "--slo-ttft-ms",
        type=float,
        default=defaults.slo_ttft_ms,
        help=f"objective: the first token within (default: {defaults.slo_ttft_ms or lone})",
    )
    parser.add_argument(
        "--slo-tpot-ms",
        type=float,
        default=defaults.slo_tpot_ms,
        help=f"objective: mean time a token after it (default: {defaults.slo_tpot_ms or lone})",
    )
    args = parser.parse_args()
    check(args)

    import openai

    # vLLM's benchmark takes the key from this variable.
    os.environ["OPENAI_API_KEY"] = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", max_retries=0)
    model = engine.served_model(client)

    # -----------------------------------------------------------------------------
    # 1. vLLM's benchmark: random prompts of mixed length

    # Were all answers of one length, all would end, and all prompts begin, at once.
    lengths = ["--random-input-len", str(args.input_tokens)]
    lengths += ["--random-output-len", str(args.output_tokens), "--random-range-ratio", "0.5"]
    flags = ["--base-url", args.address, "--model", model.root, "--served-model-name", model.id]
    flags += ["--temperature", "0", "--ignore-eos", "--dataset-name", "random", *lengths]
    flags += ["--percentile-metrics", "ttft,itl,e2el", "--metric-percentiles", "50,99"]
    flags += ["--save-detailed"]
    log_file = RUNS / "03_vllm" / "bench.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    nothing_came = f"the server's log and {shown(log_file)} say why"
    benchmark = Benchmark(flags, model.root, log_file.open("w"))  # stays open: vLLM's logger has it
    vllm = "vllm" if profile.device == "cuda" else "python -m lab.vllm_cli"
    by_hand = shlex.join([*flags, "--num-prompts", "20", "--seed", "1", "--max-concurrency", "4"])
    print(f"a point by hand: {vllm} bench serve {by_hand}", flush=True)

    # -----------------------------------------------------------------------------
    # 2. A lone client: how long an answer takes says how long a point must last, and what is slow

    alone = benchmark.run(5, 0, ["--max-concurrency", "1"])
    if not alone["completed"]:
        sys.exit(f"error: the first requests failed: {nothing_came}")
    wanted = objectives(answers(alone), args)
    answer_s = sum(answer.e2e for answer in answers(alone)) / alone["completed"]
    seconds = min(LONGEST_S, args.answers * answer_s)
    print(f"a lone client's answer takes {answer_s:.2f} s: windows of {seconds:.3g} s")
    promise = f"first token in {wanted.ttft_ms:g} ms, {wanted.tpot_ms:g} ms a token"
    print(f"objectives: {promise}", flush=True)

    # -----------------------------------------------------------------------------
    # 3. The two sweeps

    points: dict[str, list[dict]] = {"concurrency": [], "rate": []}
    metrics = {"slo_ttft_ms": wanted.ttft_ms, "slo_tpot_ms": wanted.tpot_ms}
    metrics |= {"answer_alone_s": round(answer_s, 3)}
    wrong = len(alone["wrong"])

    def measure(kind: str, load: float, lead: int, rate: float, flag: str) -> dict:
        """One point: `lead` requests to begin with, then those of a window at `rate` requests/s."""
        nonlocal wrong
        if not points[kind]:
            print(HEADER.format(kind))
        prompts = lead + max(args.prompts, 1 + math.ceil(rate * seconds))
        print(f"{load:12g}{prompts:6}", end="", flush=True)
        seed = 1 + len(points["concurrency"] + points["rate"])  # other prompts at every point
        result = benchmark.run(prompts, seed, [flag, f"{load:g}"])
        wrong += len(result["wrong"])
        point = steady(result, lead, wanted)
        if point:
            print(line_of(point), flush=True)
        for reason in sorted(set(result["wrong"]))[:3]:
            print(f"  failed: {reason.strip().splitlines()[-1][:200]}")
        if not point:
            sys.exit(f"error: hardly a request of this point was answered: {nothing_came}")
        points[kind].append(point | {"load": load})
        metrics.update({f"{kind}_{load:g}_{name}": value for name, value in point.items()})
        return point

    # A closed loop's rate is not known beforehand: at best every client is served as fast as at the
    # lighter load before.
    per_client = 1 / answer_s
    for clients in sorted(set(args.concurrencies)):
        expected = clients * per_client
        point = measure("concurrency", clients, clients, expected, "--max-concurrency")
        per_client = point["req_per_s"] / clients
    for rate in sorted(set(args.rates)):
        measure("rate", rate, math.ceil(2 * rate * answer_s), rate, "--request-rate")

    # -----------------------------------------------------------------------------
    # 4. The knee of each sweep

    knees = {}
    for kind, (unit, name) in UNITS.items():
        sweep = points[kind]
        knees[kind] = knee([point["good_ratio"] for point in sweep])
        if knees[kind] is None:
            best = {"load": 0, "goodput_req_per_s": 0}
            note = " (no load here keeps the objectives)"
        else:
            best = sweep[knees[kind]]
            last = best is sweep[-1]
            note = " (the heaviest load here: the knee may lie beyond)" if last else ""
        goodput = best["goodput_req_per_s"]
        print(f"knee: {best['load']:g} {unit}, goodput {goodput:.2f} requests/s{note}")
        metrics |= {
            f"knee_{kind}_{name}": best["load"],
            f"knee_{kind}_goodput_req_per_s": goodput,
        }
    results.picture(__file__, "bench", draw(points, knees, wanted))
    results.finish(__file__, metrics | {"failed_count": wrong}, vars(args) | {"model": model.id})
    if wrong:
        sys.exit(f"error: {wrong} requests failed: what was measured beside them does not count")


def line_of(point: dict) -> str:
    """A point as the rest of its line under HEADER."""
    line = f"{point['window_s']:10.1f}{point['req_per_s']:8.2f}"
    line += f"{point['goodput_req_per_s']:9.2f}{point['good_ratio']:7.0%}"
    line += f"{point['tok_per_s']:10.1f}"
    for name in ("ttft", "itl", "e2e"):
        line += f"{point[f'{name}_p50_ms']:10.0f}/{point[f'{name}_p99_ms']:<6.0f}"
    return line


if __name__ == "__main__":
    main()
