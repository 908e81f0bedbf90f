"""Gradients sent in bf16: half the bytes of plain DDP's, its losses and its time beside it.

    make train-compressed                     # two processes
    make train-compressed ARGS="--steps 40"

Three trainings take turns in one run, each from the same weights: DDP as module 04 has it; the same
all-reduce by a communication hook, so that its bytes can be counted; and PyTorch's
bf16_compress_hook, which rounds each bucket of gradients to bf16, sends it, and widens it again.

Look at: the bytes, which are half; the time, which falls where sending is what a step waits for
(PCIe without P2P, Ethernet) and rises where it is not (processes of one CPU); and the losses, which
part at the third digit or later. The weights, the optimizer and its moments stay in float32.
"""

import argparse
import contextlib
import gc
import os
import statistics
import time

from lab import data, fail, models, results, training
from lab.profile import load_profile
from lab.table import table

STEPS = 6
ROUNDS = 2


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    training.add_data_flags(parser, profile.train)
    training.add_step_flags(parser, profile.train, saves=False)
    training.add_precision_flag(parser, profile.train)
    rounds = "how often each of the three is trained (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=rounds)
    parser.set_defaults(steps=STEPS)
    training.add_process_flag(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        fail("--rounds must be at least 1")
    training.refuse_impossible(args, profile.device)

    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. The processes, the data

    os.environ.update(training.ONE_PROCESS | os.environ)
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    training.refuse_alone(world, args.min_world)
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    step_blocks = world * args.accumulate * args.micro_batch
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    blocks = training.whole_steps(blocks, step_blocks, args, made_of)
    share = DistributedSampler(blocks, shuffle=False)

    # -----------------------------------------------------------------------------
    # 2. One training, its gradients sent by this hook

    sent = 0  # bytes of the tensors that hooks gave to all_reduce
    all_reduce = dist.all_reduce

    def counting(tensor, **options):
        nonlocal sent
        sent += tensor.nbytes
        return all_reduce(tensor, **options)

    def train(hook) -> tuple[list[float], list[float], float]:
        """(losses, seconds of each step, bytes all-reduced a step) of a training."""
        nonlocal sent
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = DistributedDataParallel(model.to(device).train())
        if hook:
            model.register_comm_hook(dist.group.WORLD, hook)
        rate = args.learning_rate
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        batches = data.endless(DataLoader(blocks, batch_size=args.micro_batch, sampler=share))
        bf16 = args.mixed_precision == "bf16"
        losses = []
        seconds = []
        sent = 0
        for _ in range(args.steps):
            began = time.perf_counter()
            step_loss = torch.zeros((), device=device)
            for micro_step in range(args.accumulate):
                batch = next(batches).to(device)  # [micro_batch, seq_len]
                last = micro_step == args.accumulate - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        loss = model(input_ids=batch, labels=batch).loss
                    (loss / args.accumulate).backward()
                step_loss += loss.detach() / args.accumulate
            optimizer.step()
            optimizer.zero_grad()
            all_reduce(step_loss)  # for the eye only, and not counted
            losses.append(round(step_loss.item() / world, 6))
            seconds.append(time.perf_counter() - began)
        return losses, seconds, sent / args.steps

    # -----------------------------------------------------------------------------
    # 3. The three in turn; of the steps after the first two, the median

    hooks = {
        "plain": None,
        "float32": default_hooks.allreduce_hook,
        # By another name: DDP refuses this one without NCCL, though gloo adds bf16 too.
        "bf16": lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket),
    }
    losses = {}
    sent_bytes = {}
    seconds: dict[str, list[float]] = {name: [] for name in hooks}
    dist.all_reduce = counting
    for _ in range(args.rounds):
        for name, hook in hooks.items():
            losses[name], took, sent_bytes[name] = train(hook)
            seconds[name] += took[2:] or took
            gc.collect()  # the model before the next one
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if rank == 0:
                print(f"{name:8} loss {losses[name][-1]:.4f}  {took[-1]:.3f} s", flush=True)
    dist.all_reduce = all_reduce
    if rank == 0:
        show(losses, seconds, sent_bytes, args, step_blocks * args.seq_len)
    dist.destroy_process_group()


def show(
    losses: dict[str, list[float]],
    seconds: dict[str, list[float]],
    sent_bytes: dict[str, float],
    args,
    step_tokens: int,
) -> None:
    """The table, and the record."""
    median = {name: statistics.median(took) for name, took in seconds.items()}
    metrics = {"losses": losses, "step_tok_count": step_tokens}
    rows = []
    for name in losses:
        pairs = zip(losses[name], losses["plain"], strict=True)
        worst = max(abs(ours - plain) / plain for ours, plain in pairs)
        speed = median["plain"] / median[name]
        metrics[f"{name}_step_ms"] = 1e3 * median[name]
        metrics[f"{name}_tok_per_s"] = step_tokens / median[name]
        metrics[f"{name}_speed_ratio"] = speed
        metrics[f"{name}_loss_difference_ratio"] = float(f"{worst:.2g}")
        counted = ""
        if sent_bytes[name]:
            metrics[f"{name}_all_reduced_gb"] = sent_bytes[name] / 1e9
            counted = f"{sent_bytes[name] / 1e9:.3f}"
        times = [f"{1e3 * median[name]:,.1f}", f"{speed:.2f}"]
        rows.append([name, counted, *times, f"{losses[name][-1]:.6f}", f"{worst:.1e}"])
    metrics["bf16_bytes_ratio"] = sent_bytes["bf16"] / sent_bytes["float32"]
    columns = ["", "GB all-reduced a step", "ms a step", "speed", "last loss", "differs from plain"]
    table(columns, rows)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
