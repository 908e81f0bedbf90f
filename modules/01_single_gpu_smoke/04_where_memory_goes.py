"""Where memory goes, step by step, on a living model: process, weights, cache, activations,
gradients, optimizer, holes.

    make memory
    python modules/01_single_gpu_smoke/04_where_memory_goes.py --batch 8 --tokens 128

Look at: what each step added, beside what arithmetic says it must add (lab/planner), and the
three gauges that disagree: what tensors hold, what the allocator keeps for later (`nvidia-smi`
shows this one), and the peak, which decides whether it fits. On a CPU the C library is the
allocator: `holds` is read after malloc_trim, `keeps` before it. Fragmentation stands at the end,
provoked.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from lab import fail, jobs, models, results
from lab.planner import weights as counted
from lab.planner.config import read
from lab.planner.constants import GIB
from lab.planner.serving import kv_bytes_per_token
from lab.planner.training import saved_bytes_per_token
from lab.profile import load_profile

NEW = 64  # tokens that each sequence decodes


# -----------------------------------------------------------------------------
# 1. The gauges


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return (
        int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])
        * 1024
    )


def keeps(device: str) -> int:
    """Bytes that the allocator has taken from the card (CPU: from the system; pages of files on
    disk do not count).
    """
    import torch

    return torch.cuda.memory_reserved() if device != "cpu" else status("RssAnon")


def give_back(device: str) -> None:
    """Let the allocator return what no tensor holds."""
    import torch

    if device != "cpu":
        torch.cuda.empty_cache()
    else:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def holds(device: str) -> int:
    """Bytes of living tensors (CPU: of the whole process, after giving back)."""
    import torch

    if device != "cpu":
        return torch.cuda.memory_allocated()
    give_back(device)
    return status("RssAnon")


# -----------------------------------------------------------------------------
# 2. Fragmentation: enough is free, in pieces that are too small. In a process of its own, which
# begins with an empty allocator


def holes(device: str, pattern: str) -> dict[str, float]:
    """Ask for 40 blocks of 100 MiB (CPU: 4,000 of 100 KiB), then go on as `pattern` says; bytes are
    given as a share of what tensors then hold.

    "every second one freed": half of the blocks go, then blocks of 120 come in the same number;
    "shorter sequences": all go, then blocks of 60 come, then of 40 + 10, as when a long batch is
    followed by shorter ones.
    """
    import torch

    torch.zeros(1, device=device)
    before = keeps(device)
    count, unit = (40, 2**20) if device != "cpu" else (4000, 2**10)

    def blocks(size: int, number: int) -> list:
        return [torch.ones(size * unit, dtype=torch.uint8, device=device) for _ in range(number)]

    first = blocks(100, count)
    if pattern == "every second one freed":
        first = first[::2]
        second = blocks(120, count // 2)
    else:
        first = None
        second = blocks(60, count)
        first = blocks(50, int(count * 0.8))
    held = sum(t.nbytes for t in [*first, *second])
    kept = keeps(device) - before
    give_back(device)
    return {
        "held_gib": held / GIB,
        "kept_ratio": kept / held,
        "given_back_ratio": (keeps(device) - before) / held,
    }


# -----------------------------------------------------------------------------


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
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--holes", help=argparse.SUPPRESS
    )  # the pattern that a process of its own shows
    args = parser.parse_args()
    device = "cuda:0" if profile.device == "cuda" else "cpu"
    if args.holes:
        print(json.dumps(holes(device, args.holes)))
        return
    if min(args.batch, args.tokens) < 1:
        fail("--batch and --tokens must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    dtype = getattr(torch, profile.dtype)
    sizes = read(models.config(str(folder)))
    precision = "fp32" if dtype == torch.float32 else "bf16"
    tokens = args.batch * args.tokens
    metrics: dict[str, float] = {}
    alive: dict = {}  # everything that lives, by name
    weights = counted.stored_bytes(sizes, profile.dtype)
    cache = kv_bytes_per_token(sizes, dtype=profile.dtype)

    def step(key: str, words: str, work, predicted: float) -> float:
        """Do `work`; a line with GiB of what it added (returned in bytes), what it should add, the
        gauges after it, the peak while it ran.
        """
        before = holds(device)
        if device == "cpu":
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            start = status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
        work()
        if device == "cpu":
            peak = before + status("VmHWM") - start
        else:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        kept, held = keeps(device), holds(device)
        row = {
            "added": held - before,
            "predicted": predicted,
            "holds": held,
            "keeps": kept,
            "peak": peak,
        }
        print(
            f"  {words:36}" + "".join(f"{value / GIB:>11.3f}" for value in row.values()), flush=True
        )
        metrics.update({f"{key}_{name}_gib": round(value / GIB, 4) for name, value in row.items()})
        return row["added"]

    # -----------------------------------------------------------------------------
    # 3. The walk

    print(
        f"{args.model}, {counted.parameters(sizes) / 1e6:.0f} M parameters in {profile.dtype}, {args.batch} x {args.tokens} tokens, on {device}\n"
    )
    print(
        f"  GiB{'':33}"
        + "".join(f"{word:>11}" for word in ("added", "predicted", "holds", "keeps", "peak"))
    )
    if device != "cpu":
        free = torch.cuda.mem_get_info()[0]  # the first question makes the context
        context = torch.cuda.mem_get_info()[1] - free
        print(
            f"  {'CUDA context, and others on the card':36}{context / GIB:11.3f}   outside of what PyTorch counts"
        )
        metrics["context_gib"] = round(context / GIB, 4)
    else:
        metrics["process_gib"] = round(holds(device) / GIB, 4)
        print(f"  {'Python, torch, transformers':36}{metrics['process_gib']:11.3f}")

    def load():
        alive["model"] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        for p in alive["model"].parameters():
            p.data = (
                p.data.clone()
            )  # on a CPU weights are pages of the file until somebody writes to them

    step("weights", "weights", load, weights)
    ids = torch.randint(0, sizes.vocab, (args.batch, args.tokens), device=device)
    model = alive["model"]

    @torch.inference_mode()
    def prefill():
        alive["cache"] = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=alive["cache"], use_cache=True, logits_to_keep=1)

    step("prefill", "prefill: the KV cache stays", prefill, tokens * cache)

    @torch.inference_mode()
    def decode():
        for _ in range(NEW):
            model(input_ids=ids[:, :1], past_key_values=alive["cache"], use_cache=True)

    step("decode", f"decode: {NEW} tokens a sequence", decode, NEW * args.batch * cache)
    step(
        "requests_end",
        "the requests end",
        lambda: alive.pop("cache"),
        -(args.tokens + NEW) * args.batch * cache,
    )

    def forward():
        alive["loss"] = model(input_ids=ids, labels=ids, use_cache=False).loss

    # Of the logits the graph keeps the log-softmax, in fp32; while the loss is computed they exist
    # two and a half times: see the peak.
    saved = (
        sizes.layers * saved_bytes_per_token(sizes, "full", precision) * tokens
        + 4 * sizes.vocab * tokens
    )
    kept = step("forward", "training, forward: activations stay", forward, saved)
    step(
        "backward",
        "backward: gradients replace them",
        lambda: alive.pop("loss").backward(),
        weights - kept,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step("optimizer_step", "AdamW: two moments a weight", optimizer.step, 2 * weights)
    step("zero_grad", "gradients set to None", optimizer.zero_grad, -weights)

    def end():
        optimizer.state.clear()
        optimizer.param_groups.clear()
        alive.pop("model")

    model = None
    step("deleted", "model and optimizer deleted", end, -3 * weights)
    give_back(device)
    print(
        f"\n  after {'torch.cuda.empty_cache()' if device != 'cpu' else 'malloc_trim'} the allocator keeps {keeps(device) / GIB:.3f} GiB"
    )
    metrics["keeps_at_the_end_gib"] = round(keeps(device) / GIB, 4)

    # -----------------------------------------------------------------------------
    # 4. Holes, under each allocator

    print(
        "\n  fragmentation: taken from the system, as a share of what tensors hold     then    after giving back"
    )
    settings = (
        {"c_library": {}}
        if device == "cpu"
        else {
            "segments": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
            "expandable": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        }
    )
    for setting, environment in settings.items():
        for pattern in ("every second one freed", "shorter sequences"):
            child = subprocess.run(
                [sys.executable, __file__, "--holes", pattern],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found = json.loads(child.stdout.splitlines()[-1])
            print(
                f"    {setting:12} {pattern:56}{found['kept_ratio']:8.2f}{found['given_back_ratio']:10.2f}",
                flush=True,
            )
            key = f"{setting}_{pattern.replace(' ', '_')}"
            metrics |= {
                f"{key}_ratio": round(found["kept_ratio"], 3),
                f"{key}_given_back_ratio": round(found["given_back_ratio"], 3),
            }
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
