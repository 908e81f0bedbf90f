"""What the gauges of `nvidia-smi` (and of `top`) really say: each is provoked by a small load that
does one thing.

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

from lab import fail, jobs, machine, results
from lab.profile import load_profile


def read_gauges(device: str) -> dict[str, float]:
    """What the machine says of itself now: util_pct, memory_gib, clock_mhz and, on a GPU, power_w."""
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
    return {
        "util_pct": pynvml.nvmlDeviceGetUtilizationRates(
            card
        ).gpu,  # of the last sixth of a second to second
        "memory_gib": pynvml.nvmlDeviceGetMemoryInfo(card).used / 2**30,
        "clock_mhz": pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
    }


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=4, help="how long each load runs (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.seconds < 2:
        fail("--seconds must be at least 2: the gauges need a second to follow")
    jobs.refuse_taken_cards()

    import torch

    device = "cuda:0" if profile.device == "cuda" else "cpu"
    dtype = getattr(torch, profile.dtype)

    # -----------------------------------------------------------------------------
    # 1. The loads: each does its work once and returns (FLOPs, bytes moved)

    n = profile.smoke.matmul_size
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    source = torch.ones(profile.smoke.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    number = torch.ones(1, device=device)
    held = []

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def idle():
        time.sleep(0.05)
        return 0, 0

    def memory_held():
        if not held:
            held.append(
                torch.ones(4 * profile.smoke.copy_mib * 2**20, dtype=torch.uint8, device=device)
            )
        return idle()

    def add_up():
        for _ in range(1000):
            number.add_(1)

    add_up()
    graph = torch.cuda.CUDAGraph() if device != "cpu" else None
    if graph:
        with torch.cuda.graph(graph):  # kernel after kernel, without Python in between
            add_up()

    def one_number():
        held.clear()
        graph.replay() if graph else add_up()
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
        began, flops = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            flops += matrix_product()[0]
        time.sleep(time.perf_counter() - began)
        return flops, 0

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
    for work in (one_number, copy, matrix_product):  # the first of each is slow
        work()
    samples: list[tuple[float, str, dict]] = []
    now, stop = ["idle"], threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            samples.append((time.perf_counter(), now[0], read_gauges(device)))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    metrics: dict[str, float] = {}
    print(
        f"{device}, {profile.dtype}, {args.seconds:g} s each\n\n  {'load':24}{'util':>7}{'memory':>12}{'clock':>11}{'power':>9}{'work done':>34}"
    )
    for name, work in loads.items():
        now[0] = name
        began, flops, moved = time.perf_counter(), 0, 0
        while (took := time.perf_counter() - began) < args.seconds:
            done = work()
            flops, moved = flops + done[0], moved + done[1]
        seen = [
            gauges
            for t, load, gauges in samples
            if load == name and t > began + min(1.2, args.seconds / 2)
        ]  # after they followed
        mean = {gauge: sum(s[gauge] for s in seen) / len(seen) for gauge in seen[0]}
        key = name.replace(", ", "_").replace(" ", "_")
        metrics |= {f"{key}_{gauge}": round(value, 2) for gauge, value in mean.items()}
        metrics |= {
            f"{key}_tflop_per_s": round(flops / took / 1e12, 9),
            f"{key}_gb_per_s": round(moved / took / 1e9, 3),
        }
        power = f"{mean['power_w']:.0f} W" if "power_w" in mean else "-"
        work_done = f"{flops / took / 1e12:.6f} TFLOP/s  {moved / took / 1e9:7.1f} GB/s"
        print(
            f"  {name:24}{mean['util_pct']:6.0f}%{mean['memory_gib']:8.1f} GiB{mean['clock_mhz']:7.0f} MHz{power:>9}{work_done:>34}",
            flush=True,
        )
    stop.set()
    watcher.join()
    metrics["product_over_number_ratio"] = round(
        metrics["matrix_product_tflop_per_s"] / metrics["one_number_tflop_per_s"], 0
    )
    print(
        f"\nthe matrix product does {metrics['product_over_number_ratio']:,.0f} times the arithmetic of adding to one number"
    )

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    words = {
        "util_pct": "GPU-Util (%)" if device != "cpu" else "busy cores (%)",
        "memory_gib": "memory used (GiB)",
        "clock_mhz": "clock (MHz)",
        "power_w": "power (W)",
    }
    gauges = list(samples[0][2])
    fig, axes = plt.subplots(
        len(gauges), 1, figsize=(8, 1.6 * len(gauges) + 0.6), sharex=True, layout="constrained"
    )
    start = samples[0][0]
    for ax, gauge in zip(axes, gauges, strict=True):
        ax.plot(
            [t - start for t, _, _ in samples],
            [s[gauge] for _, _, s in samples],
            color="black",
            linewidth=1,
        )
        ax.set(ylabel=words[gauge], ylim=(0, None))
        for i, name in enumerate(loads):
            times = [t - start for t, load, _ in samples if load == name]
            ax.axvspan(times[0], times[-1] + 0.1, color=f"C{i}", alpha=0.15)
            if ax is axes[0]:
                ax.text(
                    (times[0] + times[-1]) / 2,
                    1.03,
                    name.replace(", ", ",\n"),
                    transform=ax.get_xaxis_transform(),
                    ha="center",
                    fontsize=8,
                )
    axes[-1].set_xlabel("seconds")
    results.picture(__file__, "gauges", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
