"""What is wrong with a row of a data set: sentences that LLaMA-Factory itself does not say.

Each function gives how a sentence that begins "FILE: row 3" goes on, "" where the row is right.
`attr` is LLaMA-Factory's DatasetAttr: the entry's columns and tags, None where it has none.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from lab import shown

MEDIA = ("images", "videos", "audios")
COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
COLUMNS += (*MEDIA, "chosen", "rejected", "kto_tag")


def wrong_rows(rows, attr, stage: str, folder: Path, most: int = 10) -> list[str]:
    """Sentences of the first `most` wrong rows, each beginning with "row N"."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.extras import logging

    logging._get_library_root_logger().setLevel("ERROR")  # its warnings are our sentences
    convert = get_dataset_converter(attr.formatting, attr, SimpleNamespace(media_dir=str(folder)))
    answers = {"dpo": 2, "rm": 2, "kto": 2, "sft": 1, "pt": 0}[stage]
    problems = []
    for number, row in enumerate(rows, 1):
        problem = wrong_in_row(row, attr, stage, folder)
        if not problem:  # the last word has LLaMA-Factory's own converter
            try:
                converted = convert(row)
                if len(converted["_prompt"]) % 2 == 0 or len(converted["_response"]) < answers:
                    problem = ": LLaMA-Factory drops it"
            except Exception as e:
                problem = f": LLaMA-Factory cannot read it: {type(e).__name__}: {e}"
        if problem:
            problems.append(f"row {number}{problem}")
        if len(problems) == most:
            break
    return problems


def wrong_in_row(row: dict, attr, stage: str, folder: Path) -> str:
    """`stage`: sft, dpo, rm, kto or pt, as in LLaMA-Factory's settings."""
    columns = [column for column in COLUMNS if column != "messages"]
    if attr.formatting != "alpaca":
        columns = COLUMNS[COLUMNS.index("messages") :]
    for column in columns:
        field = getattr(attr, column)
        if field and field not in row:
            has = ", ".join(f"`{name}`" for name in row)
            return f" has no field `{field}`, which the entry takes as {column}; it has {has}"
    form = wrong_alpaca if attr.formatting == "alpaca" else wrong_messages
    return (
        form(row, attr, stage)
        or wrong_answers(row, attr, stage)
        or wrong_tools(row, attr)
        or wrong_media(row, attr, folder)
    )


def wrong_alpaca(row: dict, attr, stage: str) -> str:
    asked = [row[field] for field in (attr.prompt, attr.query) if field]
    for text in asked:
        if text is not None and not isinstance(text, str):
            return f": a prompt must be a text, it is {text!r:.60}"
    if not any(text and text.strip() for text in asked):
        return f": the prompt is empty (`{attr.prompt}`)"
    if stage in ("pt", "dpo", "rm"):
        return ""
    if not attr.response:
        return " has no answer: the entry names no column `response`"
    answer = row[attr.response]
    if not isinstance(answer, str) or not answer.strip():
        return (
            f": field `{attr.response}` must be an answer that is not empty, it is {answer!r:.60}"
        )
    return ""


def wrong_messages(row: dict, attr, stage: str) -> str:
    """Turns by turns: user or observation, then assistant or function call."""
    messages = row[attr.messages]
    if not isinstance(messages, list) or not messages:
        return f": field `{attr.messages}` must be a list of messages, it is {messages!r:.60}"
    asking = {attr.user_tag, attr.observation_tag} - {None}
    answering = {attr.assistant_tag, attr.function_tag} - {None}
    known = [tag for tag in (*asking, *answering, attr.system_tag) if tag]
    turns = []
    for place, message in enumerate(messages, 1):
        here = f": message {place}"
        for field in (attr.role_tag, attr.content_tag):
            if not isinstance(message, dict) or field not in message:
                has = ", ".join(f"`{name}`" for name in message) if message else "nothing"
                return f"{here} has no field `{field}`, which the entry's tags name; it has {has}"
        role = message[attr.role_tag]
        content = message[attr.content_tag]
        calls = attr.formatting == "openai" and message.get("tool_calls")
        if role == attr.system_tag and place == 1:
            continue
        if role not in known:
            return f"{here} is of {role!r}: the entry's tags know {', '.join(sorted(known))}"
        if role == attr.system_tag:
            return f"{here} is of {role!r}: only the first message may be"
        if not calls and not isinstance(content, str):
            return f"{here}: field `{attr.content_tag}` must be a text, it is {content!r:.60}"
        if attr.formatting == "openai" and [role] == [attr.observation_tag] == turns[-1:]:
            continue  # several results of tools are one turn
        turns.append(role)
        expected = asking if len(turns) % 2 else answering
        if role not in expected:
            return f"{here} is of {role!r}, here must be one of {' or '.join(sorted(expected))}"
        if role in answering and not calls and not content.strip():
            return f"{here}: field `{attr.content_tag}` is empty, nothing would be learnt from it"
    ends_asking = stage in ("dpo", "rm")
    if len(turns) % 2 != ends_asking:
        wanted = asking if ends_asking else answering
        return f": the last message must be of {' or '.join(sorted(wanted))}, it is of {role!r}"
    return ""


def wrong_answers(row: dict, attr, stage: str) -> str:
    """The two answers of a pair, and what KTO is told of an answer."""
    for column in ("chosen", "rejected") if attr.ranking else ():
        field = getattr(attr, column)
        if not field:
            return f": the entry says `ranking`, but names no column `{column}`"
        answer = row[field]
        if attr.formatting == "alpaca":
            if not isinstance(answer, str):
                return f": field `{field}` must be a text, it is {answer!r:.60}"
        elif not isinstance(answer, dict) or {attr.role_tag, attr.content_tag} - set(answer):
            return f": field `{field}` must be a message, it is {answer!r:.60}"
        elif answer[attr.role_tag] not in (attr.assistant_tag, attr.function_tag):
            return f": field `{field}` is a message of {answer[attr.role_tag]!r}, no answer"
    if attr.kto_tag and not isinstance(row[attr.kto_tag], bool):
        return f": field `{attr.kto_tag}` must be true or false, it is {row[attr.kto_tag]!r:.60}"
    return ""


def wrong_tools(row: dict, attr) -> str:
    """The tools that a row offers, and the calls: JSON in texts, but for OpenAI's own fields."""
    tools = row[attr.tools] if attr.tools else None
    if isinstance(tools, list | dict) and attr.formatting != "openai":
        return f": field `{attr.tools}` must be JSON in a text, it is {tools!r:.60}"
    problem = wrong_functions(tools, "parameters") if tools else ""
    if problem:
        return f": field `{attr.tools}` {problem}"
    for place, message in enumerate(row[attr.messages] if attr.formatting != "alpaca" else (), 1):
        calls = message.get("tool_calls") if attr.formatting == "openai" else None
        if not calls and message[attr.role_tag] == attr.function_tag:
            calls = message[attr.content_tag]
        problem = wrong_functions(calls, "arguments") if calls else ""
        if problem:
            return f": message {place} {problem}"
    return ""


def wrong_functions(functions, needed: str) -> str:
    """`functions`: a list of {"name", `needed`}, or of OpenAI's {"function": ...}, or its JSON."""
    if isinstance(functions, str):
        try:
            functions = json.loads(functions)
        except ValueError as e:
            return f"must be JSON: {e}"
    for function in functions if isinstance(functions, list) else [functions]:
        inner = function.get("function", function) if isinstance(function, dict) else {}
        if not isinstance(inner, dict) or not {"name", needed} <= set(inner):
            return f'must be JSON as {{"name": ..., "{needed}": {{...}}}}'
        if isinstance(inner[needed], str):  # as OpenAI's API logs it: it would be quoted once more
            return f"has `{needed}` in a text, it must be an object: put it through json.loads"
    return ""


def wrong_media(row: dict, attr, folder: Path) -> str:
    """A picture, video or sound for each placeholder in the texts, and its file is there."""
    fields = [attr.prompt, attr.query] if attr.formatting == "alpaca" else []
    texts = [row[field] or "" for field in fields if field]
    if attr.formatting != "alpaca":
        texts = [message[attr.content_tag] or "" for message in row[attr.messages]]
    for column in MEDIA:
        field = getattr(attr, column)
        files = (row[field] or []) if field else []
        files = files if isinstance(files, list) else [files]
        placeholder = f"<{column[:-1]}>"
        count = sum(text.count(placeholder) for text in texts)
        if count != len(files):
            named = f"field `{field}` names" if field else f"the entry names no column `{column}`:"
            return f": the texts have {count} {placeholder}, {named} {len(files)} {column}"
        for file in files:
            if isinstance(file, str) and not (folder / file).is_file() and not Path(file).is_file():
                return f": there is no file {file} in {shown(folder)}"
    return ""
