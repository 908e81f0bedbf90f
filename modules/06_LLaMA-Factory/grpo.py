"""What learning from rewards is made of, with trl's names. GRPO: arXiv 2402.03300."""

import torch
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# 1. The model writes


@torch.no_grad()
def rollout(policy, tokenizer, rows: list[dict], group: int, most: int, greedy=False) -> dict:
    """`group` answers to each row's request, of at most `most` tokens, sampled or greedy.

    ids and attention_mask [rows * group, prompt + answer], padded on the left; mask
    [rows * group, answer], 1 up to the end of the answer; answers, their texts.
    """
    asked = [row["messages"][:-1] for row in rows]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = inputs.to(policy.device)
    # top_k=0: each token as often as the model finds it probable, none is left out
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    policy.merge_adapter()  # one matrix writes faster than three
    ids = policy.generate(
        **inputs,
        **sampling,
        do_sample=not greedy,
        num_return_sequences=group,
        max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
    )
    policy.unmerge_adapter()
    answers = ids[:, inputs["input_ids"].shape[1] :]
    is_end = (answers == tokenizer.eos_token_id).long()
    mask = (is_end.cumsum(1) - is_end == 0).long()  # no end before it; the end itself counts
    attended = inputs["attention_mask"].repeat_interleave(group, dim=0)
    kept = [row[: length.sum()] for row, length in zip(answers, mask, strict=True)]
    return {
        "ids": ids,
        "attention_mask": torch.cat([attended, mask], dim=1),
        "mask": mask,
        "answers": tokenizer.batch_decode(kept, skip_special_tokens=True),
    }


# -----------------------------------------------------------------------------
# 2. What is better than the rest of its group


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """How far an answer's reward is above the mean of its group, in standard deviations.

    `rewards` [prompts, group]; the answer [prompts * group]. Where a group agrees there is nothing
    to learn: 0.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    deviation = rewards.std(dim=1, keepdim=True)
    return ((rewards - mean) / (deviation + 1e-4)).flatten()


# -----------------------------------------------------------------------------
# 3. More of the better, less of the worse


def token_logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each token of the answers, [rows, answer], in nats."""
    length = batch["mask"].shape[1]
    output = model(batch["ids"], attention_mask=batch["attention_mask"], logits_to_keep=length + 1)
    each = F.log_softmax(output.logits[:, :-1].float(), dim=-1)  # the last one foretells nothing
    return each.gather(-1, batch["ids"][:, -length:, None])[..., 0]


def grpo_loss(
    logps: torch.Tensor, batch: dict[str, torch.Tensor], epsilon: float, beta: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """(the loss, {KL to the reference in nats a token, share of the tokens that were clipped}).

    `logps` [rows, answer] of the model that is trained. Of the batch: `mask` and, of the same
    shape, `old_logps` (the model that wrote the answers) and `reference_logps` (the model at the
    start); `advantages` [rows].
    """
    mask = batch["mask"]
    advantages = batch["advantages"][:, None]
    ratio = torch.exp(logps - batch["old_logps"])
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)  # farther away there is nothing to gain
    gain = torch.min(ratio * advantages, clipped * advantages)
    apart = batch["reference_logps"] - logps
    kl = torch.exp(apart) - apart - 1  # Schulman's k3: never below 0, right on average
    per_token = beta * kl - gain
    loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()  # each answer counts the same
    is_clipped = clipped * advantages < ratio * advantages
    return loss, {
        "kl_nat": ((kl * mask).sum() / mask.sum()).item(),
        "clipped_pct": 100 * ((is_clipped * mask).sum() / mask.sum()).item(),
    }
