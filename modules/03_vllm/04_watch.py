"""Watch the running server from both sides: what the GPUs do, and what the engine says of itself.

One line a second: utilisation, memory and power of each card (nvitop's Python interface, the
numbers nvidia-smi shows too), and from the server's /metrics the requests running and waiting, the
share of the KV cache in use, tokens/s, TTFT and ITL of this second (median and 99th percentile, as
fine as the histograms' buckets), prefix cache hits and preemptions.

    make vllm-serve                                   # first, if it is not running
    python modules/03_vllm/04_watch.py --load 8       # keep 8 requests in flight meanwhile
    python modules/03_vllm/04_watch.py --load 64 --seconds 20

Look at: GPU-Util is near 100 % with 1 request as with 64, since it only says that some kernel ran;
tokens/s and power tell the difference. Without a GPU its columns say `n/a`.
"""

import argparse
import math
import os
import threading
import time

from lab import engine, fail, machine, results
from lab.profile import load_profile

HEADER = (
    " running waiting     KV  tokens/s  TTFT ms p50/p99  ITL ms p50/p99"
    "  hits preempted   each GPU: util, memory, power"
)


def gpu_columns() -> tuple[str, dict[str, float]]:
    """('98% 22.1G 312W  ...', {watts, util}) of the visible cards; 'n/a' without one."""
    if not machine.gpus():
        return "n/a", {}
    from nvitop import Device

    columns = []
    util, power, memory = [], [], []
    for device in (Device(uuid=gpu["uuid"]) for gpu in machine.gpus()):
        util.append(device.gpu_utilization())
        power.append(device.power_usage() / 1000)
        memory.append(device.memory_used() / 2**30)
        columns.append(f"{util[-1]}% {memory[-1]:.1f}G {power[-1]:.0f}W")
    return "  ".join(columns), {
        "gpu_util_pct": sum(util) / len(util),
        "gpu_power_w": sum(power),
        "gpu_memory_gib": sum(memory),
    }


def keep_busy(client, model: str, stop: threading.Event) -> None:
    """Send request after request until told to stop, or until the server is gone."""
    import openai

    while not stop.is_set():
        try:
            answer = client.completions.create(
                model=model,
                prompt="Once upon a time",
                max_tokens=100,
                temperature=1,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            with answer:  # left early, the server notices and frees the request's blocks
                for _ in answer:
                    if stop.is_set():
                        return
        except openai.APIError:
            return


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine.add_address_flag(parser, profile)
    parser.add_argument(
        "--seconds", type=int, default=10, help="how long to watch (default: %(default)s)"
    )
    parser.add_argument(
        "--load",
        type=int,
        default=8,
        metavar="N",
        help="requests to keep in flight meanwhile, 0: none (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.seconds < 2 or args.load < 0:
        fail("--seconds must be at least 2 and --load at least 0")

    from live_metrics import quantile, scrape  # the file beside this one

    try:
        scrape(args.address)
    except OSError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")

    # -----------------------------------------------------------------------------
    # 1. The load: so many readers, each with one request in flight

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=key, max_retries=0)
    model = engine.served_model(client).id
    stop = threading.Event()
    readers = []
    for _ in range(args.load):
        reader = threading.Thread(target=keep_busy, args=(client, model, stop), daemon=True)
        reader.start()
        readers.append(reader)
    patience = time.monotonic() + 30
    while args.load and time.monotonic() < patience:
        if scrape(args.address)["vllm:num_requests_running"]:
            break
        time.sleep(0.2)  # the first requests are still on their way

    # -----------------------------------------------------------------------------
    # 2. A line a second: what the counters say now, less what they said a second ago

    def percentiles(name: str, since: dict, now: dict) -> list[float]:
        """p50 and p99 in ms of what this histogram took in between the two scrapes."""
        return [1000 * quantile(q, f"vllm:{name}_seconds", since, now) for q in (0.5, 0.99)]

    rows = []
    print(HEADER)
    first = before = scrape(args.address)
    last = time.perf_counter()
    try:
        for _ in range(args.seconds):
            time.sleep(1)
            now = scrape(args.address)
            gpu_text, gpu_numbers = gpu_columns()
            elapsed = time.perf_counter() - last
            last = time.perf_counter()
            new = {name: now[name] - before.get(name, 0.0) for name in now}

            row = {
                "running_count": now["vllm:num_requests_running"],
                "waiting_count": now["vllm:num_requests_waiting"],
                "kv_cache_pct": 100 * now["vllm:kv_cache_usage_perc"],
                "generation_tok_per_s": new["vllm:generation_tokens_total"] / elapsed,
            }
            columns = "{:8.0f}{:8.0f}{:6.1f}%{:10.1f}".format(*row.values())
            for name, width in (("time_to_first_token", 17), ("inter_token_latency", 16)):
                p50, p99 = percentiles(name, before, now)
                shown = "-" if math.isnan(p50) else f"{p50:.0f}/{p99:.0f}"
                columns += f"{shown:>{width}}"
            asked = new["vllm:prefix_cache_queries_total"]
            hits = f"{new['vllm:prefix_cache_hits_total'] / asked:.0%}" if asked else "-"
            columns += f"{hits:>6}{new['vllm:num_preemptions_total']:10.0f}"
            print(f"{columns}   {gpu_text}", flush=True)
            rows.append(row | gpu_numbers)
            before = now
    except OSError:
        fail(f"the server at {args.address} went away while it was watched")
    finally:
        stop.set()
        for reader in readers:  # each closes its own connection
            reader.join(timeout=10)

    # -----------------------------------------------------------------------------
    # 3. The mean of the second half (the first holds the start), latencies of the whole watch

    steady = rows[len(rows) // 2 :]
    metrics = {name: round(sum(row[name] for row in steady) / len(steady), 2) for name in steady[0]}
    for short, name in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        p50, p99 = percentiles(name, first, before)
        if not math.isnan(p99):
            metrics |= {f"{short}_p50_ms": round(p50, 1), f"{short}_p99_ms": round(p99, 1)}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
