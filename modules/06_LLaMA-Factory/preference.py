"""What learning from pairs of answers is made of, with trl's names. DPO: arXiv 2305.18290."""

import torch
import torch.nn.functional as F


def concatenated(pairs: list[dict], tokenizer) -> dict[str, torch.Tensor]:
    """The chosen answers of all pairs, then the rejected ones, each after its question.

    input_ids, attention_mask and completion_mask, [2 * pairs, tokens]; the last is 1 on the tokens
    of the answer, its end included. The padding stands on the right.
    """
    texts = []
    answers = []
    for which in ("chosen", "rejected"):
        for pair in pairs:
            asked = tokenizer.apply_chat_template(
                pair["messages"], tokenize=False, add_generation_prompt=True
            )
            prompt = tokenizer(asked)["input_ids"]
            answer = tokenizer(pair[which]["content"] + tokenizer.eos_token)["input_ids"]
            texts.append(prompt + answer)
            answers.append([0] * len(prompt) + [1] * len(answer))
    longest = max(map(len, texts))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded(texts, tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(text) for text in texts], 0),
        "completion_mask": padded(answers, 0),
    }


def logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How probable the model finds each answer: the sum over its tokens, [rows], in nats."""
    ids = batch["input_ids"]
    mask = batch["completion_mask"]
    first = int(mask.argmax(1).min())  # the logits of tokens before any answer are not needed
    kept = ids.shape[1] - first + 1
    output = model(ids, attention_mask=batch["attention_mask"], logits_to_keep=kept)
    each = F.log_softmax(output.logits[:, :-1].float(), dim=-1)  # the last one foretells nothing
    return (each.gather(-1, ids[:, first:, None])[..., 0] * mask[:, first:]).sum(-1)


def dpo_loss(
    policy: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of each pair [pairs], the rewards of both its answers [2, pairs]).

    `policy` and `reference`: `logps` of the trained and the frozen model, [2 * pairs]. The reward
    of an answer is beta times what it has gained over the reference; the loss is that of guessing
    the better one by its reward.
    """
    rewards = beta * (policy - reference).view(2, -1)
    chosen, rejected = rewards
    return -F.logsigmoid(chosen - rejected), rewards.detach()
