"""Rows of unequal length, and the two ways to make one batch of them: padding and packing."""

import random

import torch
from torch.nn.utils.rnn import pad_sequence

from lab import data

IGNORED = -100  # a label that transformers' loss leaves out
MOST_TURNS = 3


def conversations(name: str, seed: int) -> list[list[dict]]:
    """The requests of a data set joined into conversations of 1 to 3 turns.

    Alone they are nearly equally long, which hides what unequal lengths do.
    """
    rng = random.Random(seed)
    rows = data.rows(name)
    joined = []
    while rows:
        turns = rng.randint(1, MOST_TURNS)
        joined.append([message for row in rows[:turns] for message in row["messages"]])
        rows = rows[turns:]
    return joined


def token_rows(tokenizer, name: str, longest: int, count: int, seed: int = 0) -> list:
    """The first `count` conversations as tokens: a list of LongTensor [at most `longest`]."""
    rows = []
    for messages in conversations(name, seed)[:count]:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        rows.append(torch.tensor(tokenizer(text)["input_ids"][:longest]))
    return rows


def padded(rows: list) -> dict[str, torch.Tensor]:
    """A row a line, filled up to the longest: each tensor [rows, longest row]."""
    ones = [torch.ones_like(row) for row in rows]
    ids = pad_sequence(rows, batch_first=True)
    attention_mask = pad_sequence(ones, batch_first=True)  # 0 where it is filled up
    labels = ids.masked_fill(attention_mask == 0, IGNORED)
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def packed(rows: list) -> dict[str, torch.Tensor]:
    """All rows in one line, nothing filled up: each tensor [1, sum of the rows].

    Positions begin anew with each row. transformers makes the attention's blocks of that, but only
    without an attention_mask and with use_cache=False. A row's first token is not predicted from
    the row before.
    """
    ids = torch.cat(rows)[None]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = ids.masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": ids, "position_ids": position_ids, "labels": labels}


def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens the loss of this batch is a mean of; the first of a line is none. []"""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def filled_up(batches: list[dict]) -> float:
    """The share of the places in these batches that hold no token of a row."""
    places = sum(batch["input_ids"].numel() for batch in batches)
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    return sum((mask == 0).sum().item() for mask in masks) / places
