"""Watch the running server from both sides while it works: what the GPUs do, and what the engine says of itself.

One line a second: utilisation, memory and power of each card (nvitop's Python interface, the numbers nvidia-smi shows too), and
from the server's /metrics the requests running and waiting, the share of the KV cache in use, and tokens/s.

    make vllm-serve                                   # first, if it is not running
    python modules/03_vllm/04_watch.py --load 8       # keep 8 requests in flight meanwhile
    python modules/03_vllm/04_watch.py --load 64 --seconds 20

Look at: GPU-Util is near 100 % with 1 request as with 64, since it only says that some kernel ran; tokens/s and power tell the
difference. Without a GPU its columns say `n/a`.
"""

import argparse
import threading
import time

from lab import fail, machine, results
from lab.profile import load_profile


def engine_metrics(address: str) -> dict[str, float]:
    """Samples of vLLM's /metrics by name, summed over engines."""
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    text = urllib.request.urlopen(f"{address}/metrics", timeout=5).read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def gpu_columns() -> tuple[str, dict[str, float]]:
    """('98% 22.1G 312W  ...', {watts, util}) of the visible cards; 'n/a' without one."""
    if not machine.gpus():
        return "n/a", {}
    from nvitop import Device

    devices = Device.cuda.all()
    columns = [f"{d.gpu_utilization()}% {d.memory_used() / 2**30:.1f}G {d.power_usage() / 1000:.0f}W" for d in devices]
    return "  ".join(columns), {
        "gpu_util_pct": sum(d.gpu_utilization() for d in devices) / len(devices),
        "gpu_power_w": sum(d.power_usage() for d in devices) / 1000,
        "gpu_memory_gib": sum(d.memory_used() for d in devices) / 2**30,
    }


def keep_busy(client, model: str, stop: threading.Event) -> None:
    """One reader that sends request after request until told to stop, or until its connection is closed."""
    import openai

    while not stop.is_set():
        try:
            client.completions.create(model=model, prompt="Once upon a time", max_tokens=100, temperature=1, extra_body={"ignore_eos": True})
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
    try:
        engine_metrics(args.address)
    except OSError:
        fail(f"no server answers at {args.address}: start one with 'make vllm-serve'")

    import openai

    stop = threading.Event()
    client = openai.OpenAI(base_url=f"{args.address}/v1", api_key="unused", max_retries=0)
    model = client.models.list().data[0].id
    for _ in range(args.load):
        threading.Thread(target=keep_busy, args=(client, model, stop), daemon=True).start()
    patience = time.monotonic() + 30
    while args.load and not engine_metrics(args.address)["vllm:num_requests_running"] and time.monotonic() < patience:
        time.sleep(0.2)  # the first requests are still on their way
    before = engine_metrics(args.address)

    rows = []
    print(f"{'running':>8}{'waiting':>9}{'KV cache':>10}{'tokens/s':>10}   each GPU: util, memory, power")
    try:
        last = time.perf_counter()
        for _ in range(args.seconds):
            time.sleep(1)
            now, gpu = engine_metrics(args.address), gpu_columns()
            elapsed, last = time.perf_counter() - last, time.perf_counter()
            rate = (now["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]) / elapsed
            before = now
            row = {"running_count": now["vllm:num_requests_running"], "waiting_count": now["vllm:num_requests_waiting"]}
            row |= {"kv_cache_pct": 100 * now["vllm:kv_cache_usage_perc"], "generation_tok_per_s": rate, **gpu[1]}
            rows.append(row)
            print(f"{row['running_count']:8.0f}{row['waiting_count']:9.0f}{row['kv_cache_pct']:9.1f}%{rate:10.1f}   {gpu[0]}", flush=True)
    except OSError:
        fail(f"the server at {args.address} went away while it was watched")
    finally:
        stop.set()
        client.close()  # the server notices and frees the requests' blocks

    steady = rows[len(rows) // 2 :]  # the first half holds the start
    metrics = {name: round(sum(row[name] for row in steady) / len(steady), 2) for name in steady[0]}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
