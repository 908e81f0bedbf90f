"""A training loop to carry away: what 02_train_accelerate.py leaves out and every training needs.

    make real-loop                                     # two processes; minutes on a CPU
    make real-loop ARGS="--pack --checkpointing"       # rows in one line; activations recomputed
    make real-loop ARGS="--profile --steps 4"          # where a step's time goes, and a trace
    tensorboard --logdir runs/04_Accelerate/real_loop  # the curves, in a browser

Warm-up and decay of the learning rate, clipped gradients, rows of unequal length that are shuffled
anew each epoch, a loss in which every token weighs the same, validation, a tracker.

Look at: the validation loss, which falls from epoch to epoch; the learning rate, which rises and
falls; and the losses with --pack, or in one process with --micro-batch 4: they are the same.
"""

import argparse
import collections
import itertools
import math
import time

from lab import RUNS, checkpoints, fail, models, results, training
from lab.profile import load_profile

ROWS = {"train": 32, "validation": 9}  # conversations; few, so that several epochs are seen


def rate_factor(step: int, warmup: int, steps: int, decay: str) -> float:
    """What the learning rate is multiplied by in this step: up to 1, then down towards 0."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2


def train_step(accelerator, model, optimizer, scheduler, micro_batches, clip, clock) -> dict:
    """One optimizer step over all micro-batches of all processes: its loss, norm and rate."""
    import torch
    from chat_rows import predicted

    with clock.part("data"):
        tokens = accelerator.reduce(sum(map(predicted, micro_batches)), "sum")  # of the whole step
    step_loss = torch.zeros((), device=accelerator.device)
    for batch in micro_batches:
        with accelerator.accumulate(model):
            with clock.part("forward"):
                # The sum over this micro-batch's tokens, divided by the tokens of the whole step.
                loss = model(**batch, num_items_in_batch=tokens, use_cache=False).loss
            with clock.part("backward"):
                # backward divides by the micro-steps, DDP by the processes: taken back here.
                scale = accelerator.gradient_accumulation_steps * accelerator.num_processes
                accelerator.backward(loss * scale)
        step_loss += loss.detach()
    with clock.part("clip"):
        norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    rate = scheduler.get_last_lr()[0]
    with clock.part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    if not accelerator.optimizer_step_was_skipped:  # fp16 leaves a step out where it overflows
        scheduler.step()
    with clock.part("log"):
        step_loss = accelerator.reduce(step_loss, "sum")  # for the eye only
        return {"loss": round(step_loss.item(), 6), "norm": round(float(norm), 6), "rate": rate}


def validate(accelerator, model, loader) -> float:
    """The mean loss of a token of all rows: sums and counts of each row, none of them twice."""
    import torch

    model.eval()
    everyone = []
    for batch in loader:
        labels = batch.pop("labels")[:, 1:]  # [rows, length - 1]; -100: filled up
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1]  # [rows, length - 1, words]
        told = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
        )
        of_rows = told.view(labels.shape).sum(dim=1)  # [rows]
        counts = (labels != -100).sum(dim=1)  # [rows]
        pairs = torch.stack([of_rows, counts], dim=1)  # [rows, 2]
        everyone.append(accelerator.gather_for_metrics(pairs))
    model.train()
    total, count = torch.cat(everyone).sum(dim=0)
    return (total / count).item()


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # Model and data: rows are cut at --seq-len
    training.add_data_flags(parser, profile.train)
    held_out = profile.train.data.replace("_train", "_test")
    training.add_flag(parser, "--held-out", str, held_out, "data set of the validation")
    training.add_flag(parser, "--rows", int, ROWS["train"], "conversations to train on")
    # Steps
    training.add_step_flags(parser, profile.train)
    training.add_precision_flag(parser, profile.train)
    training.add_flag(parser, "--warmup", int, 4, "steps in which the learning rate rises")
    decay = "how the learning rate falls afterwards (default: cosine)"
    parser.add_argument("--decay", choices=("cosine", "linear"), default="cosine", help=decay)
    training.add_flag(parser, "--clip", float, 1.0, "a gradient longer than this is shortened")
    parser.set_defaults(steps=16, seq_len=2 * profile.train.seq_len)
    # Memory and speed
    parser.add_argument("--pack", action="store_true", help="rows in one line, nothing filled up")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes")
    # Processes, and states to go on from
    training.add_process_flag(parser)
    checkpoints.add_flags(parser, RUNS / "04_Accelerate" / "states_real_loop")
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)
    if args.rows < 1 or args.warmup < 0 or not args.clip > 0:
        fail("--rows and --clip must be positive, --warmup at least 0")
    if args.profile and args.steps < 2:
        fail("--profile leaves out the first step: --steps must be at least 2")

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
    from chat_rows import filled_up, packed, padded, token_rows  # the files beside this script
    from loop_curves import draw
    from step_time import StepTime, show
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. The Accelerator, said so that neither the launcher nor a loader's end changes a step

    training.keep_fsdp_on_cpu(profile.device)
    logs = RUNS / "04_Accelerate" / "real_loop"
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accumulate, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",  # or "swanlab", or "wandb": nothing else changes
        project_dir=str(logs),
    )
    rank = accelerator.process_index
    world = accelerator.num_processes
    training.refuse_alone(world, args.min_world)
    if args.mixed_precision == "bf16":
        training.refuse_without_bf16(accelerator.device, "run with --mixed-precision no")
    settings = {name: value for name, value in vars(args).items() if value is not None}
    accelerator.init_trackers(time.strftime("%m%d-%H%M%S"), config=settings)

    # -----------------------------------------------------------------------------
    # 2. Rows, model, optimizer; the scheduler stays out of prepare, which would make it N times as
    #    fast

    torch.manual_seed(args.seed)
    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = token_rows(tokenizer, args.data, args.seq_len, args.rows)
    judged = token_rows(tokenizer, args.held_out, args.seq_len, ROWS["validation"])
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    step_rows = world * args.accumulate * args.micro_batch
    if len(rows) < step_rows:
        fail(f"one step needs {step_rows} rows ({made_of}), here are {len(rows)}: raise --rows")
    rows = rows[: len(rows) // step_rows * step_rows]  # whole steps, as in 02

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.compile(dynamic=True)  # once for every length, not anew for each
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, args.warmup, args.steps, args.decay)
    )
    collate = packed if args.pack else padded
    loader = DataLoader(rows, args.micro_batch, shuffle=True, collate_fn=collate)
    validation = DataLoader(judged, args.micro_batch, collate_fn=padded)
    model, optimizer, loader, validation = accelerator.prepare(model, optimizer, loader, validation)
    model.train()
    if "FSDP" in type(model).__name__ and (args.save_every or args.resume):
        fail("states under FSDP2 are 02_train_accelerate.py's lesson: here --save-every needs DDP")
    if accelerator.gradient_accumulation_steps != args.accumulate:
        fail("a DeepSpeed YAML sets gradient_accumulation_steps: take it out, use --accumulate")

    # -----------------------------------------------------------------------------
    # 3. Train, an epoch after the other, each in an order of its own

    def endless_steps():
        """(epoch, the micro-batches that make a step), fetched before the step begins."""
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            batches = iter(loader)
            while micro_batches := list(itertools.islice(batches, args.accumulate)):
                yield epoch, micro_batches

    clock = StepTime(args.profile, accelerator.device, args.steps)
    epoch_steps = len(rows) // step_rows
    names = ("steps", "warmup", "decay", "clip", "pack", "mixed_precision", "held_out")
    same = {name: getattr(args, name) for name in names}  # what the losses depend on
    run = checkpoints.identity(args, torch.cat(rows), step_rows, **same)
    accelerator.register_for_checkpointing(scheduler)  # which prepare has not seen
    begun = checkpoints.last(args, run)
    steps = endless_steps()
    if begun:
        behind = checkpoints.read(begun)
        history = behind["history"]
        judgements = dict(behind["judgements"])
        collections.deque(itertools.islice(steps, len(history)), maxlen=0)  # read, not computed
        accelerator.load_state(begun)
        accelerator.step = 0
    else:
        history = []
        judgements = {0: validate(accelerator, model, validation)}
    ending = checkpoints.Ending(args)
    for epoch, micro_batches in itertools.islice(steps, args.steps - len(history)):
        began = time.perf_counter()
        parts = (model, optimizer, scheduler, micro_batches, args.clip, clock)
        measured = train_step(accelerator, *parts)
        clock.step_done()
        measured |= {"seconds": time.perf_counter() - began, "filled": filled_up(micro_batches)}
        history.append(measured)
        step = len(history)
        curves = {"loss": measured["loss"], "learning_rate": measured["rate"]}
        line = f"epoch {epoch + 1}   step {step:3}   loss {measured['loss']:.4f}"
        line += f"   rate {measured['rate']:.1e}   norm {measured['norm']:5.2f}"
        line += f"   {measured['seconds']:.2f} s"
        if (step % epoch_steps == 0 and not args.profile) or step == args.steps:
            judgements[step] = validate(accelerator, model, validation)
            curves["validation_loss"] = judgements[step]
            line += f"   validation {judgements[step]:.4f}"
        accelerator.log(curves, step=step)
        if rank == 0:
            print(line, flush=True)
        if checkpoints.due(args, step, ending.heard(accelerator.device)):
            state = {"history": history, "judgements": list(judgements.items())}
            with checkpoints.written(args, step, run | state) as partial:
                accelerator.save_state(partial)
        if ending.signal:
            accelerator.end_training()  # the tracker writes what it holds
        ending.leave(step)

    # -----------------------------------------------------------------------------
    # 4. What is kept

    steady = [each["seconds"] for each in history[1:]] or [history[0]["seconds"]]
    metrics = {
        "losses": [each["loss"] for each in history],
        "gradient_norms": [each["norm"] for each in history],
        "learning_rates": [each["rate"] for each in history],
        "validation_losses": {str(at): round(loss, 6) for at, loss in judgements.items()},
        "world_size": world,
        "wrapper": type(model).__name__,
        "trackers": ", ".join(tracker.name for tracker in accelerator.trackers) or "none",
        "epoch_steps_count": epoch_steps,
        "first_validation_loss": round(judgements[0], 4),
        "validation_loss": round(judgements[args.steps], 4),
        "clipped_steps_count": sum(each["norm"] > args.clip for each in history),
        "filled_up_ratio": round(sum(each["filled"] for each in history) / len(history), 3),
        "step_s": round(sum(steady) / len(steady), 3),
        "peak_memory_gib": round(training.peak_memory_gib(accelerator.device.type), 2),
    }
    if args.profile:
        seconds, operators = clock.finish(logs / f"trace_{rank}.json")
        metrics |= {f"{name}_part_s": round(each, 3) for name, each in seconds.items()}
        if rank == 0:
            show(seconds, operators)
    weights = accelerator.get_state_dict(model) if args.save else None
    if args.save and rank == 0:
        accelerator.unwrap_model(model).save_pretrained(args.save, state_dict=weights)
        tokenizer.save_pretrained(args.save)
    if rank == 0:
        variant = "profile" if args.profile else "packed" if args.pack else ""
        if not variant:
            results.picture(__file__, "real_loop", draw(history, judgements))
        results.finish(__file__, metrics, vars(args), variant)
    model = accelerator.free_memory(model)  # before the process group, as in 02
    accelerator.end_training()


if __name__ == "__main__":
    main()
