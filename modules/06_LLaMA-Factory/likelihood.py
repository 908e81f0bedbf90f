"""How probable a model finds a text: whole paragraphs, and the options of a question."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import preference

# A question and what stands before its options, as lm-evaluation-harness's doc_to_text and
# target_delimiter; no letters: what is compared is the probability of the option's own text.
FORMS = {"en": ("Question: {}\nAnswer:", " "), "zh": ("问题：{}\n答案：", "")}


class Choice(NamedTuple):
    question: str
    choices: list[str]
    answer: int  # the place of the right one


class Text(NamedTuple):
    nats: float  # its summed loss
    tokens: int
    bytes: int  # in UTF-8


def summed_logps(model, tokenizer, texts: list[tuple[str, str]], batch_size: int):
    """[log p of each continuation after its context, in nats], [tokens of each continuation].

    Context and continuation are tokenized as one text, which is cut where the tokens of the
    context alone end: as lm-evaluation-harness does. Rows of one length go together.
    """
    pairs = []
    for context, continuation in texts:
        before = tokenizer(context)["input_ids"]
        pairs.append((before, tokenizer(context + continuation)["input_ids"][len(before) :]))
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0] + pairs[row][1]))
    logps = [0.0] * len(pairs)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = preference.padded([pairs[row] for row in rows], tokenizer.pad_token_id)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        for row, logp in zip(rows, preference.logps(model, batch).tolist(), strict=True):
            logps[row] = logp
    return logps, [len(continuation) for _, continuation in pairs]


def of_paragraphs(model, tokenizer, paragraphs: list[str], batch_size: int) -> list[Text]:
    """The loss of each paragraph, all of its tokens: an empty line stands before it."""
    texts = [("\n", paragraph) for paragraph in paragraphs]
    logps, tokens = summed_logps(model, tokenizer, texts, batch_size)
    sizes = [len(paragraph.encode()) for paragraph in paragraphs]
    return [Text(-logp, *counts) for logp, *counts in zip(logps, tokens, sizes, strict=True)]


def per(unit: str, text: Text) -> tuple[float, int]:
    """(amount, size): nats and tokens, or the bits that the text takes if it is coded by the
    model's probabilities, and its bytes."""
    if unit == "loss":
        return text.nats, text.tokens
    return text.nats / math.log(2), text.bytes


def read_choices(file: Path) -> list[Choice]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Choice(**json.loads(line)) for line in lines]


def of_choices(model, tokenizer, asked: list[Choice], language: str, batch_size: int):
    """[log p of each option], a list for each question."""
    form, space = FORMS[language]
    texts = []
    for one in asked:
        texts += [(form.format(one.question), space + option) for option in one.choices]
    logps, _ = summed_logps(model, tokenizer, texts, batch_size)
    options = iter(logps)
    return [[next(options) for _ in one.choices] for one in asked]


def chosen(one: Choice, logps: list[float], per_character: bool) -> int:
    """The place of the likeliest option: of its whole text, or a character of it (acc_norm)."""
    lengths = [len(option) if per_character else 1 for option in one.choices]
    scores = [logp / length for logp, length in zip(logps, lengths, strict=True)]
    return scores.index(max(scores))
