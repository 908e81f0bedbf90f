"""The training of 01_train_ddp.py with Accelerate: the same steps, the same losses.

    make train-accelerate                                          # two, by accelerate launch
    python modules/04_Accelerate/02_train_accelerate.py            # one process, the same script
    accelerate launch --config_file modules/04_Accelerate/configs/ddp.yaml \
        modules/04_Accelerate/02_train_accelerate.py
    diff modules/04_Accelerate/01_train_ddp.py modules/04_Accelerate/02_train_accelerate.py

The last command shows the lesson of this stage: the distributed lines, replaced.

Look at: the losses, which are those of 01_train_ddp.py. `prepare` wraps the model (DDP here; FSDP
or DeepSpeed when the launcher's YAML says so), gives each process its share of the batches and
moves them to the device; `accumulate` and `backward` do what `no_sync` and the division of the loss
do there. With configs/fsdp.yaml the same file trains a model that is sharded.
"""

import argparse
import time

import sharded

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
    checkpoints.add_flags(parser, RUNS / "04_Accelerate" / "states_accelerate")
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. Who am I? One process of how many, and on which device

    patience = InitProcessGroupKwargs(timeout=training.timeout(args))
    training.keep_fsdp_on_cpu(profile.device)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        kwargs_handlers=[patience],
    )
    rank = accelerator.process_index
    world = accelerator.num_processes
    device = accelerator.device
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
    loader = DataLoader(blocks, batch_size=args.micro_batch)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapper = type(model).__name__
    step_tokens = step_blocks * args.seq_len
    if rank == 0:
        print(f"{world} x {device.type}, {wrapper}, {step_tokens} tokens a step")

    # -----------------------------------------------------------------------------
    # 3. What a training goes on from: weights, optimizer, random numbers, the place in the data

    run = checkpoints.identity(
        args, blocks, step_blocks, mixed_precision=args.mixed_precision, engine=wrapper
    )

    def endless(loader):
        while True:
            yield from loader

    batches = endless(loader)
    losses = []
    fsdp = wrapper.startswith("FSDP")
    begun = checkpoints.last(args, run)
    if begun:
        losses = checkpoints.read(begun)["losses"]
        for _ in range(len(losses) * args.accumulate):
            next(batches)  # what was trained on before
    if begun and fsdp:
        sharded.load(model, optimizer, begun)
        checkpoints.load_random_state(begun, rank)
    elif begun:
        accelerator.load_state(begun)  # the random numbers too
        accelerator.step = 0  # of micro-steps; another number of processes does others

    # -----------------------------------------------------------------------------
    # 4. Train: gradients travel between the processes only in the last micro-step of a step

    seconds = []
    ending = checkpoints.Ending(args)
    for step in range(len(losses) + 1, args.steps + 1):
        began = time.perf_counter()
        step_loss = torch.zeros((), device=device)
        for _ in range(args.accumulate):
            batch = next(batches)  # [micro_batch, seq_len]
            with accelerator.accumulate(model):
                loss = model(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
            step_loss += loss.detach() / args.accumulate
        optimizer.step()
        optimizer.zero_grad()
        # The loss over all processes is for the eye only: each trains on its own.
        step_loss = accelerator.reduce(step_loss, reduction="mean")
        losses.append(round(step_loss.item(), 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            training.show_step(args, losses, seconds, step_tokens, device.type)
        if checkpoints.due(args, step, ending.heard(device)):
            with checkpoints.written(args, step, run | {"losses": losses}) as partial:
                if fsdp:
                    sharded.save(model, optimizer, partial)
                    checkpoints.save_random_state(partial, rank)
                else:
                    accelerator.save_state(partial)
        ending.leave(step)

    # -----------------------------------------------------------------------------
    # 5. Only one process writes

    # By all processes: what is sharded is gathered here.
    weights = accelerator.get_state_dict(model) if args.save else None
    if args.save and rank == 0:
        accelerator.unwrap_model(model).save_pretrained(args.save, state_dict=weights)
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
    model = accelerator.free_memory(model)  # before the process group, as there
    accelerator.end_training()


if __name__ == "__main__":
    main()
