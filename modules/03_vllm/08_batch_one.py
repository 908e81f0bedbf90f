"""How near decoding comes to the memory's bandwidth, for one request and for many.

One request alone reads every weight for every token, many share the reading.

    make batch-one
    python modules/03_vllm/08_batch_one.py --batches 1 4 16
    python modules/03_vllm/08_batch_one.py --load-format dummy

Flags that this script does not know go to vLLM.
Look at: `of the bandwidth` at batch 1, weights and keys and values read a second over what a copy
moves in the same run (read and written). What is missing at batch 1 is the engine's own time
between two steps, and kernels too small to keep the memory busy. Then at tokens/s, which grow with
the batch while a step hardly takes longer. Plot: runs/03_vllm/batch_one.png.
"""

import argparse
import time

from closed_loop import drive, warm_up  # the file beside this one

from lab import engine, fail, jobs, models, results
from lab.planner import config
from lab.planner import weights as counted
from lab.planner.constants import width
from lab.planner.serving import kv_bytes_per_token
from lab.profile import load_profile
from lab.table import table


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_model_flag(parser, defaults.model)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8, 32],
        help="requests at once (default: 1 8 32)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=32, help="of each (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=128, help="of each (default: %(default)s)"
    )
    args, flags = parser.parse_known_args()
    if min(*args.batches, args.prompt_tokens, args.answer_tokens - 1) < 1:
        fail("--batches and --prompt-tokens must be at least 1, --answer-tokens at least 2")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)
    device = "cuda:0" if profile.device == "cuda" else "cpu"

    import torch
    from vllm import SamplingParams

    copy = copy_gb_per_s(device, profile.smoke.copy_mib)
    if device != "cpu":
        torch.cuda.empty_cache()  # vLLM counts what is left on the card as taken

    # -----------------------------------------------------------------------------
    # 1. What a step reads: every weight but the embedding's (one row of it a token), and the cache

    vllm = engine.start(folder, profile.dtype, defaults.args, flags)
    warm_up(vllm)
    sizes = config.read(models.config(str(folder)))
    stored = {None: profile.dtype, "fp8": "fp8"}.get(vllm.model_config.quantization, "auto")
    # Of the embedding a token reads one row.
    unread = 0 if sizes.tied else counted.embedding(sizes) * width(profile.dtype)
    weights = counted.stored_bytes(sizes, stored) - unread
    kv = kv_bytes_per_token(sizes, dtype=profile.dtype)
    context = args.prompt_tokens + args.answer_tokens / 2  # on the mean

    def bytes_of_a_step(batch: int) -> float:
        return weights + batch * context * kv

    read = f"a step reads {weights / 1e9:.3f} GB of weights, and {kv / 1024:.0f} KiB a token"
    print(f"\ncopy {copy:.1f} GB/s; {read} of context")

    # -----------------------------------------------------------------------------
    # 2. Decode, batch by batch

    params = SamplingParams(temperature=0, max_tokens=args.answer_tokens, ignore_eos=True)
    metrics: dict[str, float] = {
        "copy_gb_per_s": round(copy, 1),
        "weights_gb": round(weights / 1e9, 4),
    }
    rows = []
    for batch in args.batches:
        requests = []
        for i in range(batch):
            tokens = [1000 + (17 * i + 31 * j) % 9000 for j in range(args.prompt_tokens)]
            requests.append(({"prompt_token_ids": tokens}, params))
        step = drive(vllm, requests).step_s
        rate = batch / step
        read = bytes_of_a_step(batch) / step / 1e9
        columns = [f"{1e3 * step:.2f} ms", f"{rate:.1f}", f"{read:.1f} GB/s", f"{read / copy:.0%}"]
        rows.append([batch, *columns])
        metrics |= {
            f"batch_{batch}_step_ms": round(1e3 * step, 3),
            f"batch_{batch}_tok_per_s": round(rate, 1),
            f"batch_{batch}_of_bandwidth_ratio": round(read / copy, 3),
        }
    engine.stop(vllm)
    table(["batch", "a step", "tokens/s", "read", "of the bandwidth"], rows)

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    allowed = [batch * copy * 1e9 / bytes_of_a_step(batch) for batch in args.batches]
    reached = [metrics[f"batch_{batch}_tok_per_s"] for batch in args.batches]
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(args.batches, allowed, "k--", label="what the bandwidth allows")
    ax.plot(args.batches, reached, "o-", label="vLLM")
    ax.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens/s")
    ax.set_title("One reading of the weights serves the whole batch")
    ax.set_xticks(args.batches, args.batches)
    ax.grid(alpha=0.3)
    ax.legend()
    results.picture(__file__, "batch_one", fig)
    results.finish(__file__, metrics, vars(args))


def copy_gb_per_s(device: str, mib: int) -> float:
    """GB/s read and written by a copy of `mib` MiB, the best of 10."""
    import torch

    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() / best / 1e9


if __name__ == "__main__":
    main()
