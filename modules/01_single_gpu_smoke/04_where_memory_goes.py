"""Where memory goes, step by step, on a living model, until it is trained and deleted.

    make memory
    python modules/01_single_gpu_smoke/04_where_memory_goes.py --batch 8 --tokens 128

Look at: what each step added, beside what arithmetic says it must add (lab/planner), and the
three gauges that disagree: what tensors hold, what the allocator keeps for later (`nvidia-smi`
shows this one), and the peak, which decides whether it fits. On a CPU the C library is the
allocator: `holds` is read after malloc_trim, `keeps` before it. Last comes fragmentation,
provoked by fragmentation.py.
"""

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import fragmentation  # the files beside this one
from memory_gauges import Walk

from lab import fail, jobs, models, results
from lab.planner import weights
from lab.planner.config import Model, read
from lab.planner.constants import GIB
from lab.planner.serving import kv_bytes_per_token
from lab.planner.training import saved_bytes_per_token
from lab.profile import load_profile

NEW = 64  # tokens that each sequence decodes


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The model and its work
    models.add_model_flag(parser, profile.smoke.model)
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of each (default: %(default)s)")
    args = parser.parse_args()
    if min(args.batch, args.tokens) < 1:
        fail("--batch and --tokens must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import DynamicCache

    # -----------------------------------------------------------------------------
    # 1. Serving: weights, then keys and values of every token

    device = "cuda:0" if profile.device == "cuda" else "cpu"
    dtype = getattr(torch, profile.dtype)
    sizes = read(models.config(str(folder)))
    predicted = Predicted(sizes, profile.dtype, args.batch * args.tokens)
    work = f"{args.batch} x {args.tokens} tokens, on {device}"
    print(f"{args.model}, {predicted.millions:.0f} M parameters in {profile.dtype}, {work}\n")
    walk = Walk(device)
    alive = SimpleNamespace()  # everything that lives

    def load():
        alive.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        for weight in alive.model.parameters():  # on a CPU pages of the file, until written to
            weight.data = weight.data.clone()

    walk.step("weights", "weights", load, predicted.weights)
    ids = torch.randint(0, sizes.vocab, (args.batch, args.tokens), device=device)

    @torch.inference_mode()
    def prefill():
        alive.cache = DynamicCache(config=alive.model.config)
        alive.model(input_ids=ids, past_key_values=alive.cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode():
        for _ in range(NEW):
            alive.model(input_ids=ids[:, :1], past_key_values=alive.cache, use_cache=True)

    def end_requests():
        del alive.cache

    prompts = predicted.cache(args.batch * args.tokens)
    answers = predicted.cache(args.batch * NEW)
    walk.step("prefill", "prefill: the KV cache stays", prefill, prompts)
    walk.step("decode", f"decode: {NEW} tokens a sequence", decode, answers)
    walk.step("requests_end", "the requests end", end_requests, -prompts - answers)

    # -----------------------------------------------------------------------------
    # 2. A training step: activations, gradients, the optimizer's states

    def forward():
        alive.loss = alive.model(input_ids=ids, labels=ids, use_cache=False).loss

    def backward():
        alive.loss.backward()
        del alive.loss

    kept = walk.step(
        "forward", "training, forward: activations stay", forward, predicted.activations
    )
    left = predicted.weights - kept
    walk.step("backward", "backward: gradients replace them", backward, left)
    alive.optimizer = torch.optim.AdamW(alive.model.parameters(), lr=1e-5)
    moments = 2 * predicted.weights
    walk.step("optimizer_step", "AdamW: two moments a weight", alive.optimizer.step, moments)
    walk.step("zero_grad", "gradients set to None", alive.optimizer.zero_grad, -predicted.weights)

    # -----------------------------------------------------------------------------
    # 3. All is deleted, and the allocator asked to give back what it keeps

    def delete():
        alive.optimizer.state.clear()
        alive.optimizer.param_groups.clear()
        vars(alive).clear()

    walk.step("deleted", "model and optimizer deleted", delete, -3 * predicted.weights)
    walk.memory.give_back()
    keeps = walk.memory.keeps() / GIB
    print(f"\n  after {walk.memory.gives_back_by} the allocator keeps {keeps:.3f} GiB")
    metrics = walk.metrics | {"keeps_at_the_end_gib": round(keeps, 4)}

    # -----------------------------------------------------------------------------
    # 4. Fragmentation, under each allocator

    print(
        "\n  fragmentation: taken from the system, as a share of what tensors hold"
        "     then    after giving back"
    )
    allocators = {"c_library": {}}
    if device != "cpu":
        allocators = {
            "segments": {"PYTORCH_ALLOC_CONF": "expandable_segments:False"},
            "expandable": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        }
    for allocator, environment in allocators.items():
        for pattern in fragmentation.PATTERNS:
            command = [sys.executable, fragmentation.__file__, device, pattern]
            options = {"env": os.environ | environment, "stdout": subprocess.PIPE, "text": True}
            child = subprocess.run(command, check=True, **options)
            shares = json.loads(child.stdout.splitlines()[-1])
            then = shares["kept_ratio"]
            later = shares["given_back_ratio"]
            print(f"    {allocator:12} {pattern:56}{then:8.2f}{later:10.2f}", flush=True)
            key = f"{allocator}_{pattern.replace(' ', '_')}"
            metrics[f"{key}_ratio"] = round(then, 3)
            metrics[f"{key}_given_back_ratio"] = round(later, 3)
    results.finish(__file__, metrics, vars(args))


class Predicted:
    """What lab/planner says in bytes of a model, and of a training step with `tokens` tokens."""

    def __init__(self, sizes: Model, dtype: str, tokens: int):
        precision = "fp32" if dtype == "float32" else "bf16"
        self.millions = weights.parameters(sizes) / 1e6
        self.weights = weights.stored_bytes(sizes, dtype)
        self.cache_token = kv_bytes_per_token(sizes, dtype=dtype)
        # Of the logits the graph keeps the log-softmax, in fp32; while the loss is computed they
        # exist two and a half times: see the peak.
        logits = 4 * sizes.vocab * tokens
        layer = saved_bytes_per_token(sizes, "full", precision) * tokens
        self.activations = sizes.layers * layer + logits

    def cache(self, tokens: int) -> float:
        return tokens * self.cache_token


if __name__ == "__main__":
    main()
