"""Watch the running server from both sides while it works: what the GPUs do, and what the engine says of itself.

One line a second: utilisation, memory and power of each card (nvitop's Python interface, the numbers nvidia-smi shows too), and
from the server's /metrics the requests running and waiting, the share of the KV cache in use, tokens/s, TTFT and ITL of this second
(median and 99th percentile, as fine as the histograms' buckets), prefix cache hits and preemptions.

    make vllm-serve                                   # first, if it is not running
    python modules/03_vllm/04_watch.py --load 8       # keep 8 requests in flight meanwhile
    python modules/03_vllm/04_watch.py --load 64 --seconds 20

Look at: GPU-Util is near 100 % with 1 request as with 64, since it only says that some kernel ran; tokens/s and power tell the
difference. Without a GPU its columns say `n/a`.
"""

import argparse
import os
import threading
import time

from lab import engine, fail, machine, results
from lab.profile import load_profile


def gpu_columns() -> tuple[str, dict[str, float]]:
    """('98% 22.1G 312W  ...', {watts, util}) of the visible cards; 'n/a' without one."""
    if not machine.gpus():
        return "n/a", {}
    from nvitop import Device

    devices = [Device(uuid=gpu["uuid"]) for gpu in machine.gpus()]
    columns = [f"{d.gpu_utilization()}% {d.memory_used() / 2**30:.1f}G {d.power_usage() / 1000:.0f}W" for d in devices]
    return "  ".join(columns), {
        "gpu_util_pct": sum(d.gpu_utilization() for d in devices) / len(devices),
        "gpu_power_w": sum(d.power_usage() for d in devices) / 1000,
        "gpu_memory_gib": sum(d.memory_used() for d in devices) / 2**30,
    }


def keep_busy(client, model: str, stop: threading.Event) -> None:
    """One reader: request after request until told to stop, or until the server is gone."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=f"http://127.0.0.1:{profile.serve.port}", help="the server (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="how long to watch (default: %(default)s)")
    parser.add_argument("--load", type=int, default=8, metavar="N", help="requests to keep in flight meanwhile, 0: none (default: %(default)s)")
    args = parser.parse_args()
    if args.seconds < 2 or args.load < 0:
        fail("--seconds must be at least 2 and --load at least 0")

    from live_metrics import quantile, scrape  # the file beside this one

    try:
        scrape(args.address)
    except OSError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")

    import openai

    stop = threading.Event()
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key=os.environ.get("VLLM_API_KEY", "unused"), max_retries=0)
    model = engine.served_model(client).id
    readers = []
    for _ in range(args.load):
        reader = threading.Thread(target=keep_busy, args=(client, model, stop), daemon=True)
        reader.start()
        readers.append(reader)
    patience = time.monotonic() + 30
    while args.load and not scrape(args.address)["vllm:num_requests_running"] and time.monotonic() < patience:
        time.sleep(0.2)  # the first requests are still on their way
    first = before = scrape(args.address)

    def milliseconds(name: str, since: dict, now: dict) -> list[float]:
        return [1000 * quantile(q, f"vllm:{name}_seconds", since, now) for q in (0.5, 0.99)]

    rows = []
    print(f"{'running':>8}{'waiting':>8}{'KV':>7}{'tokens/s':>10}{'TTFT ms p50/p99':>17}{'ITL ms p50/p99':>16}{'hits':>6}{'preempted':>10}   each GPU: util, memory, power")
    try:
        last = time.perf_counter()
        for _ in range(args.seconds):
            time.sleep(1)
            now, gpu = scrape(args.address), gpu_columns()
            elapsed, last = time.perf_counter() - last, time.perf_counter()
            rate = (now["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]) / elapsed
            ttft, itl = ("/".join(f"{v:.0f}" for v in milliseconds(n, before, now)).replace("nan/nan", "-") for n in ("time_to_first_token", "inter_token_latency"))
            asked, hit, preempted = (now[n] - before[n] for n in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"))
            before = now
            row = {"running_count": now["vllm:num_requests_running"], "waiting_count": now["vllm:num_requests_waiting"]}
            row |= {"kv_cache_pct": 100 * now["vllm:kv_cache_usage_perc"], "generation_tok_per_s": rate, **gpu[1]}
            rows.append(row)
            columns = f"{row['running_count']:8.0f}{row['waiting_count']:8.0f}{row['kv_cache_pct']:6.1f}%{rate:10.1f}{ttft:>17}{itl:>16}"
            print(f"{columns}{f'{hit / asked:.0%}' if asked else '-':>6}{preempted:10.0f}   {gpu[0]}", flush=True)
    except OSError:
        fail(f"the server at {args.address} went away while it was watched")
    finally:
        stop.set()
        # Each closes its own connection: closed from here, its descriptor's number could be reused.
        for reader in readers:
            reader.join(timeout=10)

    steady = rows[len(rows) // 2 :]  # the first half holds the start
    metrics = {name: round(sum(row[name] for row in steady) / len(steady), 2) for name in steady[0]}
    for name, metric in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):  # over the whole watch
        p50, p99 = milliseconds(metric, first, before)
        metrics |= {f"{name}_p50_ms": round(p50, 1), f"{name}_p99_ms": round(p99, 1)} if p99 == p99 else {}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
