"""GRPO with trl: the same lesson as 11_mini_grpo.py, for models of any size.

    make lf-grpo                             # begins where make lf-half has ended
    make lf-grpo MODEL=qwen2.5-7b-instruct ARGS="--steps 30"
    make lf-grpo ARGS=--resume               # goes on after Ctrl+C
    make lf-score ARGS="--adapter runs/06_LLaMA-Factory/grpo"

trl's GRPOTrainer writes, marks (rewards.py) and learns; tests/test_grpo.py holds its gradients
against grpo.py's. It adds what a long training needs: checkpoints, memory saved by recomputing.
Transformers writes the answers: trl 0.24 cannot use the locked vLLM (trl_ready.py).
Look at: the reward and the exact matches; how much of the time goes into writing.
"""

import argparse
import shutil
import time

import factory
import reinforce
import rewards

from lab import fail, models, results, shown
from lab.profile import load_profile

OUTPUT = factory.FOLDER / "grpo"


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reinforce.add_flags(parser, profile.finetune.grpo)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    rows = reinforce.checked(args)

    import torch
    import trl_ready  # the file beside this script
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    trl_ready.make_ready()
    from trl import GRPOConfig, GRPOTrainer

    # -----------------------------------------------------------------------------
    # 1. Requests, and what an answer earns

    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = [row["messages"][:-1] for row in rows]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    wanted = reinforce.wanted_of(rows)
    requests = Dataset.from_dict({"prompt": prompts, "wanted": wanted})

    def rule(name: str):
        def reward(completions: list[str], wanted: list[str], **others) -> list[float]:
            return list(map(rewards.RULES[name], wanted, completions))

        reward.__name__ = name  # under which trl logs it
        return reward

    # -----------------------------------------------------------------------------
    # 2. trl's trainer, its settings by the names of grpo.py's parts

    minibatches = args.prompts * args.group // args.minibatch
    partial = OUTPUT.with_name("grpo.partial")
    checkpoint = get_last_checkpoint(partial) if args.resume and partial.is_dir() else None
    if args.resume and not checkpoint:
        fail(f"there is no checkpoint in {shown(partial)}: leave --resume out")
    if not args.resume:
        shutil.rmtree(partial, ignore_errors=True)
    settings = GRPOConfig(
        str(partial),
        # Rollouts: prompts * group answers, learnt from in minibatches, each a step
        num_generations=args.group,
        per_device_train_batch_size=args.minibatch,
        steps_per_generation=minibatches,
        max_steps=args.steps * minibatches,
        max_prompt_length=None,
        max_completion_length=reinforce.MOST_TOKENS,
        shuffle_dataset=False,
        # The loss
        loss_type="grpo",
        beta=args.beta,
        epsilon=args.epsilon,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        # The machine
        use_cpu=profile.device == "cpu",
        bf16=profile.device == "cuda",
        gradient_checkpointing=profile.finetune.grpo.checkpointing,
        logging_steps=minibatches,
        save_steps=minibatches * 4,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )

    class Timed(GRPOTrainer):
        writing_s = 0.0

        def _generate(self, *arguments):
            began = time.monotonic()
            written = super()._generate(*arguments)
            Timed.writing_s += time.monotonic() - began
            return written

        def log(self, logs: dict, *arguments) -> None:
            super().log(logs, *arguments)
            line = self.state.log_history[-1]  # with the reward and the KL
            if "reward" in line:
                print(
                    f"rollout {self.state.global_step // minibatches:3d}: "
                    f"reward {line['reward']:.2f}, KL {line.get('kl', 0.0):.4f}, "
                    f"{line['completions/mean_length']:.0f} tokens",
                    flush=True,
                )

    dtype = getattr(torch, profile.finetune.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.warnings_issued = {}  # trl 0.24 asks for it; transformers 5 has none
    trainer = Timed(
        model,
        [rule(name) for name in args.rewards],
        settings,
        requests,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)  # thirty numbers a line
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - began

    # -----------------------------------------------------------------------------
    # 3. What came of it

    trainer.save_model(partial)
    reinforce.note_training(partial, folder)
    for finished in partial.glob("checkpoint-*"):
        shutil.rmtree(finished)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    partial.rename(OUTPUT)
    logged = [line for line in trainer.state.log_history if "reward" in line]
    tokens = logged[-1]["num_tokens"]
    peak = torch.cuda.max_memory_reserved() / 2**30 if profile.device == "cuda" else 0.0
    print(
        f"reward {logged[0]['reward']:.2f} -> {logged[-1]['reward']:.2f}; "
        f"{100 * Timed.writing_s / seconds:.0f} % of {seconds:.0f} s went into writing; "
        f"{tokens / seconds:.0f} tokens/s; at most {peak:.2f} GiB"
    )
    print(f"adapter: {shown(OUTPUT)}")
    metrics = {
        "rewards": [round(line["reward"], 4) for line in logged],
        "kl_nat": [round(line.get("kl", 0.0), 5) for line in logged],
        "train_s": round(seconds, 1),
        "writing_s": round(Timed.writing_s, 1),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_gib": round(peak, 2),
    }
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
