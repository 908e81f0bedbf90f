"""How 00_check_data.py shows lengths, and how a text differs from the model's own chat template."""

import json


def histogram(lengths: list[int], cutoff_len: int) -> None:
    """A line for each power of two of token counts; where the cut falls is marked."""
    edge = 1
    while edge <= max(lengths, default=0):
        count = sum(edge <= length < 2 * edge for length in lengths)
        bar = "#" * -(-40 * count // len(lengths))
        cut = "  <- cutoff_len" if edge <= cutoff_len < 2 * edge else ""
        if count or cut:
            print(f"  {edge:>7,} to {2 * edge - 1:>7,}  {count:>7,}  {bar}{cut}")
        edge *= 2


def as_chat(row: dict, answer: dict) -> list[dict]:
    """The converted row as messages of OpenAI's form, which chat templates take."""
    messages = [{"role": "system", "content": row["_system"]}] if row["_system"] else []
    for message in (*row["_prompt"], answer):
        role = {"observation": "tool"}.get(message["role"], message["role"])
        if role == "function":
            calls = json.loads(message["content"])
            calls = calls if isinstance(calls, list) else [calls]
            calls = [{"type": "function", "function": call} for call in calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": message["content"]})
    return messages


def own_tokens(tokenizer, row: dict, answer: dict) -> list[int]:
    """Token ids of the row by the tokenizer's own chat template."""
    tools = json.loads(row["_tools"]) if row["_tools"] else None
    text = tokenizer.apply_chat_template(as_chat(row, answer), tools=tools, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
