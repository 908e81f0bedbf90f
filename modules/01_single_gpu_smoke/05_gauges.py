"""What the gauges of `nvidia-smi` (and of `top`) really say: small loads move them one by one.

    make gauges
    python modules/01_single_gpu_smoke/05_gauges.py --seconds 3

Look at: the rows "one number", "copy" and "matrix product". GPU-Util is the share of time in which
at least one kernel ran, so all three look busy, and one does a millionth of another's arithmetic;
power and the work done tell them apart. And the row "memory held": a full memory says nothing of
work. On a CPU the first gauge counts busy cores, which is another thing. Plot:
runs/01_single_gpu_smoke/gauges.png.
"""

import argparse
import threading
import time
from typing import NamedTuple

from lab import fail, jobs, machine, results
from lab.profile import load_profile
from lab.table import table


class Sample(NamedTuple):
    """What the gauges said at a moment, and which load ran then."""

    at: float
    load: str
    gauges: dict[str, float]


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--seconds", type=float, default=4, help="how long each load runs (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.seconds < 2:
        fail("--seconds must be at least 2: the gauges need a second to follow")
    jobs.refuse_taken_cards()

    import torch

    # -----------------------------------------------------------------------------
    # 1. The loads: each does its work once and returns (FLOPs, bytes moved)

    device = "cuda:0" if profile.device == "cuda" else "cpu"
    dtype = getattr(torch, profile.dtype)
    n = profile.smoke.matmul_size
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    source = torch.ones(profile.smoke.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    number = torch.ones(1, device=device)
    held: list[torch.Tensor] = []

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def add_up() -> None:
        for _ in range(1000):
            number.add_(1)

    add_up()
    adding = add_up
    if device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # kernel after kernel, without Python in between
            add_up()
        adding = graph.replay

    def idle():
        time.sleep(0.05)
        return 0, 0

    def memory_held():
        if not held:
            size = 4 * source.numel()
            held.append(torch.ones(size, dtype=torch.uint8, device=device))
        return idle()

    def one_number():
        held.clear()
        adding()
        wait()
        return 1000, 8000

    def copy():
        target.copy_(source)
        wait()
        return 0, 2 * source.numel()

    def matrix_product():
        torch.mm(a, b)
        wait()
        return 2 * n**3, 0

    def half_the_time():
        began = time.perf_counter()
        flops = 0
        while time.perf_counter() - began < 0.1:
            flops += matrix_product()[0]
        time.sleep(time.perf_counter() - began)
        return flops, 0

    for work in (one_number, copy, matrix_product):  # the first of each is slow
        work()

    # -----------------------------------------------------------------------------
    # 2. Run each, and look at the gauges ten times a second

    loads = {
        "idle": idle,
        "memory held": memory_held,
        "one number": one_number,
        "copy": copy,
        "matrix product": matrix_product,
        "product, half the time": half_the_time,
    }
    samples: list[Sample] = []
    running = "idle"
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            samples.append(Sample(time.perf_counter(), running, read_gauges(device)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    print(f"{device}, {profile.dtype}, {args.seconds:g} s each", flush=True)
    metrics: dict[str, float] = {}
    rows = []
    for name, work in loads.items():
        running = name
        began = time.perf_counter()
        flops = 0
        moved = 0
        while time.perf_counter() - began < args.seconds:
            operations, size = work()
            flops += operations
            moved += size
        took = time.perf_counter() - began

        followed = began + min(1.2, args.seconds / 2)  # the gauges lag behind
        seen = [s.gauges for s in samples if s.load == name and s.at > followed]
        mean = {gauge: sum(gauges[gauge] for gauges in seen) / len(seen) for gauge in seen[0]}
        tflops = flops / took / 1e12
        gb_per_s = moved / took / 1e9
        rows.append(
            [
                name,
                f"{mean['util_pct']:.0f}%",
                f"{mean['memory_gib']:.1f} GiB",
                f"{mean['clock_mhz']:.0f} MHz",
                f"{mean['power_w']:.0f} W" if "power_w" in mean else "-",
                f"{tflops:.6f} TFLOP/s",
                f"{gb_per_s:.1f} GB/s",
            ]
        )
        key = name.replace(", ", "_").replace(" ", "_")
        metrics |= {f"{key}_{gauge}": round(value, 2) for gauge, value in mean.items()}
        metrics[f"{key}_tflop_per_s"] = round(tflops, 9)
        metrics[f"{key}_gb_per_s"] = round(gb_per_s, 3)
    stop.set()
    watcher.join()

    print()
    table(["load", "util", "memory", "clock", "power", "computed", "moved"], rows)
    times = metrics["matrix_product_tflop_per_s"] / metrics["one_number_tflop_per_s"]
    metrics["product_over_number_ratio"] = round(times, 0)
    print(f"\nthe matrix product does {times:,.0f} times the arithmetic of adding to one number")
    results.picture(__file__, "gauges", draw(samples, device))
    results.finish(__file__, metrics, vars(args))


def read_gauges(device: str) -> dict[str, float]:
    """What the machine says now: util_pct, memory_gib, clock_mhz and, on a GPU, power_w."""
    if device == "cpu":
        import psutil

        clock = psutil.cpu_freq()  # None where the system does not say
        return {
            "util_pct": psutil.cpu_percent(),
            "memory_gib": psutil.virtual_memory().used / 2**30,
            "clock_mhz": clock.current if clock else 0,
        }
    import pynvml

    card = machine.handles()[0]
    rates = pynvml.nvmlDeviceGetUtilizationRates(card)  # of the last sixth of a second to second
    return {
        "util_pct": rates.gpu,
        "memory_gib": pynvml.nvmlDeviceGetMemoryInfo(card).used / 2**30,
        "clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
    }


def draw(samples: list[Sample], device: str):
    """The figure: a plot for each gauge over the whole run, the loads as coloured bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "util_pct": "GPU-Util (%)" if device != "cpu" else "busy cores (%)",
        "memory_gib": "memory used (GiB)",
        "clock_mhz": "clock (MHz)",
        "power_w": "power (W)",
    }
    gauges = list(samples[0].gauges)
    size = (8, 1.6 * len(gauges) + 0.6)
    fig, axes = plt.subplots(len(gauges), 1, figsize=size, sharex=True, layout="constrained")
    start = samples[0].at
    seconds = [sample.at - start for sample in samples]
    bands: dict[str, list[float]] = {}  # of each load: when it was seen
    for second, sample in zip(seconds, samples, strict=True):
        bands.setdefault(sample.load, []).append(second)

    for ax, gauge in zip(axes, gauges, strict=True):
        values = [sample.gauges[gauge] for sample in samples]
        ax.plot(seconds, values, color="black", linewidth=1)
        ax.set(ylabel=labels[gauge], ylim=(0, None))
        for number, band in enumerate(bands.values()):
            ax.axvspan(band[0], band[-1] + 0.1, color=f"C{number}", alpha=0.15)
    above = {"transform": axes[0].get_xaxis_transform(), "ha": "center", "fontsize": 8}
    for load, band in bands.items():
        middle = (band[0] + band[-1]) / 2
        axes[0].text(middle, 1.03, load.replace(", ", ",\n"), **above)
    axes[-1].set_xlabel("seconds")
    return fig


if __name__ == "__main__":
    main()
