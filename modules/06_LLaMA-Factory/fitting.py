"""An entry of dataset_info.json by the names of a file's fields: a good guess, to be looked at."""

from rows import MEDIA

ROLES = ("role", "from", "speaker", "author")
CONTENTS = ("content", "value", "text", "message")
# Values of a label; rows.py refuses what is no boolean, rather than that it is passed over.
TRUTHS = (True, False, "true", "false", "True", "False", "0", "1")


def fitting(file_name: str, rows: list[dict]) -> dict | None:
    """An entry for these rows, by the names of their fields; None where no form is recognised."""
    filled = [name for row in rows for name, value in row.items() if value is not None]
    fields = list(dict.fromkeys(filled))
    columns = {column: column for column in ("system", "tools", *MEDIA) if column in fields}
    columns |= {column: column[:-1] for column in MEDIA if column[:-1] in fields}
    pairs = {"chosen", "rejected"} <= set(fields)
    if pairs:
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    for name in ("kto_tag", "label", "desirable"):
        if all(row.get(name) in TRUTHS for row in rows):
            columns["kto_tag"] = name
    entry = {"file_name": file_name}
    ranking = {"ranking": True} if pairs else {}
    for field in fields:
        messages = messages_of(row.get(field) for row in rows)
        if field not in columns and messages:
            answers = messages_of(
                [row.get(name)] for row in rows for name in ("chosen", "rejected")
            )
            form = form_of(messages + answers)
            columns = {"messages": field, **columns}
            return entry | {"formatting": form["formatting"], **ranking, "columns": columns} | form
    names = {
        "prompt": ("instruction", "prompt", "question", "query", "input"),
        "query": ("input", "context"),
        "response": ("output", "response", "answer", "completion", "target"),
        "history": ("history",),
    }
    for column, candidates in names.items():
        fits = [name for name in candidates if name in fields and name not in columns.values()]
        if fits:
            columns[column] = fits[0]
    texts = all(isinstance(row.get("chosen", ""), str) for row in rows)
    if "prompt" in columns and ("response" in columns or (pairs and texts)):
        return entry | ranking | {"columns": columns}
    if fields == ["text"]:  # of stage pt
        return entry | {"columns": {"prompt": "text"}}
    return None


def messages_of(dialogues) -> list[dict]:
    """The messages of all dialogues; none where these are not lists of messages."""
    turns = [message for turns in dialogues if isinstance(turns, list) for message in turns]
    messages = [message for message in turns if isinstance(message, dict)]
    keys = {key for message in messages for key in message}
    return messages if keys & set(ROLES) and keys & set(CONTENTS) else []


def form_of(messages: list[dict]) -> dict:
    """`formatting` and `tags` of these messages."""
    keys = {key for message in messages for key, value in message.items() if value is not None}
    role = next((key for key in ROLES if key in keys), ROLES[0])
    content = next((key for key in CONTENTS if key in keys), CONTENTS[0])
    roles = {message[role] for message in messages if isinstance(message.get(role), str)}
    calls = any(message.get("tool_calls") for message in messages)
    names = {
        "user_tag": ("user", "human", "customer"),
        "assistant_tag": ("assistant", "gpt", "bot", "model", "agent"),
        "observation_tag": ("tool", "observation", "function_response"),
        "function_tag": ("function_call", "tool_call", "function"),
        "system_tag": ("system", "developer"),
    }
    tags = {"role_tag": role, "content_tag": content}
    for tag, candidates in names.items():
        there = [role for name in candidates for role in sorted(roles) if role.lower() == name]
        if there:
            tags[tag] = there[0]
    if calls:  # LLaMA-Factory gives messages with tool_calls this role
        tags.setdefault("function_tag", "function_call")
    return {"formatting": "openai" if calls else "sharegpt", "tags": tags}
