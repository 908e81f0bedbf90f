"""GRPO from scratch: the model writes, a program marks, what beats its own group is learnt.

    make lf-half                        # a half-trained model, where it begins
    make mini-grpo
    make mini-grpo REWARDS=long BETA=0     # length pays, and nothing holds it back

grpo.py is the whole of it: groups of answers to one request, how far each is above its group, a
loss with a clipped ratio and a KL to the start. The marks are rules (rewards.py): nobody wrote an
answer to learn from. Length is what a careless reward pays for.
Look at: the reward, which rises either way; exact match on held-out requests, which is what the
reward was meant for; the KL: how far the model has gone from where it began.
"""

import argparse
import statistics
import time

import comparing
import reinforce
import rewards

from lab import data, models, results, training
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    reinforce.add_flags(parser, profile.finetune.grpo)
    held_out = "held-out requests that are answered before and after"
    training.add_flag(parser, "--test-rows", int, 64, held_out)
    args = parser.parse_args()
    rows = reinforce.checked(args)

    import grpo  # the file beside this script
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. One model with an adapter: on, it is the policy; off, the reference

    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dtype = getattr(torch, profile.finetune.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(profile.device)
    torch.manual_seed(0)
    adapter = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    policy = get_peft_model(model, adapter).eval()  # no dropout

    test = data.rows(profile.finetune.test)[: args.test_rows]

    def held_out() -> list[bool]:
        """Of each held-out request, whether the greedy answer is the wanted one."""
        right = []
        for first in range(0, len(test), 32):
            part = test[first : first + 32]
            written = grpo.rollout(policy, tokenizer, part, 1, reinforce.MOST_TOKENS, greedy=True)
            right += map(rewards.exact, reinforce.wanted_of(part), written["answers"])
        return [bool(mark) for mark in right]

    # -----------------------------------------------------------------------------
    # 2. Write, mark, learn

    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    right_before = held_out()
    print(f"held-out requests, right before: {sum(right_before)} of {len(test)}", flush=True)
    began = time.monotonic()
    curve = []
    for step in range(args.steps):
        asked = rows[step * args.prompts : (step + 1) * args.prompts]
        batch = grpo.rollout(policy, tokenizer, asked, args.group, reinforce.MOST_TOKENS)
        answers = batch.pop("answers")
        wanted = [text for text in reinforce.wanted_of(asked) for _ in range(args.group)]
        pairs = zip(wanted, answers, strict=True)
        earned = torch.tensor([rewards.total(args.rewards, *pair) for pair in pairs])
        given = earned.view(-1, args.group).to(profile.device)
        batch["advantages"] = grpo.group_advantages(given)
        # Nothing is learnt from a group that agrees; without it a rollout takes less time.
        compared = batch["advantages"].nonzero()[:, 0]
        if not len(compared):
            compared = torch.arange(len(answers))  # then only the KL counts
        lengths = batch["mask"].sum(1)
        batch = {name: value[compared] for name, value in batch.items()}
        with torch.no_grad():
            batch["old_logps"] = grpo.token_logps(policy, batch)
            with policy.disable_adapter():
                batch["reference_logps"] = grpo.token_logps(policy, batch)
        measured = []
        for chosen in torch.randperm(len(compared)).split(args.minibatch):
            part = {name: value[chosen] for name, value in batch.items()}
            logps = grpo.token_logps(policy, part)
            loss, notes = grpo.grpo_loss(logps, part, args.epsilon, args.beta)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            measured.append(notes)
        point = {
            "rewards": given.mean().item(),
            "sampled_exact_pct": 100 * sum(map(rewards.exact, wanted, answers)) / len(answers),
            "compared_count": len(compared),
            "answer_tok_count": lengths.float().mean().item(),
        }
        for name in measured[0]:  # of the loss, a mean over the minibatches
            point[name] = statistics.fmean(notes[name] for notes in measured)
        curve.append(point)
        print(
            f"rollout {step + 1:2d}: reward {point['rewards']:.2f}, "
            f"exact {point['sampled_exact_pct']:3.0f} %, KL {point['kl_nat']:.4f}, "
            f"clipped {point['clipped_pct']:.1f} %, {point['answer_tok_count']:.0f} tokens, "
            f"{len(compared)} compared",
            flush=True,
        )
    seconds = time.monotonic() - began

    # -----------------------------------------------------------------------------
    # 3. Requests that it has not seen

    metrics = comparing.shares("exact", right_before, held_out())
    metrics["train_s"] = round(seconds, 1)
    line = comparing.line("", metrics, "exact", "pct", ".1f")
    print("held-out requests, right (%): before {1}, after {2}; more than noise: {4}".format(*line))
    print(f"{seconds / args.steps:.0f} s a rollout")
    variant = "gamed" if "long" in args.rewards else ""
    ends = [metrics["base_exact_pct"], metrics["tuned_exact_pct"]]
    draw(curve, ends, "-".join(["grpo", *[variant] * bool(variant)]))
    for name in curve[0]:
        metrics[name] = [round(point[name], 4) for point in curve]
    results.finish(__file__, metrics, vars(args), variant)


def draw(curve: list[dict], ends: list[float], name: str) -> None:
    """What was paid for, what was wanted, and how far the model went."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.2))
    steps = range(1, len(curve) + 1)
    left.plot(steps, [point["rewards"] for point in curve], marker="o", color="tab:green")
    left.set(title="mean reward", xlabel="rollout")
    middle.plot(steps, [point["sampled_exact_pct"] for point in curve], label="sampled answers")
    middle.plot([0, len(curve)], ends, "s--", color="black", label="held-out, greedy")
    middle.set(title="exact match (%)", xlabel="rollout", ylim=(-5, 105))
    middle.legend(fontsize=8)
    right.plot(steps, [point["kl_nat"] for point in curve], color="tab:red")
    right.set(title="KL to the start (nats a token)", xlabel="rollout", yscale="log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    results.picture(__file__, name, figure)


if __name__ == "__main__":
    main()
