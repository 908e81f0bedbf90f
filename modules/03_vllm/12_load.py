"""Put the running server under a load like real traffic: did anything fail, did all come back?

Requests of mixed length (prompt and output lognormal, fixed seed), more at once than the server
takes; some clients hang up in the middle of their answer, some before its first token. Afterwards
no request may run and the KV cache must be empty again.

    make vllm-serve                                            # first, if it is not running
    make vllm-load
    make vllm-load ARGS="--requests 200 --concurrency 100"     # a longer queue: only TTFT grows
    make vllm-load ARGS="--cancel 0.5"                         # half of the clients hang up

Look at: `waiting` at its most (overload is answered by queueing), TTFT (which holds the time in the
queue) against ITL (which does not), and `failed`. A cut answer (finish_reason "abort") has HTTP
status 200, so the status alone would not show it. Exit code 1 if a request failed or the cache did
not return to empty.
"""

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass, field

from live_metrics import scrape  # the file beside this one

from lab import data, engine, fail, results
from lab.profile import load_profile

GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass
class Request:
    """One request of the plan, and what became of it."""

    prompt: list[int]
    length: int  # tokens asked for
    ending: str  # read it whole, cancel (in mid-answer) or disconnect (before the first token)
    outcome: str = ""  # finished, cancelled, disconnected or failed
    why: str = ""  # it failed
    stamps: list[float] = field(default_factory=list)  # of sending, and of each piece


async def send(client, model: str, request: Request) -> None:
    """Send one request, hang up as its ending says, and note its outcome and its stamps."""
    import openai

    asked = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.length,
        "temperature": 1,
        "extra_body": {"ignore_eos": True},
    }
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    reason = None
    received = 0
    request.stamps.append(time.perf_counter())
    try:
        if request.ending == "disconnect":
            try:
                async with asyncio.timeout(0.05):  # without a stream nothing comes before the end
                    await client.completions.create(**asked)
            except TimeoutError:
                request.outcome = "disconnected"
                return
        async with await client.completions.create(**asked, **stream) as pieces:
            async for piece in pieces:
                if piece.choices:
                    request.stamps.append(time.perf_counter())
                    reason = piece.choices[0].finish_reason or reason
                if piece.usage:
                    received = piece.usage.completion_tokens
                if request.ending == "cancel" and len(request.stamps) > request.length // 2:
                    request.outcome = "cancelled"
                    return  # leaving the `async with` closes the connection
    except openai.APIError as e:
        request.outcome = "failed"
        request.why = f"{type(e).__name__}: {e}"
        return
    # With ignore_eos nothing else is a whole answer.
    whole = reason == "length" and received == request.length
    request.outcome = "finished" if whole else "failed"
    request.why = f"{received} of {request.length} tokens, finish_reason {reason}"


async def load(address: str, model: str, plan: list[Request], concurrency: int) -> dict[str, float]:
    """Send all of `plan`, `concurrency` at once. Returns the highest gauges seen meanwhile."""
    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    options = {"api_key": key, "max_retries": 0, "timeout": 600}
    peaks = dict.fromkeys(GAUGES, 0.0)
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", **options) as client:
        free = asyncio.Semaphore(concurrency)

        async def wait_and_send(request: Request) -> None:
            async with free:
                await send(client, model, request)

        everything = asyncio.gather(*map(wait_and_send, plan))
        while not everything.done():
            await asyncio.wait([everything], timeout=0.5)
            seen = await asyncio.to_thread(scrape, address)
            for name in GAUGES:
                peaks[name] = max(peaks[name], seen[name])
        everything.result()  # raises what went wrong in it
    return peaks


def plan_of(args) -> list[Request]:
    """Lognormal lengths, as many endings of each kind as asked for, in random order.

    Prompts are random tokens, so that no prefix cache helps.
    """
    rng = random.Random(args.seed)
    cancelled = round(args.cancel * args.requests)
    gone = round(args.disconnect * args.requests)
    endings = ["cancel"] * cancelled + ["disconnect"] * gone
    endings += ["read"] * (args.requests - len(endings))
    rng.shuffle(endings)
    plan = []
    for ending in endings:
        tokens = data.lognormal(rng, args.prompt_tokens, args.max_tokens)
        prompt = [rng.randint(1000, 30000) for _ in range(tokens)]
        length = data.lognormal(rng, args.output_tokens, args.max_tokens)
        plan.append(Request(prompt, length, ending))
    count = f"{args.requests} requests, {args.concurrency} at once"
    print(f"{count}; {cancelled} will hang up in mid-answer, {gone} before it", flush=True)
    return plan


def latencies(plan: list[Request]) -> dict[str, list[float]]:
    """Seconds of the requests that finished: to the first token, between tokens, of the whole."""
    whole = [request.stamps for request in plan if request.outcome == "finished"]
    gaps = []
    for stamps in whole:
        gaps += [later - earlier for earlier, later in zip(stamps[1:], stamps[2:], strict=False)]
    return {
        "ttft": [stamps[1] - stamps[0] for stamps in whole],
        "itl": gaps,
        "e2e": [stamps[-1] - stamps[0] for stamps in whole],
    }


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def main() -> None:
    profile = load_profile()
    defaults = profile.load
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # The server
    engine.add_address_flag(parser, profile)
    # The load
    parser.add_argument(
        "--requests", type=int, default=defaults.requests, help="how many (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=defaults.concurrency,
        help="at most so many at once (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=float,
        default=defaults.prompt_tokens,
        help="mean prompt length (default: %(default)s)",
    )
    parser.add_argument(
        "--output-tokens",
        type=float,
        default=defaults.output_tokens,
        help="mean output length (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        help="longest prompt, longest output (default: %(default)s)",
    )
    # Clients that do not wait for the end
    parser.add_argument(
        "--cancel",
        type=float,
        default=0.15,
        help="share of clients that hang up in mid-answer (default: %(default)s)",
    )
    parser.add_argument(
        "--disconnect",
        type=float,
        default=0.1,
        help="share that hangs up before the answer begins (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of lengths and endings (default: %(default)s)"
    )
    args = parser.parse_args()
    check(args)
    try:
        before = scrape(args.address)
    except OSError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0)
    model = engine.served_model(client).id

    # -----------------------------------------------------------------------------
    # 1. The load

    plan = plan_of(args)
    began = time.perf_counter()
    try:
        peaks = asyncio.run(load(args.address, model, plan, args.concurrency))
        ended = time.perf_counter()

        # -----------------------------------------------------------------------------
        # 2. Afterwards: nothing runs, nothing waits, no block of the cache is held

        left = scrape(args.address)
        while any(left[name] for name in GAUGES) and time.perf_counter() - ended < 10:
            time.sleep(0.2)
            left = scrape(args.address)
        back_s = time.perf_counter() - ended
    except OSError:
        fail(f"the server at {args.address} went away under the load: its log says why")

    # -----------------------------------------------------------------------------
    # 3. What became of the requests

    outcomes = [request.outcome for request in plan]
    count = {
        name: outcomes.count(name) for name in ("finished", "cancelled", "disconnected", "failed")
    }
    for why in sorted({request.why for request in plan if request.outcome == "failed"})[:5]:
        print(f"  failed: {why[:200]}")
    tokens = left["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    rate = tokens / (ended - began)
    counts = "  ".join(f"{name} {number}" for name, number in count.items())
    print(f"{counts}   {ended - began:.1f} s, {rate:.0f} tokens/s")
    running, waiting, kv = peaks.values()
    print(f"at the most: {running:.0f} running, {waiting:.0f} waiting, KV cache {kv:.1%}")
    held = {name: left[name] for name in GAUGES if left[name]}
    state = f"NOT EMPTY: {held}" if held else "none running, KV cache 0.0%"
    print(f"afterwards: {state}, after {back_s:.1f} s")

    metrics = {"request_count": args.requests}
    metrics |= {f"{name}_count": number for name, number in count.items()}
    metrics |= {
        "running_peak_count": int(running),
        "waiting_peak_count": int(waiting),
        "kv_cache_peak_pct": round(100 * kv, 2),
        "kv_cache_after_pct": 100 * left["vllm:kv_cache_usage_perc"],
        "back_s": round(back_s, 2),
        "generation_tok_per_s": round(rate, 1),
    }
    for name, seconds in latencies(plan).items() if count["finished"] else ():
        p50 = round(1000 * percentile(seconds, 0.5), 1)
        p99 = round(1000 * percentile(seconds, 0.99), 1)
        print(f"{name.upper():5} p50 {p50:8.1f} ms   p99 {p99:8.1f} ms")
        metrics |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
    results.finish(__file__, metrics, vars(args) | {"model": model})
    raise SystemExit(1 if held or count["failed"] else 0)


def check(args) -> None:
    """Exit code 2 where the flags ask for a load that there is not."""
    if min(args.requests, args.concurrency) < 1 or min(args.prompt_tokens, args.output_tokens) <= 0:
        fail("--requests, --concurrency, --prompt-tokens and --output-tokens must be positive")
    if args.max_tokens < 4:
        fail("--max-tokens must be at least 4")
    if min(args.cancel, args.disconnect) < 0 or args.cancel + args.disconnect > 0.9:
        most = "together at most 0.9: somebody must read the answers"
        fail(f"--cancel and --disconnect are shares of 1, {most}")


if __name__ == "__main__":
    main()
