"""Rows of unequal length: the mean of means against the mean over tokens, and what is right.

    make loss-weights                                  # two processes, two micro-steps each

One optimizer step on the same rows, four times: all rows in one batch of one process, which is what
is meant; then divided over processes and micro-steps, with three ways to weight the loss.

Look at: the difference of the gradient. No learning rate mends it, no later step takes it back, and
nothing is printed: it is another loss, in which a token of a short row counts for more.
"""

import argparse

from lab import fail, models, results, training
from lab.profile import load_profile
from lab.table import table


def weights_of(way: str, mine: list, accelerator) -> list:
    """For each micro-batch of this process what its sum of losses is multiplied by.

    `mine`: how many tokens each of them has. backward divides by the micro-steps, DDP by the
    processes: what is to be a plain sum has to be multiplied by both.
    """
    micro_steps = len(mine)
    processes = accelerator.num_processes
    if way == "mean of means":  # what `loss` is where nothing is said
        return [1 / tokens for tokens in mine]
    if way == "weighted in each process":  # right for accumulation, wrong for processes
        return [micro_steps / sum(mine) for _ in mine]
    everyone = accelerator.reduce(sum(mine), "sum")  # of all micro-steps of all processes
    return [micro_steps * processes / everyone for _ in mine]


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    training.add_data_flags(parser, profile.train)
    micro_batch = "rows that one process reads in a micro-step"
    training.add_flag(parser, "--micro-batch", int, profile.train.micro_batch, micro_batch)
    training.add_flag(parser, "--accumulate", int, 2, "micro-steps of the step")
    parser.set_defaults(seq_len=2 * profile.train.seq_len)
    training.add_process_flag(parser)
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import torch
    from accelerate import Accelerator
    from chat_rows import padded, predicted, token_rows  # the file beside this script
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. The yardstick: all rows of the step in one batch, before anything is divided

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    rank = accelerator.process_index
    world = accelerator.num_processes
    training.refuse_alone(world, args.min_world)
    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = world * args.accumulate * args.micro_batch
    rows = token_rows(tokenizer, args.data, args.seq_len, count)
    if len(rows) < count:
        fail(f"one step needs {count} rows, {args.data} has {len(rows)}: lower --micro-batch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(accelerator.device)

    def gradient() -> torch.Tensor:
        """All gradients in one vector, [parameters]; the model's own are thrown away."""
        vector = torch.cat([each.grad.flatten() for each in model.parameters()])
        model.zero_grad()
        return vector

    whole = {name: each.to(accelerator.device) for name, each in padded(rows).items()}
    loss = model(**whole).loss  # one process, one batch: the mean over all tokens
    loss.backward()
    right = {"loss": loss.item(), "gradient": gradient()}

    # -----------------------------------------------------------------------------
    # 2. The same rows divided: this process's micro-batches, three ways to weight them

    size = args.micro_batch
    mine = rows[rank * size * args.accumulate :][: size * args.accumulate]
    batches = [padded(mine[at : at + size]) for at in range(0, len(mine), size)]
    batches = [{k: v.to(accelerator.device) for k, v in batch.items()} for batch in batches]
    tokens = [predicted(batch) for batch in batches]
    model = accelerator.prepare(model)
    lines = []
    metrics = {"world_size": world, "micro_steps_count": args.accumulate, "rows_count": count}
    lengths = [len(row) for row in rows]
    metrics |= {"shortest_row_tok_count": min(lengths), "longest_row_tok_count": max(lengths)}
    names = {"mean of means": "means", "weighted in each process": "local", "over all": "tokens"}
    for way, name in names.items():
        step_loss = torch.zeros((), device=accelerator.device)
        scales = weights_of(way, tokens, accelerator)
        for batch, scale in zip(batches, scales, strict=True):
            with accelerator.accumulate(model):
                summed = model(**batch, num_items_in_batch=1).loss  # the sum over its tokens
                accelerator.backward(summed * scale)
            step_loss += summed.detach() * scale / args.accumulate
        loss = accelerator.reduce(step_loss, "mean").item()
        off = (gradient() - right["gradient"]).norm() / right["gradient"].norm()
        loss_off = abs(loss - right["loss"]) / right["loss"]
        metrics[f"{name}_loss_difference_ratio"] = float(f"{loss_off:.2g}")
        metrics[f"{name}_gradient_difference_ratio"] = float(f"{off.item():.2g}")
        lines.append([way, f"{loss:.6f}", f"{loss_off:.1e}", f"{off.item():.1e}"])
    if rank == 0:
        print(f"rows of {min(lengths)} to {max(lengths)} tokens, {count} of them a step")
        head = ["one process, one batch", f"{right['loss']:.6f}", "", ""]
        table(["loss", "", "differs by", "its gradient by"], [head, *lines])
        results.finish(__file__, metrics, vars(args))
    model = accelerator.free_memory(model)
    accelerator.end_training()


if __name__ == "__main__":
    main()
