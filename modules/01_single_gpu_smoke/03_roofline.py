"""The roofline of this machine, measured: how fast it multiplies, how fast it reads, and which of
the two bounds each kind of work.

    make roofline
    python modules/01_single_gpu_smoke/03_roofline.py --batches 1 4 16 --prompt 256

Look at: the plot (runs/01_single_gpu_smoke/roofline.png). Work to the left of the ridge waits for
memory, work to the right of it for arithmetic (Williams et al. 2009). Decoding one sequence lies
far left; a larger batch moves it to the right and up, because the weights are read once for all;
prefill and training lie right. FLOPs are counted as 2 for a weight and a token, bytes as weights
and cache.
"""

import argparse

from lab import fail, jobs, machine, models, results
from lab.planner import speed
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=profile.smoke.model,
        help="name in configs/models.yaml, hub id or folder (default: %(default)s)",
    )
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

    def seconds(statement: str, **names) -> float:
        """Median time of one execution of `statement`, the device synchronised."""
        return (
            Timer(statement, globals=names, num_threads=torch.get_num_threads())
            .blocked_autorange(min_run_time=0.3)
            .median
        )

    # -----------------------------------------------------------------------------
    # 1. The roof: products by type and size, copies, and what a call costs that does nothing

    largest = profile.smoke.matmul_size
    sizes = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= largest]
    print(f"matrix product, TFLOP/s {'':6}" + "".join(f"{n:>9}" for n in sizes))
    for name in ("float32", "bfloat16") if device == "cpu" else ("float32", "float16", "bfloat16"):
        rates = []
        for n in sizes:
            a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, name)) for _ in "ab")
            rates.append(2 * n**3 / seconds("a @ b", a=a, b=b) / 1e12)
            metrics[f"matmul_{name}_{n}_tflop_per_s"] = round(rates[-1], 4)
        print(f"  {name:28}" + "".join(f"{rate:9.3f}" for rate in rates), flush=True)
    roof = max(value for key, value in metrics.items() if profile.dtype in key) * 1e12
    source = torch.ones(profile.smoke.copy_mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds("target.copy_(source)", target=target, source=source)
    metrics["copy_gb_per_s"] = round(bandwidth / 1e9, 2)
    if device != "cpu":
        host = torch.ones(profile.smoke.copy_mib * 2**20, dtype=torch.uint8).pin_memory()
        metrics["host_to_device_gb_per_s"] = round(
            host.numel() / seconds("target.copy_(host)", target=target, host=host) / 1e9, 2
        )
        metrics["device_to_host_gb_per_s"] = round(
            host.numel() / seconds("host.copy_(source)", host=host, source=source) / 1e9, 2
        )
        if torch.cuda.device_count() > 1:
            other = torch.empty_like(source, device="cuda:1")
            metrics["device_to_device_gb_per_s"] = round(
                source.numel() / seconds("other.copy_(source)", other=other, source=source) / 1e9, 2
            )
    one = torch.ones(1, device=device)
    metrics["launch_ms"] = round(
        Timer("one.add_(1)", globals={"one": one}).blocked_autorange(min_run_time=0.3).median * 1e3,
        5,
    )
    del source, target
    ridge = roof / bandwidth
    print(
        f"\ncopy {bandwidth / 1e9:.1f} GB/s, an operation on one number {metrics['launch_ms'] * 1e3:.1f} us; the ridge lies at {ridge:.0f} FLOP/byte ({profile.dtype})"
    )

    # -----------------------------------------------------------------------------
    # 2. What the stages do, on a real model: FLOPs and bytes counted, time measured

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    weights = parameters * dtype.itemsize
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize
    )  # bytes of keys and values
    work = {}  # name: (FLOPs, bytes, seconds)
    context = 128
    for batch in args.batches:
        with torch.inference_mode():
            ids = torch.randint(0, config.vocab_size, (batch, context), device=device)
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

            def decode(ids=ids[:, :1], cache=cache):
                model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache.crop(context)  # the next measurement begins where this one began

            took = seconds("decode()", decode=decode)
        work[f"decode, batch {batch}"] = (
            2 * parameters * batch,
            weights + batch * context * cache_token,
            took,
        )
    ids = torch.randint(0, config.vocab_size, (1, args.prompt), device=device)
    with torch.inference_mode():
        took = seconds(
            "model(input_ids=ids, use_cache=True, logits_to_keep=1)", model=model, ids=ids
        )
    work[f"prefill, {args.prompt} tokens"] = (
        2 * parameters * args.prompt,
        weights + args.prompt * cache_token,
        took,
    )

    def train():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    took = seconds("train()", train=train)
    work[f"training, {args.prompt} tokens"] = (
        6 * parameters * args.prompt,
        4 * weights,
        took,
    )  # read twice, gradients read and written

    print(
        f"\n{args.model}, {parameters / 1e6:.0f} M parameters{'':6} FLOP/byte   TFLOP/s   of what the roof allows   bound by"
    )
    for name, (flops, size, took) in work.items():
        intensity, allowed = flops / size, min(roof, flops / size * bandwidth)
        reached = flops / took / allowed
        print(
            f"  {name:30} {intensity:11.1f} {flops / took / 1e12:9.3f} {reached:24.0%}   {'memory' if intensity < ridge else 'arithmetic'}"
        )
        key = name.replace(", ", "_").replace(" ", "_").replace("_tokens", "")
        metrics |= {
            f"{key}_tflop_per_s": round(flops / took / 1e12, 4),
            f"{key}_of_roof_ratio": round(reached, 3),
            f"{key}_ms": round(took * 1e3, 2),
        }
    per_token = [work[f"decode, batch {b}"][2] / b for b in (min(args.batches), max(args.batches))]
    metrics |= {
        "batching_speedup_ratio": round(per_token[0] / per_token[1], 2),
        "ridge_ratio": round(ridge, 1),
    }
    print(
        f"\na token of batch {max(args.batches)} costs {1 / metrics['batching_speedup_ratio']:.2f} of the time of a token of batch {min(args.batches)}"
    )

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    x = np.logspace(-1, 4, 200)
    ax.loglog(
        x,
        np.minimum(roof, x * bandwidth) / 1e12,
        color="black",
        label=f"{machine.name()}, measured ({profile.dtype})",
    )
    name = machine.short(machine.gpus()[0]["name"]) if device != "cpu" else ""
    if card := speed.nominal(1, (name,)):
        nominal = np.minimum(card.flops, x * card.bandwidth) / 1e12
        ax.loglog(x, nominal, "--", color="gray", label=f"{name}, nominal (a prediction)")
    for name, (flops, size, took) in work.items():
        ax.plot(flops / size, flops / took / 1e12, "o")
        ax.annotate(
            name,
            (flops / size, flops / took / 1e12),
            textcoords="offset points",
            xytext=(7, -9),
            fontsize=8,
        )
    ax.axvline(ridge, color="black", linewidth=0.5, linestyle=":")
    ax.set(
        xlabel="FLOP per byte of memory",
        ylabel="TFLOP/s",
        title="Left of the ridge work waits for memory, right of it for arithmetic",
    )
    ax.legend(loc="lower right", fontsize=8)
    ax.grid(alpha=0.3)
    results.picture(__file__, "roofline", fig)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
