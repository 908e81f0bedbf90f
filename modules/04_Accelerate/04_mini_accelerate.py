"""Accelerate from scratch: the same training by mini_accelerate/, kept, taken up again, measured.

    make mini-accelerate
    diff modules/04_Accelerate/02_train_accelerate.py modules/04_Accelerate/04_mini_accelerate.py

Look at: the losses, which are those of `make train-accelerate`; the steps after save_state, which
are computed a second time after load_state and come out the same; and the validation loss of a
number of rows that does not divide: gather_for_metrics leaves out what was read twice.
"""

import argparse

from lab import RUNS, data, models, results, training
from lab.profile import load_profile

STEPS = 4
ROWS = 9  # of validation: 2 processes read 12 of them


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # Model and data
    training.add_data_flags(parser, profile.train)
    # Steps
    training.add_step_flags(parser, profile.train, saves=False)
    training.add_precision_flag(parser, profile.train)
    parser.set_defaults(steps=STEPS)
    # Processes
    training.add_process_flag(parser)
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import torch
    from mini_accelerate import Accelerator  # the folder beside this script
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. As in 02_train_accelerate.py, but for the import

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate, mixed_precision=args.mixed_precision
    )
    rank = accelerator.process_index
    world = accelerator.num_processes
    training.refuse_alone(world, args.min_world)
    if args.mixed_precision == "bf16":
        training.refuse_without_bf16(accelerator.device, "run with --mixed-precision no")
    torch.manual_seed(args.seed)
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    step_blocks = world * args.accumulate * args.micro_batch
    blocks = training.whole_steps(blocks, step_blocks, args, made_of)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    loader = DataLoader(blocks, batch_size=args.micro_batch)
    validation = DataLoader(blocks[:ROWS], batch_size=args.micro_batch)
    model, optimizer, loader, validation = accelerator.prepare(model, optimizer, loader, validation)

    def train(batches, steps: int) -> list[float]:
        """The losses of that many steps, over all processes."""
        losses = []
        for _ in range(steps):
            step_loss = torch.zeros((), device=accelerator.device)
            for _ in range(args.accumulate):
                batch = next(batches)  # [micro_batch, seq_len]
                with accelerator.accumulate(model):
                    loss = model(input_ids=batch, labels=batch).loss
                    accelerator.backward(loss)
                step_loss += loss.detach() / args.accumulate
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(accelerator.reduce(step_loss, reduction="mean").item(), 6))
        return losses

    # -----------------------------------------------------------------------------
    # 2. Half of the steps, save, the other half; then back, and the other half again

    half = args.steps // 2
    batches = endless(loader)
    losses = train(batches, half)
    kept = str(RUNS / "04_Accelerate" / "mini_state")
    accelerator.save_state(kept)
    losses += train(batches, args.steps - half)
    if rank == 0:
        for step, loss in enumerate(losses, 1):
            print(f"step {step:3}   loss {loss:.4f}", flush=True)

    accelerator.load_state(kept)
    batches = endless(loader)
    for _ in range(half * args.accumulate):  # what was trained on before
        next(batches)
    again = train(batches, args.steps - half)

    # -----------------------------------------------------------------------------
    # 3. Validation: the loss of each row, gathered from all processes, none of them twice

    model.eval()
    everyone = []
    read = 0
    with torch.no_grad():
        for batch in validation:
            logits = model(input_ids=batch).logits[:, :-1]  # [micro_batch, seq_len - 1, vocabulary]
            told = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
            )
            of_rows = told.view(len(batch), -1).mean(dim=1)  # [micro_batch]
            everyone.append(accelerator.gather_for_metrics(of_rows))
            read += len(batch) * world
    rows = torch.cat(everyone)
    metrics = {
        "losses": losses,
        "again_difference_ratio": largest_difference(again, losses[half:]),
        "world_size": world,
        "validation_loss": round(rows.mean().item(), 6),
        "validation_row_count": len(rows),
        "read_row_count": read,
    }
    if rank == 0:
        after = losses[half:]
        print(f"after save_state {after}\nafter load_state {again}")
        print(f"validation loss {rows.mean():.4f} of {len(rows)} rows; {read} were read")
        results.finish(__file__, metrics, vars(args))
    model = accelerator.free_memory(model)
    accelerator.end_training()


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Relative to the others, at any step."""
    pairs = zip(losses, others, strict=True)
    return float(f"{max(abs(loss - other) / other for loss, other in pairs):.2g}")


def endless(loader):
    while True:
        yield from loader


if __name__ == "__main__":
    main()
