"""What is wrong with a row of a data set: sentences that LLaMA-Factory itself does not say.

Each function gives how a sentence that begins "FILE: row 3" goes on, "" where the row is right.
`attr` is LLaMA-Factory's DatasetAttr: the entry's columns and tags, None where it has none.
"""

import json
import re
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
    answers = {"sft": 1, "pt": 0}.get(stage, 2)
    problems = []
    for number, row in enumerate(rows, 1):
        problem = wrong_in_row(row, attr, stage, folder)
        if not problem:  # the last word has LLaMA-Factory's own converter
            try:
                converted = convert(row)
                if len(converted["_prompt"]) % 2 == 0 or len(converted["_response"]) != answers:
                    problem = f": LLaMA-Factory drops it in stage {stage}"
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


def wrong_text(field: str, text) -> str:
    """The field must hold words."""
    if isinstance(text, str) and text.strip():
        return ""
    kind = "" if isinstance(text, str) or text is None else f", a {type(text).__name__}"
    return f": field `{field}` must be a text that is not empty, it is {text!r:.60}{kind}"


def wrong_alpaca(row: dict, attr, stage: str) -> str:
    """Prompt and answer; `history`: earlier pairs of them."""
    if stage == "pt":
        return ""
    asked = {field: row[field] for field in (attr.prompt, attr.query) if field}
    for field, text in asked.items():
        if text is not None and not isinstance(text, str):
            return wrong_text(field, text)
    if not any(text and text.strip() for text in asked.values()):
        return wrong_text(*next(iter(asked.items())))
    if attr.system and not isinstance(row[attr.system], str | None):
        return wrong_text(attr.system, row[attr.system])
    for pair in (row[attr.history] or []) if attr.history else []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            return (
                f": field `{attr.history}` must be a list of [question, answer], not {pair!r:.60}"
            )
    if attr.ranking:
        return ""
    if not attr.response:
        return " has no answer: the entry names no column `response`"
    return wrong_text(attr.response, row[attr.response])


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
        if not isinstance(message, dict):
            return f"{here} must be an object {{...}}, it is {message!r:.60}"
        for field in (attr.role_tag, attr.content_tag):
            if field not in message:
                has = ", ".join(f"`{name}`" for name in message)
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
    if not turns:
        return ": there is only a system message"
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
            problem = wrong_text(field, answer)
            if problem:
                return problem
        elif not isinstance(answer, dict) or {attr.role_tag, attr.content_tag} - set(answer):
            return f": field `{field}` must be a message, it is {answer!r:.60}"
        elif answer[attr.role_tag] not in (attr.assistant_tag, attr.function_tag):
            return f": field `{field}` is a message of {answer[attr.role_tag]!r}, no answer"
        elif wrong_text("", answer[attr.content_tag]):
            return wrong_text(f"{field}.{attr.content_tag}", answer[attr.content_tag])
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
    written = isinstance(functions, str)
    if written:
        functions = re.sub(r"^\s*<think>.*?</think>", "", functions, flags=re.S)
        try:
            functions = json.loads(functions)
        except ValueError as e:
            return f"must be JSON: {e}"
    for function in functions if isinstance(functions, list) else [functions]:
        inner = function.get("function", function) if isinstance(function, dict) else {}
        if not isinstance(inner, dict) or not {"name", needed} <= set(inner):
            return f'must be JSON as {{"name": ..., "{needed}": {{...}}}}'
        values = inner[needed]
        if isinstance(values, str):  # as OpenAI's API logs it: it would be quoted once more
            return f"has `{needed}` in a text, it must be an object: put it through json.loads"
        if needed == "parameters" and "properties" not in values:
            return 'must have "parameters": {"properties": {...}}'
        # A table has one set of columns: those of other rows' calls are null here.
        within = values.get("properties", values) if isinstance(values, dict) else {}
        if not written and None in within.values():
            return (
                f"has null in `{needed}`, which other rows' put there: write calls and tools as "
                "JSON in texts (example_tools.jsonl)"
            )
    return ""


def wrong_media(row: dict, attr, folder: Path) -> str:
    """A picture, video or sound for each placeholder in the texts, and its file is there.

    Where the entry names no column for them, a placeholder is a word like others.
    """
    fields = [attr.prompt, attr.query, attr.response] if attr.formatting == "alpaca" else []
    texts = [row[field] or "" for field in fields if field]
    if attr.formatting != "alpaca":
        texts = [message[attr.content_tag] or "" for message in row[attr.messages]]
    for column in MEDIA:
        field = getattr(attr, column)
        if not field:
            continue
        files = row[field] if isinstance(row[field], list) else [row[field]] * bool(row[field])
        placeholder = f"<{column[:-1]}>"
        count = sum(text.count(placeholder) for text in texts)
        if count != len(files):
            return (
                f": the texts have {count} {placeholder}, field `{field}` names {len(files)} "
                f"{column}"
            )
        for file in files:
            if not isinstance(file, (str, bytes, dict, list)):  # a list: the frames of a video
                return f": field `{field}` has {file!r} where the path of a file belongs"
            if isinstance(file, str) and not (folder / file).is_file() and not Path(file).is_file():
                return f": there is no file {file} in {shown(folder)}"
    return ""
