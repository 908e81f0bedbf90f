"""How probable a model finds each option of a question, as lm-evaluation-harness asks it."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

# A question, and what stands before its options. No letters: an option counts by its own text.
FORMS = {"en": ("Question: {}\nAnswer:", " "), "zh": ("问：{}\n答：", "")}


class Choice(NamedTuple):
    question: str
    choices: list[str]
    answer: int  # the place of the right one


def read_choices(file: Path) -> list[Choice]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Choice(**json.loads(line)) for line in lines]


def option_logps(model, tokenizer, one: Choice, language: str) -> list[float]:
    """log p of each option after the question, in nats: the sum over its tokens.

    The question is computed once; all options then go on from its KV cache in one batch. Question
    and option are tokenized as one text, which is cut where the question's own tokens end.
    """
    form, space = FORMS[language]
    context = form.format(one.question)
    asked = tokenizer(context)["input_ids"]
    whole = [tokenizer(context + space + option)["input_ids"] for option in one.choices]
    options = [torch.tensor(ids[len(asked) :]) for ids in whole]
    ids = torch.nn.utils.rnn.pad_sequence(options, batch_first=True).to(model.device)
    lengths = torch.tensor([len(option) for option in options], device=model.device)

    first = model(input_ids=torch.tensor([asked], device=model.device), use_cache=True)
    cache = first.past_key_values
    cache.batch_repeat_interleave(len(options))
    rest = model(input_ids=ids, past_key_values=cache)  # the padding, on the right, is seen by none
    # The question's last token foretells the first of an option: [options, tokens, vocabulary]
    logits = torch.cat([first.logits[:, -1:].expand(len(ids), -1, -1), rest.logits[:, :-1]], dim=1)
    each = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # [options, tokens]
    is_text = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
    return (each * is_text).sum(-1).tolist()


def chosen(one: Choice, logps: list[float], per_character: bool) -> int:
    """The place of the likeliest option: by its whole text (acc), or by a character (acc_norm)."""
    lengths = [len(option) if per_character else 1 for option in one.choices]
    scores = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    return scores.index(max(scores))
