"""DPO from scratch: which of two answers is better is all that the model is told.

    make mini-dpo                                             # from the untuned model
    make mini-dpo ARGS="--model runs/06_LLaMA-Factory/merged" # after supervised training
    make mini-dpo ARGS="--beta 1"                             # stays nearer to the reference

preference.py is the whole of it: the log-probability of an answer, and the loss, one line. The
reference is the same model with its adapter switched off: it needs no memory of its own, and what
it says of the pairs is computed once.
Look at: the margin, which grows; the held-out pairs, which the model has not seen; and the
log-probability of the *chosen* answers, which may fall too: only the difference counts.
"""

import argparse

from lab import data, fail, jobs, models, results, training
from lab.profile import load_profile

HELD_OUT = 16  # pairs at the end of the set


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    models.add_model_flag(parser, "smollm2-135m")
    training.add_flag(parser, "--beta", float, 0.1, "how much a nat away from the reference counts")
    training.add_flag(parser, "--steps", int, 8, "optimizer steps")
    training.add_flag(parser, "--pairs", int, 4, "pairs of a step")
    training.add_flag(parser, "--learning-rate", float, 2e-4, "of AdamW")
    training.add_flag(parser, "--rank", int, 16, "of the LoRA adapter")
    args = parser.parse_args()
    if min(args.steps, args.pairs, args.rank) < 1 or args.beta <= 0:
        fail("--steps, --pairs and --rank must be at least 1, --beta more than 0")
    pairs = data.pairs("launch_en_pairs")
    if args.steps * args.pairs > len(pairs) - HELD_OUT:
        fail(f"--steps times --pairs must be at most {len(pairs) - HELD_OUT}, the pairs there are")
    jobs.refuse_taken_cards()

    import preference  # the file beside this script
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. One model with an adapter: on, it is the policy; off, the reference

    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(profile.device)
    torch.manual_seed(42)
    policy = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank))
    policy.eval()  # no dropout

    def batch_of(group: list[dict]) -> dict[str, torch.Tensor]:
        made = preference.concatenated(group, tokenizer)
        return {name: value.to(profile.device) for name, value in made.items()}

    firsts = range(0, args.steps * args.pairs, args.pairs)
    batches = [batch_of(pairs[first : first + args.pairs]) for first in firsts]
    held_out = batch_of(pairs[-HELD_OUT:])
    with torch.no_grad(), policy.disable_adapter():
        references = [preference.logps(policy, batch) for batch in batches]
        held_out_reference = preference.logps(policy, held_out)

    @torch.no_grad()
    def measured() -> dict[str, float]:
        """Of the held-out pairs: both log-probabilities, their margin, how many are right."""
        now = preference.logps(policy, held_out)
        chosen, rejected = now.view(2, -1)
        _, rewards = preference.dpo_loss(now, held_out_reference, args.beta)
        return {
            "chosen_logp_nat": chosen.mean().item(),
            "rejected_logp_nat": rejected.mean().item(),
            "margin_nat": (rewards[0] - rewards[1]).mean().item(),
            "right_pct": 100 * (chosen > rejected).float().mean().item(),
        }

    # -----------------------------------------------------------------------------
    # 2. The training

    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    before = measured()
    losses = []
    for step, (batch, reference) in enumerate(zip(batches, references, strict=True), 1):
        loss_of_each, rewards = preference.dpo_loss(
            preference.logps(policy, batch), reference, args.beta
        )
        loss = loss_of_each.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        margin = (rewards[0] - rewards[1]).mean().item()
        print(f"step {step:3d}: loss {losses[-1]:.4f}, margin {margin:+.3f}", flush=True)

    # -----------------------------------------------------------------------------
    # 3. Pairs that it has not seen

    after = measured()
    print(f"\n{HELD_OUT} held-out pairs{'before':>14}{'after':>10}")
    for name, title in (
        ("right_pct", "chosen is likelier (%)"),
        ("margin_nat", "margin of the rewards"),
        ("chosen_logp_nat", "log p of the chosen"),
        ("rejected_logp_nat", "log p of the rejected"),
    ):
        print(f"  {title:24}{before[name]:>10.2f}{after[name]:>10.2f}")
    metrics = {"losses": losses}
    for when, values in (("before", before), ("after", after)):
        metrics |= {f"{when}_{name}": round(value, 3) for name, value in values.items()}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
