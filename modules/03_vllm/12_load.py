"""Put the running server under a load like real traffic, then ask: did anything fail, and did everything come back?

Requests of mixed length (prompt and output lognormal, fixed seed), more at once than the server takes; some clients hang up in the
middle of their answer, some before its first token. Afterwards no request may run and the KV cache must be empty again.

    make vllm-serve                                            # first, if it is not running
    make vllm-load
    make vllm-load ARGS="--requests 200 --concurrency 100"     # a longer queue: TTFT grows, ITL does not
    make vllm-load ARGS="--cancel 0.5"                         # half of the clients hang up

Look at: `waiting` at its most (overload is answered by queueing), TTFT (which holds the time in the queue) against ITL (which does
not), and `failed`. A cut answer (finish_reason "abort") has HTTP status 200, so the status alone would not show it.
Exit code 1 if a request failed or the cache did not return to empty.
"""

import argparse
import asyncio
import os
import random
import time

from lab import data, engine, fail, results
from lab.profile import load_profile


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


async def send(client, model: str, prompt: list[int], length: int, ending: str) -> tuple[str, list[float]]:
    """One request. `ending`: read it whole, cancel (hang up after half of the answer) or disconnect (hang up before it begins).
    Returns what became of it, `finished`, `cancelled`, `disconnected` or `failed: why`, and the times of sending and of each piece."""
    import openai

    stamps, why, received = [time.perf_counter()], None, 0
    try:
        asked = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 1, "stream": True, "extra_body": {"ignore_eos": True}}
        if ending == "disconnect":
            try:
                async with asyncio.timeout(0.05):
                    await client.completions.create(**asked | {"stream": False})  # nothing is sent back before the end
            except TimeoutError:
                return "disconnected", stamps
        async with await client.completions.create(**asked, stream_options={"include_usage": True}) as stream:
            async for piece in stream:
                if piece.choices:
                    stamps.append(time.perf_counter())
                    why = piece.choices[0].finish_reason or why
                if ending == "cancel" and len(stamps) > length // 2:
                    return "cancelled", stamps  # leaving the `async with` closes the connection
                received = piece.usage.completion_tokens if piece.usage else received
    except openai.APIError as e:
        return f"failed: {type(e).__name__}: {e}", stamps
    if why != "length" or received != length:  # with ignore_eos nothing else is a whole answer
        return f"failed: {received} of {length} tokens, finish_reason {why}", stamps
    return "finished", stamps


async def load(address: str, model: str, plan: list[tuple], concurrency: int, peaks: dict) -> list[tuple[str, list[float]]]:
    """All requests of `plan`, `concurrency` at once; `peaks` takes the highest gauges seen meanwhile."""
    import openai
    from live_metrics import scrape  # the file beside this one

    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=os.environ.get("VLLM_API_KEY", "unused"), max_retries=0, timeout=600) as client:
        free = asyncio.Semaphore(concurrency)

        async def one(request):
            async with free:
                return await send(client, model, *request)

        answers = asyncio.gather(*(one(request) for request in plan))
        while not answers.done():
            await asyncio.wait([answers], timeout=0.5)
            for name, value in (await asyncio.to_thread(scrape, address)).items():
                if name in peaks:
                    peaks[name] = max(peaks[name], value)
        return answers.result()


def main() -> None:
    profile = load_profile()
    p = profile.load
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=f"http://127.0.0.1:{profile.serve.port}", help="the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=p.requests, help="how many (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=p.concurrency, help="at most so many at once (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=float, default=p.prompt_tokens, help="mean prompt length (default: %(default)s)")
    parser.add_argument("--output-tokens", type=float, default=p.output_tokens, help="mean output length (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=p.max_tokens, help="longest prompt, longest output (default: %(default)s)")
    parser.add_argument("--cancel", type=float, default=0.15, help="share of clients that hang up in mid-answer (default: %(default)s)")
    parser.add_argument("--disconnect", type=float, default=0.1, help="share that hangs up before the answer begins (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and endings (default: %(default)s)")
    args = parser.parse_args()
    if min(args.requests, args.concurrency) < 1 or args.max_tokens < 4 or min(args.prompt_tokens, args.output_tokens) <= 0:
        fail("--requests, --concurrency, --prompt-tokens and --output-tokens must be positive, --max-tokens at least 4")
    if min(args.cancel, args.disconnect) < 0 or args.cancel + args.disconnect > 0.9:
        fail("--cancel and --disconnect are shares of 1, together at most 0.9: somebody must read the answers")

    import openai
    from live_metrics import scrape

    try:
        scrape(args.address)
    except OSError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")

    model = engine.served_model(openai.OpenAI(base_url=f"{args.address}/v1", api_key=os.environ.get("VLLM_API_KEY", "unused"), max_retries=0))

    # -----------------------------------------------------------------------------
    # 1. The load: random tokens as prompts (so that no prefix cache helps), as many endings of each kind as asked

    rng = random.Random(args.seed)
    cancelled, gone = round(args.cancel * args.requests), round(args.disconnect * args.requests)
    endings = ["cancel"] * cancelled + ["disconnect"] * gone + ["read"] * (args.requests - cancelled - gone)
    rng.shuffle(endings)
    plan = []
    for ending in endings:
        prompt = [rng.randint(1000, 30000) for _ in range(data.lognormal(rng, args.prompt_tokens, args.max_tokens))]
        plan.append((prompt, data.lognormal(rng, args.output_tokens, args.max_tokens), ending))
    print(f"{args.requests} requests, {args.concurrency} at once; {cancelled} will hang up in mid-answer, {gone} before it", flush=True)
    peaks = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}
    began, before = time.perf_counter(), scrape(args.address)
    try:
        answers = asyncio.run(load(args.address, model.id, plan, args.concurrency, peaks))
        seconds = time.perf_counter() - began

        # -----------------------------------------------------------------------------
        # 2. Afterwards: nothing runs, nothing waits, no block of the cache is held

        left = scrape(args.address)
        while any(left[name] for name in peaks) and time.perf_counter() - began - seconds < 10:
            time.sleep(0.2)
            left = scrape(args.address)
        back_s = time.perf_counter() - began - seconds
        tokens = left["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    except OSError:
        fail(f"the server at {args.address} went away under the load: its log says why")

    # -----------------------------------------------------------------------------
    # 3. What became of the requests

    count = {what: sum(a[0].split(":")[0] == what for a in answers) for what in ("finished", "cancelled", "disconnected", "failed")}
    for words in sorted({a[0] for a in answers if a[0].startswith("failed")})[:5]:
        print(f"  {words[:200]}")
    print("  ".join(f"{what} {n}" for what, n in count.items()) + f"   {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
    running, waiting, kv = peaks.values()
    print(f"at the most: {running:.0f} running, {waiting:.0f} waiting, KV cache {kv:.1%}")
    clean = not any(left[name] for name in peaks)
    print(f"afterwards: {'none running, KV cache 0.0%' if clean else 'NOT EMPTY: ' + str({name: left[name] for name in peaks})}, after {back_s:.1f} s")
    whole = [stamps for what, stamps in answers if what == "finished"]
    times = {"ttft": [s[1] - s[0] for s in whole], "itl": [b - a for s in whole for a, b in zip(s[1:], s[2:], strict=False)], "e2e": [s[-1] - s[0] for s in whole]}
    metrics = {"request_count": args.requests, **{f"{what}_count": n for what, n in count.items()}}
    metrics |= {"running_peak_count": int(running), "waiting_peak_count": int(waiting), "kv_cache_peak_pct": round(100 * kv, 2)}
    metrics |= {"kv_cache_after_pct": 100 * left["vllm:kv_cache_usage_perc"], "back_s": round(back_s, 2), "generation_tok_per_s": round(tokens / seconds, 1)}
    for name, values in times.items() if whole else ():
        p50, p99 = (round(1000 * percentile(values, q), 1) for q in (0.5, 0.99))
        print(f"{name.upper():5} p50 {p50:8.1f} ms   p99 {p99:8.1f} ms")
        metrics |= {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
    results.finish(__file__, metrics, vars(args) | {"model": model.id})
    raise SystemExit(0 if clean and not count["failed"] else 1)


if __name__ == "__main__":
    main()
