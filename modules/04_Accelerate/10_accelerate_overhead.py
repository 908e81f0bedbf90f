"""What Accelerate costs over native DDP: both in one run, in turns, and each suspect taken out.

    make accelerate-overhead                                       # two processes
    make accelerate-overhead ARGS="--rounds 5 --micro-batch 4"
    make accelerate-overhead ARGS="--only native_ddp accelerate"

The loops (overhead_loops.py) are those of 01_train_ddp.py and 02_train_accelerate.py, on a model of
this shape with random weights and on random tokens: no hub is needed. They train in turns, a few
steps each, again and again, so that whatever else the machine does falls on all of them.

Look at: `native_ddp_again`, the same loop twice. As far as it is from 1, a difference says nothing.
The losses must agree: then the loops compute the same. The last line is arithmetic: what the copy
of the logits to float32, which Accelerate makes of a model's outputs, can take of a step at most.
"""

import argparse
import gc
import os
import statistics
import time

from lab import fail, models, results, training
from lab.profile import load_profile
from lab.table import table

STEPS = 8
WARM_UP = 3  # of them: DDP lays its buckets anew after the first one
ROUNDS = 3
# The keys of overhead_loops.LOOPS, here too: that file imports torch.
NAMES = ("native_ddp", "accelerate", "accelerate_only_loss", "accelerate_own_loader")
NAMES += ("accelerate_bucket_view", "native_ddp_again", "deepspeed_0", "deepspeed_0_autocast")


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    shape = "the shape: a name in configs/models.yaml, or a config.json"
    training.add_flag(parser, "--model", str, profile.train.model, shape)
    training.add_flag(parser, "--layers", int, 0, "only so many layers of it; 0: all")
    training.add_flag(parser, "--seq-len", int, profile.train.seq_len, "tokens of a block")
    training.add_flag(parser, "--micro-batch", int, profile.train.micro_batch, "blocks of a step")
    training.add_flag(
        parser, "--steps", int, STEPS, f"steps of a turn, {WARM_UP} of them unmeasured"
    )
    training.add_flag(parser, "--rounds", int, ROUNDS, "turns of each loop")
    only = "loops to run (default: all)"
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help=only)
    training.add_precision_flag(parser, profile.train)
    training.add_process_flag(parser)
    args = parser.parse_args()
    args.accumulate = 1
    args.learning_rate = 2e-5
    training.refuse_impossible(args, profile.device)
    if args.steps <= WARM_UP or args.rounds < 1 or args.layers < 0:
        fail(f"--steps must be above {WARM_UP}, --rounds at least 1, --layers at least 0")
    if "native_ddp" not in args.only:
        fail("--only must name native_ddp: the others are compared with it")
    config = dict(models.config(args.model))
    if not {"num_hidden_layers", "vocab_size"} <= config.keys():
        fail(f"{args.model} is more than a language model: take one of text alone")
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]

    import overhead_loops
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    # -----------------------------------------------------------------------------
    # 1. The processes, random tokens, and the model's shape

    os.environ.update(training.ONE_PROCESS | os.environ)
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    training.refuse_alone(world, args.min_world)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    uses_deepspeed = any(name.startswith("deepspeed") for name in args.only)
    if uses_deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend())  # takes the group that is there
    shape = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    blocks = torch.randint(shape.vocab_size, (args.steps * world * args.micro_batch, args.seq_len))
    bf16 = args.mixed_precision == "bf16"
    setting = overhead_loops.Setting(blocks, args.micro_batch, device, bf16)
    step_tokens = world * args.micro_batch * args.seq_len

    # -----------------------------------------------------------------------------
    # 2. A turn: the same random model anew, wrapped by this loop, and a few steps

    def turn(name: str) -> tuple[list[float], float]:
        """(losses, seconds of a step: the median) of `--steps` steps by this loop."""
        torch.manual_seed(0)
        dtype = torch.bfloat16 if bf16 and name == "deepspeed_0" else torch.float32
        with device:
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype).train()
        loop = overhead_loops.LOOPS[name](model, setting)
        del model
        losses = []
        seconds = []
        for _ in range(args.steps):
            began = time.perf_counter()
            losses.append(round(loop.step(), 6))
            seconds.append(time.perf_counter() - began)
        loop.end()
        return losses, statistics.median(seconds[WARM_UP:])

    losses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in args.only}
    held_gib = 0.0  # the most that a turn left behind
    for number in range(args.rounds):
        first = number % len(args.only)  # each round another one: who comes first is slower
        for name in [*args.only[first:], *args.only[:first]]:
            losses[name], took = turn(name)
            seconds[name].append(took)
            gc.collect()  # one model at a time
            if device.type == "cuda":
                torch.cuda.empty_cache()
                held_gib = max(held_gib, torch.cuda.memory_allocated() / 2**30)
            if rank == 0:
                print(f"round {number + 1}   {name:22}   {1e3 * took:8.1f} ms a step", flush=True)

    # -----------------------------------------------------------------------------
    # 3. The arithmetic: how long the logits of a step take to be copied to float32

    def copy_seconds() -> float:
        logits = torch.zeros(
            args.micro_batch, args.seq_len, shape.vocab_size, dtype=torch.bfloat16, device=device
        )
        took = []
        for _ in range(6):
            torch.get_device_module(device).synchronize()
            began = time.perf_counter()
            logits.float()
            torch.get_device_module(device).synchronize()
            took.append(time.perf_counter() - began)
        return statistics.median(took[1:])

    numbers = args.micro_batch * args.seq_len * shape.vocab_size
    arithmetic = {
        "logits_copied_gb": numbers * (2 + 4) / 1e9,
        "logits_copy_ms": 1e3 * copy_seconds(),
    }
    if rank == 0:
        metrics = {"world_size": world, "step_tok_count": step_tokens, "losses": losses}
        metrics |= show(losses, seconds, step_tokens) | arithmetic
        metrics["left_behind_gib"] = round(held_gib, 3)
        native_ms = 1e3 * statistics.median(seconds["native_ddp"])
        metrics["logits_copy_of_step_ratio"] = arithmetic["logits_copy_ms"] / native_ms
        print(
            f"logits to float32: {arithmetic['logits_copied_gb']:.2f} GB read and written, "
            f"{arithmetic['logits_copy_ms']:.2f} ms, "
            f"{metrics['logits_copy_of_step_ratio']:.2%} of a native step"
        )
        results.finish(__file__, metrics, vars(args) | {"only": list(args.only)})
    if uses_deepspeed and device.type == "cpu":
        training.forget_shared_memory(rank)
    dist.destroy_process_group()


def show(
    losses: dict[str, list[float]], seconds: dict[str, list[float]], step_tokens: int
) -> dict[str, float]:
    """The table, and its metrics: each loop's speed over native DDP's of the same round."""
    rows = []
    metrics = {}
    native = seconds["native_ddp"]
    for name, took in seconds.items():
        ratios = sorted(base / each for base, each in zip(native, took, strict=True))
        ratio = statistics.median(ratios)
        rate = step_tokens / statistics.median(took)
        pairs = zip(losses[name], losses["native_ddp"], strict=True)
        worst = max(abs(ours - ddp) / ddp for ours, ddp in pairs)
        metrics[f"{name}_tok_per_s"] = rate
        metrics[f"{name}_over_native_ratio"] = ratio
        metrics[f"{name}_least_ratio"] = ratios[0]
        metrics[f"{name}_most_ratio"] = ratios[-1]
        metrics[f"{name}_loss_difference_ratio"] = float(f"{worst:.2g}")
        between = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        rows.append([name, f"{rate:,.0f}", f"{ratio:.3f}", between, f"{worst:.1e}"])
    metrics["native_spread_ratio"] = max(native) / min(native)
    table(["", "tokens/s", "of native DDP", "in the rounds", "losses differ by"], rows)
    return metrics


if __name__ == "__main__":
    main()
