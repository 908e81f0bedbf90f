"""The training of 01 and 02 by transformers' Trainer, which module 06's LLaMA-Factory stands on.

    make train-trainer                                 # two processes, by accelerate launch
    python modules/04_Accelerate/06_trainer.py         # one process, the same script

Look at: the losses, which are those of `make train-ddp`, step by step. The Trainer holds an
Accelerator and has the loop of 05_real_loop.py inside; what the loop of 02_train_accelerate.py does
without saying so (no schedule, no clipping, no shuffling) has to be said here.
"""

import argparse
import time

from lab import RUNS, data, models, results, training
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # Model and data
    training.add_data_flags(parser, profile.train)
    # Steps
    training.add_step_flags(parser, profile.train)
    training.add_precision_flag(parser, profile.train)
    # Processes
    training.add_process_flag(parser)
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    # -----------------------------------------------------------------------------
    # 1. What the loop of 02 does, in the Trainer's words

    training.keep_fsdp_on_cpu(profile.device)
    settings = TrainingArguments(
        output_dir=str(RUNS / "04_Accelerate" / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",  # its default: linear, down to 0
        max_grad_norm=0.0,  # no clipping; its default: 1.0
        train_sampling_strategy="sequential",  # its default: random
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=args.mixed_precision == "bf16",
        seed=args.seed,
        ddp_find_unused_parameters=False,  # its default: True, a walk over the graph each step
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    world = settings.world_size
    training.refuse_alone(world, args.min_world)

    # -----------------------------------------------------------------------------
    # 2. The same blocks; the label that nothing predicts is marked, because the Trainer counts it

    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    step_blocks = world * args.accumulate * args.micro_batch
    blocks = training.whole_steps(blocks, step_blocks, args, made_of)
    labels = blocks.clone()
    labels[:, 0] = -100
    rows = [
        {"input_ids": block, "labels": label} for block, label in zip(blocks, labels, strict=True)
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    # -----------------------------------------------------------------------------
    # 3. Train; a callback is where one looks into the loop

    losses = []
    seconds = []

    class EachStep(TrainerCallback):
        def on_step_begin(self, *_, **__):
            seconds.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            seconds[-1] = time.perf_counter() - seconds[-1]

        def on_log(self, _, state, __, logs, **___):
            if "loss" in logs and state.is_world_process_zero:
                losses.append(round(logs["loss"], 6))
                print(f"step {state.global_step:3}   loss {losses[-1]:.4f}", flush=True)

    trainer = Trainer(model=model, args=settings, train_dataset=rows, callbacks=[EachStep()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    # -----------------------------------------------------------------------------
    # 4. Only one process writes

    if args.save:
        trainer.save_model(args.save)
    if trainer.is_world_process_zero():
        step_tokens = step_blocks * args.seq_len
        metrics = {
            "losses": losses,
            "world_size": world,
            "wrapper": type(trainer.model_wrapped).__name__,
            "throughput_tok_per_s": training.tokens_per_s(step_tokens, seconds),
            "step_tok_count": step_tokens,
            "peak_memory_gib": round(training.peak_memory_gib(profile.device), 2),
        }
        results.finish(__file__, metrics, vars(args))
    accelerator = trainer.accelerator
    trainer.model_wrapped = accelerator.free_memory(trainer.model_wrapped)
    accelerator.end_training()


if __name__ == "__main__":
    main()
