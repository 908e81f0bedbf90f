"""The training of 01_train_ddp.py with Accelerate: the same steps and the same losses, the distributed lines replaced.

    make train-accelerate                                          # two processes, by accelerate launch
    python modules/04_Accelerate/02_train_accelerate.py            # one process, the same script
    accelerate launch --config_file modules/04_Accelerate/configs/ddp.yaml modules/04_Accelerate/02_train_accelerate.py
    diff modules/04_Accelerate/01_train_ddp.py modules/04_Accelerate/02_train_accelerate.py    # the lesson of this stage

Look at: the losses, which are those of 01_train_ddp.py. `prepare` wraps the model (DDP here; FSDP or DeepSpeed when the launcher's
YAML says so), gives each process its share of the batches and moves them to the device; `accumulate` and `backward` do what
`no_sync` and the division of the loss do there. With configs/fsdp.yaml the same file trains a model that is sharded.
"""

import argparse
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
    from accelerate import Accelerator, DistributedType, PartialState
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. Who am I? One process of how many, and on which device

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if profile.device == "cuda" and here > torch.cuda.device_count():
        fail(f"{here} processes need a GPU each, {torch.cuda.device_count()} can be seen: start fewer with PROCESSES={torch.cuda.device_count()}")
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # what the launcher read in its YAML
    if sharded and profile.device == "cpu":  # Accelerate 1.11 leaves FSDP out, without a word, where it sees CPU processes;
        PartialState().distributed_type = DistributedType.MULTI_GPU  # torch's FSDP2 itself runs on both
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate, mixed_precision=args.mixed_precision)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
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
    loader = DataLoader(blocks, batch_size=args.micro_batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

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
        for _ in range(args.accumulate):
            batch = next(batches)
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
            step_loss += loss.detach() / args.accumulate
        optimizer.step()
        optimizer.zero_grad()
        step_loss = accelerator.reduce(step_loss, reduction="mean")  # over the processes, for the eye only: each trains on its own loss
        losses.append(round(step_loss.item(), 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            print(f"step {step + 1:3}   loss {losses[-1]:.4f}   {seconds[-1]:.2f} s", flush=True)

    # -----------------------------------------------------------------------------
    # 4. Only one process writes

    weights = accelerator.get_state_dict(model) if args.save else None  # by all processes: what is sharded is gathered here
    if args.save and rank == 0:
        accelerator.unwrap_model(model).save_pretrained(args.save, state_dict=weights)
    if rank == 0:
        steady = seconds[1:] or seconds  # the first step warms up
        tokens = step_blocks * args.seq_len  # of a step
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"losses": losses, "world_size": world, "wrapper": type(model).__name__, "throughput_tok_per_s": round(tokens * len(steady) / sum(steady), 1)}
        metrics |= {"step_tok_count": tokens, "peak_memory_gib": round(peak / 2**30, 2)}
        kind = "one" if world == 1 else "fsdp" if sharded else "deepspeed" if "DeepSpeed" in type(model).__name__ else ""
        results.finish(__file__, metrics, vars(args), kind)
    model = accelerator.free_memory(model)  # before the process group: gloo's threads can hang where DDP is the last to let go of it
    accelerator.end_training()


if __name__ == "__main__":
    main()
