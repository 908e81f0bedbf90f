"""A data set as LLaMA-Factory reads it: an entry of dataset_info.json, and the rows of its file.

Reading and converting are LLaMA-Factory's own (llamafactory/data/parser.py and converter.py of
0.9.5). Here is what it does not say: which row and which field is wrong. A row whose tags it does
not know it drops, with a line in the log; a key of the entry that it does not know it ignores.
"""

import difflib
import json
import re
import shlex
from pathlib import Path

from fitting import fitting
from reading import load, wrong_in_files
from rows import COLUMNS, wrong_rows

from lab import fail, shown

SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
KEYS = (*SOURCES, "formatting", "ranking", "subset", "split", "folder", "num_samples")
KEYS += ("columns", "tags")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
TAGS += ("observation_tag", "function_tag", "system_tag")
FORMATS = ("alpaca", "sharegpt", "openai")
STAGES = ("sft", "dpo", "rm", "kto", "pt")

# -----------------------------------------------------------------------------
# The entry


def read_info(file: Path) -> dict:
    """The entries of a dataset_info.json. Exit code 2 where it is none."""
    if file.is_dir():
        fail(f"{shown(file)} is a folder: name the dataset_info.json in it")
    if not file.is_file():
        fail(
            f"there is no {shown(file)}: it names the data sets; "
            "set dataset_dir to a folder that has one"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        fail(f"{shown(file)} is not valid JSON: {e}")
    if not isinstance(info, dict):
        fail(f'{shown(file)} must be an object {{"name of a data set": {{...}}, ...}}')
    return info


def meant(word: str, known) -> str:
    """How a sentence about an unknown name ends, where a known one is near."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def wrong_in_entry(entry) -> str:
    """How a sentence that begins with the entry's name goes on; "" where the entry is right."""
    if not isinstance(entry, dict):
        return ' must be an object {"file_name": ..., ...}'
    for place, known in (("", KEYS), ("columns", COLUMNS), ("tags", TAGS)):
        part = entry.get(place, {}) if place else entry
        if not isinstance(part, dict):
            return f": `{place}` must be an object"
        for word in part:
            if word not in known:
                near = meant(word, known) or f"; known are {', '.join(known)}"
                within = f" in `{place}`" if place else ""
                return f": LLaMA-Factory ignores `{word}`{within} without a word{near}"
            if place and not isinstance(part[word], str | None):
                return f": `{place}.{word}` must be the name of a field, it is {part[word]!r}"
    sources = [source for source in SOURCES if source in entry]
    if len(sources) != 1 and set(sources) - {"hf_hub_url", "ms_hub_url", "om_hub_url"}:
        return f": it must say where the rows are by one of {', '.join(SOURCES)}"
    if not sources:
        return ": it does not say where the rows are, for example by `file_name`"
    for word in {*sources, "split"} & set(entry):
        if not isinstance(entry[word], str) or not entry[word]:
            return f": `{word}` must be a text, it is {entry[word]!r}"
    if not isinstance(entry.get("num_samples"), int | None) or entry.get("num_samples") == 0:
        return f": `num_samples` must be a whole number from 1, it is {entry['num_samples']!r}"
    if not isinstance(entry.get("ranking"), bool | None):
        return f": `ranking` must be true or false, it is {entry['ranking']!r}"
    if entry.get("formatting", "alpaca") not in FORMATS:
        return f": `formatting` is {entry['formatting']!r}, not one of {', '.join(FORMATS)}"
    # What `columns` or `tags` leaves out is not its usual name then, but nothing at all.
    columns = entry.get("columns", {})
    if entry.get("formatting", "alpaca") == "alpaca":
        needed = {} if {"prompt", "query"} & set(columns) else {"columns": ("prompt",)}
    else:
        needed = {"columns": ("messages",), "tags": TAGS[:4]}
    for place, required in needed.items():
        missing = [word for word in required if place in entry and word not in entry[place]]
        if missing:
            instead = f"; it has {', '.join(columns)}" if place == "columns" else ""
            return f": `{place}` must name {', '.join(missing)}{instead}"
    return ""


def attributes(name: str, entry: dict):
    """LLaMA-Factory's DatasetAttr: every column and tag, None where the entry leaves it out."""
    from llamafactory.data.parser import get_dataset_list

    return get_dataset_list([name], {name: entry})[0]


def usual_stage(entry) -> str:
    """The stage that an entry with these columns is for."""
    columns = entry.get("columns", {})
    if entry.get("ranking"):
        return "dpo"
    if columns.get("kto_tag"):
        return "kto"
    alpaca = entry.get("formatting", "alpaca") == "alpaca"
    return "pt" if alpaca and columns and "response" not in columns else "sft"


# -----------------------------------------------------------------------------
# Both


def check(
    name: str,
    entry: dict,
    folder: Path,
    stage: str,
    most: int = 1,
    media: Path | None = None,
):
    """The rows of an entry whose file lies in `folder`, and its DatasetAttr; pictures in `media`.

    Exit code 2 with one sentence where LLaMA-Factory could not read it, or would drop a row; up to
    `most` wrong rows are printed. None where the rows are in no file: LLaMA-Factory fetches them.
    """
    problem = wrong_in_entry(entry)
    if problem:
        fail(f"the entry {name}{problem}")
    if "file_name" not in entry:
        return None
    if stage != "kto" and entry.get("columns", {}).get("kto_tag"):
        fail(f"the entry {name} has `kto_tag`, which is for stage kto; this is stage {stage}")
    path = folder / entry["file_name"]
    problem = wrong_in_files(path)
    if problem:
        fail(f"the entry {name}: {problem}")
    attr = attributes(name, entry)
    if (stage in ("dpo", "rm")) != bool(attr.ranking):
        has = "has" if attr.ranking else "does not have"
        fail(
            f"the entry {name} {has} `ranking: true`, pairs of answers, which stages dpo and rm "
            f"need and no other takes; this is stage {stage}"
        )
    rows = load(path, attr.split)
    problems = wrong_rows(rows, attr, stage, media or folder, most)
    for sentence in problems[:-1]:
        print(sentence)
    if problems:
        here = f"{shown(path)} by the entry {name}: {problems[-1]}"
        fits = fitting(entry["file_name"], list(rows)) if most > 1 else None
        if fits and fits != entry:
            print(f"an entry by the names of its fields: {json.dumps(fits, ensure_ascii=False)}")
        fail(here if most > 1 else f"{here}; make lf-check-data shows more")
    return rows, attr


def find(text: str, info: Path | None, folder: Path) -> tuple[str, dict, Path]:
    """Name, entry and folder of a data set, by its name or by its file.

    A name is one of `info` (default: the dataset_info.json in `folder`). The entry of a file is in
    `info`, or in the dataset_info.json beside it, else made from the names of its fields.
    """
    known = read_info(info or folder / "dataset_info.json")
    if text in known:
        return text, known[text], info.parent if info else folder
    path = Path(text).expanduser()
    if not path.exists():
        file = shown(info or folder / "dataset_info.json")
        names = ", ".join(known)
        fail(f"there is no data set and no file {text}: {file} has {names}{meant(text, known)}")
    beside = info or path.parent / "dataset_info.json"
    if beside.is_file():
        for name, entry in read_info(beside).items():
            named = entry.get("file_name") if isinstance(entry, dict) else None
            if isinstance(named, str) and (beside.parent / named).resolve() == path.resolve():
                return name, entry, beside.parent
        if info:
            fail(f"no entry of {shown(info)} has this file as its file_name: {text}")
    problem = wrong_in_files(path)
    if problem:
        fail(problem)
    rows = load(path, None)
    entry = fitting(path.name, list(rows))
    if entry is None and isinstance(rows[0].get("chosen"), list):
        fail(
            f"{text}: `chosen` and `rejected` are lists of messages: LLaMA-Factory takes one "
            "message or text there, and what comes before it as `messages` or `prompt`"
        )
    if entry is None:
        fail(
            f"{text}: its fields ({', '.join(rows.column_names)}) do not tell which is the prompt "
            "and which the answer: write its entry by hand (your_data.md of module 06, section 2)"
        )
    problem = wrong_in_entry(entry)
    if problem:
        fail(
            f"{text}: an entry by the names of its fields is not enough{problem}; write it by hand "
            f"from {json.dumps(entry, ensure_ascii=False)}"
        )
    name = re.sub(r"[\s,]+", "_", path.stem)  # a name with a comma would be two
    return name, entry, path.parent


def write(name: str, entry: dict, folder: Path) -> None:
    """Add the entry to the dataset_info.json of the folder; one that is there stays."""
    file = folder / "dataset_info.json"
    info = read_info(file) if file.is_file() else {}
    if name in info:
        fail(f"{shown(file)} has an entry {name} already: change it there, or rename the file")
    partial = file.with_suffix(".partial")
    content = json.dumps({**info, name: entry}, indent=2, ensure_ascii=False)
    try:
        partial.write_text(content + "\n", encoding="utf-8")
        partial.rename(file)
    except OSError as e:
        fail(f"cannot write {shown(file)}: {e.strerror}")
    settings = shlex.join([f"dataset={name}", f"dataset_dir={shown(folder)}"])
    print(f"written to {shown(file)}: train on it by {settings}")
