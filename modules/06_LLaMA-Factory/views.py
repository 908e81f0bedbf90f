"""How 00_check_data.py shows lengths, and how a text differs from the model's own chat template."""

import json
from collections import Counter

from jinja2.exceptions import TemplateError


def histogram(lengths: list[int], cutoff_len: int) -> None:
    """At most twelve lines of token counts, from the shortest to the longest."""
    width = 8
    while max(lengths) // width - min(lengths) // width >= 12:
        width *= 2
    counts = Counter(length // width for length in lengths)
    for bucket in range(min(counts), max(counts) + 1):
        bar = "#" * -(-40 * counts[bucket] // max(counts.values()))
        cut = "  (cut)" if bucket * width >= cutoff_len else ""
        edges = f"{bucket * width:>7,} - {(bucket + 1) * width - 1:>7,}"
        print(f"{edges}  {counts[bucket]:>7,}  {bar}{cut}")


def as_chat(row: dict, answer: dict) -> list[dict]:
    """The converted row as messages of OpenAI's form, which chat templates take."""
    messages = [{"role": "system", "content": row["_system"]}] if row["_system"] else []
    for message in (*row["_prompt"], answer):
        role = {"observation": "tool"}.get(message["role"], message["role"])
        if role == "function":
            thoughts, end, text = message["content"].rpartition("</think>")
            calls = json.loads(text)
            calls = calls if isinstance(calls, list) else [calls]
            calls = [{"type": "function", "function": call} for call in calls]
            messages.append({"role": "assistant", "content": thoughts + end, "tool_calls": calls})
        else:
            messages.append({"role": role, "content": message["content"]})
    return messages


def own_tokens(tokenizer, row: dict, answer: dict, switches: dict) -> list[int]:
    """Token ids of the row by the tokenizer's own chat template; none where that refuses it.

    First the prompt as a server makes it, then the rest: an answer never shares a token with it.
    `switches` go to the chat template.
    """
    messages = as_chat(row, answer)
    given = {"tools": json.loads(row["_tools"]) if row["_tools"] else None} | switches
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, **given
        )
    except TemplateError:  # for example of a system message
        return []
    texts = [prompt, whole.removeprefix(prompt)] if whole.startswith(prompt) else [whole]
    return [t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]]


def empty_thoughts(template, texts: list[tuple[dict, dict]]) -> str | None:
    """What LLaMA-Factory does to the answers without thoughts; None where it does nothing."""
    from llamafactory.data.template import ReasoningTemplate

    if not isinstance(template, ReasoningTemplate):
        return None
    marks = [mark.strip() for mark in template.thought_words]
    bare = sum(not any(mark in answer["content"] for mark in marks) for _, answer in texts)
    block = "".join(marks)
    if template.enable_thinking:
        where = "counts in the loss: the model learns not to think, and is asked to"
    else:
        where = "is masked: ask for answers with enable_thinking=false"
    return f"{bare} of {len(texts)} answers have no thoughts: an empty {block} that {where}"


def same_tokens(ids: list[int], own: list[int], tokenizer) -> bool:
    """Whether they are the same up to blanks after the end of the answer."""
    return own[: len(ids)] == ids and not tokenizer.decode(own[len(ids) :]).strip()


def print_difference(ids: list[int], own: list[int], tokenizer) -> None:
    """The first place where the two differ, with some tokens before it."""
    pairs = enumerate(zip(ids, own, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(ids), len(own)))
    print(f"  the first that differs does so after {place} tokens:")
    for who, tokens in (("LLaMA-Factory's", ids), ("the model's own", own)):
        print(f"    {who}  ...{tokenizer.decode(tokens[max(0, place - 4) : place + 12])!r}")
