"""Data parallel training by PyTorch's own means (DDP), in one process or several.

    make train-ddp                                                 # two processes, by torchrun
    python modules/04_Accelerate/01_train_ddp.py                   # one process, the same script
    python modules/04_Accelerate/01_train_ddp.py --micro-batch 4   # it sees what two see with 2
    make train-ddp ARGS="--save-every 4"                           # then --resume goes on
    diff modules/04_Accelerate/01_train_ddp.py modules/04_Accelerate/02_train_accelerate.py

The last command shows the lesson of this stage. Every process holds the whole model and computes
its own part of each batch.

Look at: the losses. Two processes with micro-batch b compute step by step what one computes with
micro-batch 2b, because DDP makes the gradients of all processes their mean (all-reduce) before
every optimizer step. Every block has the same number of tokens, so the mean of the processes'
losses is the mean over all tokens.
"""

import argparse
import contextlib
import itertools
import os
import time

from lab import RUNS, checkpoints, data, models, results, training
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Model and data
    training.add_data_flags(parser, profile.train)
    # Steps
    training.add_step_flags(parser, profile.train)
    training.add_precision_flag(parser, profile.train)
    # Processes
    training.add_process_flag(parser)
    training.add_timeout_flag(parser)
    # States to go on from
    checkpoints.add_flags(parser, RUNS / "04_Accelerate" / "states_ddp")
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. Who am I? One process of how many, and on which device

    os.environ.update(training.ONE_PROCESS | os.environ)  # what torchrun has set comes first
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=training.timeout(args))
    training.refuse_alone(world, args.min_world)
    if args.mixed_precision == "bf16":
        training.refuse_without_bf16(device, "run with --mixed-precision no")

    # -----------------------------------------------------------------------------
    # 2. The model in float32, the optimizer, and this process's share of the data

    torch.manual_seed(args.seed)
    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = data.blocks(tokenizer, args.data, args.seq_len)
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    step_blocks = world * args.accumulate * args.micro_batch  # of one step, over all processes
    blocks = training.whole_steps(blocks, step_blocks, args, made_of)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    share = DistributedSampler(blocks, shuffle=False)
    loader = DataLoader(blocks, batch_size=args.micro_batch, sampler=share)
    model = DistributedDataParallel(model.to(device))
    wrapper = type(model).__name__
    step_tokens = step_blocks * args.seq_len
    if rank == 0:
        print(f"{world} x {device.type}, {wrapper}, {step_tokens} tokens a step")

    # -----------------------------------------------------------------------------
    # 3. What a training goes on from: weights, optimizer, random numbers, the place in the data

    run = checkpoints.identity(
        args, blocks, step_blocks, mixed_precision=args.mixed_precision, engine="native DDP"
    )
    losses = []
    begun = checkpoints.last(args, run)
    if begun:
        state = torch.load(begun / "state.pt", map_location="cpu", weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoints.load_random_state(begun, rank)
        losses = checkpoints.read(begun)["losses"]

    # -----------------------------------------------------------------------------
    # 4. Train: gradients travel between the processes only in the last micro-step of a step

    def endless(loader):
        while True:
            yield from loader

    batches = itertools.islice(endless(loader), len(losses) * args.accumulate, None)
    seconds = []
    ending = checkpoints.Ending(args)
    for step in range(len(losses) + 1, args.steps + 1):
        began = time.perf_counter()
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accumulate):
            batch = next(batches).to(device)  # [micro_batch, seq_len]
            last = micro_step == args.accumulate - 1
            with contextlib.nullcontext() if last else model.no_sync():
                bf16 = args.mixed_precision == "bf16"
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=batch, labels=batch).loss
                (loss / args.accumulate).backward()
            step_loss += loss.detach() / args.accumulate
        optimizer.step()
        optimizer.zero_grad()
        # The loss over all processes is for the eye only: each trains on its own.
        dist.all_reduce(step_loss)  # their sum
        losses.append(round(step_loss.item() / world, 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            training.show_step(args, losses, seconds, step_tokens, device.type)
        if checkpoints.due(args, step, ending.heard(device)):
            with checkpoints.written(args, step, run | {"losses": losses}) as partial:
                if rank == 0:  # all processes have the same
                    state = {"model": model.module.state_dict()}
                    state["optimizer"] = optimizer.state_dict()
                    torch.save(state, partial / "state.pt")
                checkpoints.save_random_state(partial, rank)
        ending.leave(step)

    # -----------------------------------------------------------------------------
    # 5. Only one process writes

    if args.save and rank == 0:
        model.module.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    if rank == 0:
        metrics = {
            "losses": losses,
            "world_size": world,
            "wrapper": wrapper,
            "throughput_tok_per_s": training.tokens_per_s(step_tokens, seconds),
            "step_tok_count": step_tokens,
            "peak_memory_gib": round(training.peak_memory_gib(device.type), 2),
        }
        results.finish(__file__, metrics, vars(args), training.variant(world, wrapper))
    del model  # before the process group: gloo's threads can hang where DDP lets go of it last
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
