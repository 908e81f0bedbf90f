"""Data parallel training by PyTorch's own means (DDP): every process holds the whole model and computes its own part of each batch.

    make train-ddp                                                 # two processes, by torchrun
    python modules/04_Accelerate/01_train_ddp.py                   # one process, the same script
    python modules/04_Accelerate/01_train_ddp.py --micro-batch 4   # one process that sees what two see with --micro-batch 2
    diff modules/04_Accelerate/01_train_ddp.py modules/04_Accelerate/02_train_accelerate.py    # the lesson of this stage

Look at: the losses. Two processes with micro-batch b compute step by step what one computes with micro-batch 2b, because DDP makes
the gradients of all processes their mean (all-reduce) before every optimizer step. Every block has the same number of tokens, so
the mean of the processes' losses is the mean over all tokens.
"""

import argparse
import contextlib
import os
import resource
import time
from pathlib import Path

from lab import data, fail, jobs, models, results
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    p = profile.train
    mixed = "bf16" if p.dtype == "bfloat16" else "no"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--data", default=p.data, help="data set, or a .json file of chat rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=p.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=p.micro_batch, help="blocks of one process and micro-step (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=p.accumulate, help="micro-steps of one optimizer step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=p.seq_len, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=p.learning_rate, help="constant (default: %(default)s)")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default=mixed, help="of the computation (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is random in the model, such as dropout (default: %(default)s)")
    parser.add_argument("--save", metavar="FOLDER", help="where to leave the trained model (default: nowhere)")
    parser.add_argument("--min-world", type=int, default=1, metavar="N", help="refuse to run on fewer processes (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.micro_batch, args.accumulate) < 1 or args.seq_len < 2 or args.learning_rate <= 0:
        fail("--steps, --micro-batch, --accumulate and --learning-rate must be positive, --seq-len at least 2")
    jobs.refuse_taken_cards()
    try:
        if args.save:
            Path(args.save).mkdir(parents=True, exist_ok=True)  # now, not when the training is done
    except OSError as e:
        fail(f"cannot save to {args.save}: {e.strerror}")

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. Who am I? One process of how many, and on which device

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if profile.device == "cuda" and here > torch.cuda.device_count():
        fail(f"{here} processes need a GPU each, {torch.cuda.device_count()} can be seen: start fewer with PROCESSES={torch.cuda.device_count()}")
    one_process = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for variable, value in one_process.items():
        os.environ.setdefault(variable, str(value))  # torchrun sets these for each process that it starts
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device(profile.device, local_rank) if profile.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if world < args.min_world:
        fail(f"{world} process is running, where at least {args.min_world} were to share the work: leave PROCESSES out to start 2, or use python")
    if args.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail(f"{torch.cuda.get_device_name()} does not compute in bf16: run with --mixed-precision no")

    # -----------------------------------------------------------------------------
    # 2. The model in float32, the optimizer, and this process's share of the data

    torch.manual_seed(args.seed)
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    step_blocks = world * args.accumulate * args.micro_batch  # blocks of one optimizer step, over all processes
    if len(blocks) < step_blocks:
        fail(
            f"one step needs {step_blocks} blocks ({world} processes x {args.accumulate} micro-steps x {args.micro_batch}), {args.data} has "
            f"{len(blocks)} of {args.seq_len} tokens: lower --micro-batch, --accumulate or --seq-len"
        )
    blocks = blocks[: len(blocks) // step_blocks * step_blocks]  # whole steps only; then the data begins anew

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    loader = DataLoader(blocks, batch_size=args.micro_batch, sampler=DistributedSampler(blocks, shuffle=False))
    model = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None)

    if rank == 0:
        print(f"{world} x {device.type}, {type(model).__name__}, {step_blocks * args.seq_len} tokens a step")

    # -----------------------------------------------------------------------------
    # 3. Train: gradients travel between the processes only in the last micro-step of a step

    def endless(loader):
        while True:
            yield from loader

    batches, losses, seconds = endless(loader), [], []
    for step in range(args.steps):
        began, step_loss = time.perf_counter(), torch.zeros((), device=device)
        for micro_step in range(args.accumulate):
            batch = next(batches).to(device)
            last = micro_step == args.accumulate - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    loss = model(input_ids=batch, labels=batch).loss
                (loss / args.accumulate).backward()
            step_loss += loss.detach() / args.accumulate
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(step_loss)  # the sum over the processes, for the eye only: each trains on its own loss
        losses.append(round(step_loss.item() / world, 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            print(f"step {step + 1:3}   loss {losses[-1]:.4f}   {seconds[-1]:.2f} s", flush=True)

    # -----------------------------------------------------------------------------
    # 4. Only one process writes

    if args.save and rank == 0:
        model.module.save_pretrained(args.save)
    if rank == 0:
        steady = seconds[1:] or seconds  # the first step warms up
        tokens = step_blocks * args.seq_len  # of a step
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"losses": losses, "world_size": world, "wrapper": type(model).__name__, "throughput_tok_per_s": round(tokens * len(steady) / sum(steady), 1)}
        metrics |= {"step_tok_count": tokens, "peak_memory_gib": round(peak / 2**30, 2)}
        results.finish(__file__, metrics, vars(args), "" if world > 1 else "one")
    del model  # before the process group: gloo's threads can hang where DDP is the last to let go of it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
