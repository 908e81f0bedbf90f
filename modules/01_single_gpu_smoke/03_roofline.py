"""The roofline of this machine, measured: which kind of work waits for memory, and which does not.

    make roofline
    python modules/01_single_gpu_smoke/03_roofline.py --batches 1 4 16 --prompt 256

Look at: the plot (runs/01_single_gpu_smoke/roofline.png). The roof is how fast this machine
multiplies and how fast it reads. Work to the left of the ridge waits for memory, work to the right
of it for arithmetic (Williams et al. 2009). Decoding one sequence lies far left; a larger batch
moves it to the right and up, because the weights are read once for all; prefill and training lie
right. FLOPs are counted as 2 for a weight and a token, bytes as weights and cache.
"""

import argparse
from typing import NamedTuple

from lab import fail, jobs, machine, models, results
from lab.planner import speed
from lab.profile import load_profile
from lab.table import table

SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)  # of the square matrices
CONTEXT = 128  # tokens that each sequence has in the cache while it decodes


class Task(NamedTuple):
    """Something a model does: operations and bytes counted, seconds measured."""

    name: str
    flops: float
    moved: float  # bytes read and written
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.moved

    @property
    def flop_per_s(self) -> float:
        return self.flops / self.seconds


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The model, and what it is asked to do
    models.add_model_flag(parser, profile.smoke.model)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        metavar="B",
        help="sequences that decode together (default: 1 8 64)",
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=512,
        metavar="T",
        help="tokens of prefill and of the training step (default: %(default)s)",
    )
    args = parser.parse_args()
    if min(*args.batches, args.prompt) < 1:
        fail("--batches and --prompt must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    import torch
    from torch.utils.benchmark import Timer
    from transformers import AutoModelForCausalLM

    device = "cuda:0" if profile.device == "cuda" else "cpu"
    dtype = getattr(torch, profile.dtype)
    metrics: dict[str, float] = {}

    def seconds(statement: str, threads: int = torch.get_num_threads(), **names) -> float:
        """Median time of one execution of `statement`, the device synchronised."""
        timer = Timer(statement, globals=names, num_threads=threads)
        return timer.blocked_autorange(min_run_time=0.3).median

    # -----------------------------------------------------------------------------
    # 1. The flat part of the roof: matrix products by type and size

    sizes = [n for n in SIZES if n <= profile.smoke.matmul_size]
    dtypes = ["float32", "bfloat16"]
    if device != "cpu":
        dtypes.insert(1, "float16")
    tflops: dict[str, list[float]] = {}  # of each type, by size
    for name in dtypes:
        tflops[name] = []
        for n in sizes:
            a = torch.randn(n, n, device=device, dtype=getattr(torch, name))
            b = torch.randn(n, n, device=device, dtype=getattr(torch, name))
            tflops[name].append(2 * n**3 / seconds("a @ b", a=a, b=b) / 1e12)
            metrics[f"matmul_{name}_{n}_tflop_per_s"] = round(tflops[name][-1], 4)
    rows = [[name, *(f"{rate:.3f}" for rate in rates)] for name, rates in tflops.items()]
    table(["matrix product, TFLOP/s", *map(str, sizes)], rows, indent=0)
    roof = max(tflops[profile.dtype]) * 1e12

    # -----------------------------------------------------------------------------
    # 2. Its slope: a copy reads every byte and writes it; and a call that does nothing

    source = torch.ones(profile.smoke.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = source.numel()
    bandwidth = 2 * size / seconds("target.copy_(source)", target=target, source=source)
    metrics["copy_gb_per_s"] = round(bandwidth / 1e9, 2)
    if device != "cpu":
        host = torch.ones(size, dtype=torch.uint8).pin_memory()
        up = size / seconds("target.copy_(host)", target=target, host=host)
        down = size / seconds("host.copy_(source)", host=host, source=source)
        metrics["host_to_device_gb_per_s"] = round(up / 1e9, 2)
        metrics["device_to_host_gb_per_s"] = round(down / 1e9, 2)
    if device != "cpu" and torch.cuda.device_count() > 1:
        other = torch.empty_like(source, device="cuda:1")
        across = size / seconds("other.copy_(source)", other=other, source=source)
        metrics["device_to_device_gb_per_s"] = round(across / 1e9, 2)
    del source, target
    launch_s = seconds("one.add_(1)", threads=1, one=torch.ones(1, device=device))
    metrics["launch_ms"] = round(launch_s * 1e3, 5)
    ridge = roof / bandwidth
    print(
        f"\ncopy {bandwidth / 1e9:.1f} GB/s, an operation on one number {launch_s * 1e6:.1f} us; "
        f"the ridge lies at {ridge:.0f} FLOP/byte ({profile.dtype})"
    )

    # -----------------------------------------------------------------------------
    # 3. What the stages do, on a real model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = model.config
    parameters = sum(weight.numel() for weight in model.parameters())
    weights = parameters * dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_hidden_layers * config.num_key_value_heads * head_dim  # numbers of a token
    cache_token = 2 * keys * dtype.itemsize  # bytes, with the values

    tasks: list[Task] = []
    for batch in args.batches:
        ids = torch.randint(0, config.vocab_size, (batch, CONTEXT), device=device)
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

            def decode(ids=ids[:, :1], cache=cache):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache.crop(CONTEXT)  # the next measurement begins where this one began

            took = seconds("decode()", decode=decode)
        moved = weights + batch * CONTEXT * cache_token
        tasks.append(Task(f"decode, batch {batch}", 2 * parameters * batch, moved, took))

    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device=device)

    @torch.inference_mode()
    def prefill():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    flops = 2 * parameters * args.prompt
    moved = weights + args.prompt * cache_token
    took = seconds("prefill()", prefill=prefill)
    tasks.append(Task(f"prefill, {args.prompt} tokens", flops, moved, took))

    def train():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    flops = 6 * parameters * args.prompt
    moved = 4 * weights  # read twice, gradients read and written
    took = seconds("train()", train=train)
    tasks.append(Task(f"training, {args.prompt} tokens", flops, moved, took))

    # -----------------------------------------------------------------------------
    # 4. How near the roof each of them comes

    rows = []
    for task in tasks:
        reached = task.flop_per_s / min(roof, task.intensity * bandwidth)
        bound_by = "memory" if task.intensity < ridge else "arithmetic"
        measured = f"{task.flop_per_s / 1e12:.3f}"
        rows.append([task.name, f"{task.intensity:.1f}", measured, f"{reached:.0%}", bound_by])
        key = task.name.replace(", ", "_").replace(" ", "_").replace("_tokens", "")
        metrics[f"{key}_tflop_per_s"] = round(task.flop_per_s / 1e12, 4)
        metrics[f"{key}_of_roof_ratio"] = round(reached, 3)
        metrics[f"{key}_ms"] = round(task.seconds * 1e3, 2)
    print(f"\n{args.model}, {parameters / 1e6:.0f} M parameters")
    table(["", "FLOP/byte", "TFLOP/s", "of what the roof allows", "bound by"], rows)

    few = min(args.batches)
    many = max(args.batches)
    step_s = {batch: task.seconds for batch, task in zip(args.batches, tasks, strict=False)}
    speedup = (step_s[few] / few) / (step_s[many] / many)
    metrics["batching_speedup_ratio"] = round(speedup, 2)
    metrics["ridge_ratio"] = round(ridge, 1)
    print(
        f"\na token of batch {many} costs {1 / speedup:.2f} of the time of a token of batch {few}"
    )

    label = f"{machine.name()}, measured ({profile.dtype})"
    card = machine.short(machine.gpus()[0]["name"]) if device != "cpu" else ""
    results.picture(__file__, "roofline", draw(tasks, roof, bandwidth, label, card))
    results.finish(__file__, metrics, vars(args))


def draw(tasks: list[Task], roof: float, bandwidth: float, label: str, card: str):
    """The figure; in it also the nominal roof of `card`, where configs/cards.yaml knows it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    intensities = np.logspace(-1, 4, 200)
    measured = np.minimum(roof, intensities * bandwidth) / 1e12
    ax.loglog(intensities, measured, color="black", label=label)
    nominal = speed.nominal(1, (card,))
    if nominal:
        predicted = np.minimum(nominal.flops, intensities * nominal.bandwidth) / 1e12
        predicted_label = f"{card}, nominal (a prediction)"
        ax.loglog(intensities, predicted, "--", color="gray", label=predicted_label)
    beside = {"textcoords": "offset points", "xytext": (7, -9), "fontsize": 8}
    for task in tasks:
        place = (task.intensity, task.flop_per_s / 1e12)
        ax.plot(*place, "o")
        ax.annotate(task.name, place, **beside)
    ax.axvline(roof / bandwidth, color="black", linewidth=0.5, linestyle=":")
    ax.set(xlabel="FLOP per byte of memory", ylabel="TFLOP/s")
    ax.set_title("Left of the ridge work waits for memory, right of it for arithmetic")
    ax.legend(loc="lower right", fontsize=8)
    ax.grid(alpha=0.3)
    return fig


if __name__ == "__main__":
    main()
