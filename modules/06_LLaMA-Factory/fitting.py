"""An entry of dataset_info.json by the names of a file's fields: a good guess, to be looked at."""

from rows import MEDIA


def fitting(file_name: str, rows: list[dict]) -> dict | None:
    """An entry for these rows, by the names of their fields; None where no form is recognised."""
    fields = {name for row in rows for name, value in row.items() if value is not None}
    columns = {column: column for column in ("system", "tools", *MEDIA) if column in fields}
    columns |= {column: column[:-1] for column in MEDIA if column[:-1] in fields}
    if {"chosen", "rejected"} <= fields:
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    truths = [name for name in rows[0] if all(isinstance(row.get(name), bool) for row in rows)]
    if truths:
        columns["kto_tag"] = truths[0]
    entry = {"file_name": file_name}
    for field in fields:
        messages = [row[field] for row in rows if isinstance(row.get(field), list)]
        first = next((message for turns in messages for message in turns), None)
        if isinstance(first, dict) and len(first) > 1:
            pairs = [row[name] for row in rows for name in ("chosen", "rejected") if name in row]
            return entry | fitting_messages(field, [*messages, pairs], columns)
    names = {
        "prompt": ("instruction", "prompt", "question", "query", "input", "text"),
        "query": ("input", "context"),
        "response": ("output", "response", "answer", "completion", "target"),
        "history": ("history",),
    }
    for column, candidates in names.items():
        fits = [name for name in candidates if name in fields and name not in columns.values()]
        if fits:
            columns[column] = fits[0]
    if "prompt" not in columns:
        return None
    ranking = {"ranking": True} if "chosen" in columns else {}
    return entry | ranking | {"columns": columns}


def fitting_messages(field: str, dialogues: list[list[dict]], columns: dict) -> dict:
    """formatting, columns and tags of dialogues in the field `field`."""
    messages = [message for turns in dialogues for message in turns]
    keys = {key for message in messages for key, value in message.items() if value is not None}
    role = next((key for key in ("role", "from", "speaker", "author") if key in keys), None)
    content = next((key for key in ("content", "value", "text", "message") if key in keys), None)
    if not role or not content:
        return {}
    roles = {message.get(role) for message in messages}
    names = {
        "user_tag": ("user", "human", "customer"),
        "assistant_tag": ("assistant", "gpt", "bot", "model", "agent"),
        "observation_tag": ("tool", "observation", "function_response"),
        "function_tag": ("function_call", "tool_call", "function"),
        "system_tag": ("system",),
    }
    tags = {"role_tag": role, "content_tag": content}
    for tag, candidates in names.items():
        there = [name for name in candidates if name in roles]
        if there:
            tags[tag] = there[0]
    ranking = {"ranking": True} if "chosen" in columns else {}
    formatting = "openai" if "tool_calls" in keys else "sharegpt"
    return {
        "formatting": formatting,
        **ranking,
        "columns": {"messages": field, **columns},
        "tags": tags,
    }
