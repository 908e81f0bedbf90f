"""A data set as LLaMA-Factory reads it: an entry of dataset_info.json, and the rows of its file.

Reading and converting are LLaMA-Factory's own (llamafactory/data/parser.py and converter.py of
0.9.5). Here is what it does not say: which row and which field is wrong. A row whose tags it does
not know it drops, with a line in the log; a key of the entry that it does not know it ignores.
"""

import difflib
import json
from pathlib import Path

from fitting import fitting
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
                near = difflib.get_close_matches(word, known, 1, 0.5)
                meant = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}"
                within = f" in `{place}`" if place else ""
                return f": LLaMA-Factory ignores `{word}`{within} without a word; {meant}"
            if place and not isinstance(part[word], str):
                return f": `{place}.{word}` must be the name of a field, it is {part[word]!r}"
    if not any(source in entry for source in SOURCES):
        return ": it does not say where the rows are, for example by `file_name`"
    if entry.get("formatting", "alpaca") not in FORMATS:
        return f": `formatting` is {entry['formatting']!r}, not one of {', '.join(FORMATS)}"
    # What `columns` or `tags` leaves out is not its usual name then, but nothing at all.
    columns = entry.get("columns", {})
    if entry.get("formatting", "alpaca") == "alpaca":
        needed = {"columns": ("prompt",)}
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
    if "kto_tag" in columns:
        return "kto"
    alpaca = entry.get("formatting", "alpaca") == "alpaca"
    return "pt" if alpaca and columns and "response" not in columns else "sft"


# -----------------------------------------------------------------------------
# The file


def wrong_in_files(path: Path) -> str:
    """What is wrong with the file, or with the folder of files; "" where it can be read."""
    from llamafactory.extras.constants import FILEEXT2TYPE

    if not path.exists():
        return f"there is no file {shown(path)}"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    kinds = {FILEEXT2TYPE.get(file.suffix[1:]) for file in files}
    if not files or len(kinds) > 1:
        return f"the folder {shown(path)} must hold files of one type, and nothing else"
    if None in kinds:
        known = ", ".join(f".{kind}" for kind in FILEEXT2TYPE)
        return f"{shown(path)} is of no type that LLaMA-Factory reads: {known}"
    for file in files:
        if kinds == {"text"} and file.read_bytes()[:1] in (b"[", b"{"):
            return f"{shown(file)} is read line by line, being a .txt: call it .json"
        problem = wrong_in_json(file) if kinds == {"json"} else ""
        if problem:
            return f"{shown(file)}{problem}"
    return ""


def wrong_in_json(file: Path) -> str:
    """Why it is neither one JSON list of objects nor an object a line; "" where it is."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        return f" is no UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}"
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as e:
            return f" is not valid JSON: {e}"
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as e:
                whole = "" if number > 1 else ", nor is the file a list [...]"
                return f" is not valid JSON in line {number}{whole}: {e}"
    if not rows:
        return " has no rows"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f": row {number} must be an object {{...}}, it is {type(row).__name__}"
    return ""


def load(path: Path, split: str = "train"):
    """The rows as LLaMA-Factory sees them: datasets.Dataset, a field that a row lacks is None."""
    import datasets
    from llamafactory.extras.constants import FILEEXT2TYPE

    datasets.disable_progress_bars()
    files = sorted(map(str, path.iterdir())) if path.is_dir() else [str(path)]
    kind = FILEEXT2TYPE[Path(files[0]).suffix[1:]]
    try:
        return datasets.load_dataset(kind, data_files=files, split=split)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as e:
        cause = str(e.__cause__ or e).splitlines()[0]
        fail(
            f"{shown(path)}: its rows do not fit each other, a field must have one type in all "
            f"of them: {cause}"
        )


# -----------------------------------------------------------------------------
# Both


def check(name: str, entry: dict, folder: Path, stage: str, most: int = 1):
    """The rows of an entry whose file lies in `folder`, and its DatasetAttr.

    Exit code 2 with one sentence where LLaMA-Factory could not read it, or would drop a row; up to
    `most` wrong rows are printed. None where the rows are in no file: LLaMA-Factory fetches them.
    """
    problem = wrong_in_entry(entry)
    if problem:
        fail(f"the entry {name}{problem}")
    if "file_name" not in entry:
        return None
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
    problems = wrong_rows(rows, attr, stage, folder, most)
    for sentence in problems[:-1]:
        print(sentence)
    if problems:
        here = f"{shown(path)} by the entry {name}: {problems[-1]}"
        fits = fitting(entry["file_name"], first_rows(rows))
        if most > 1 and fits and fits != entry:
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
    path = Path(text)
    if not path.exists():
        file = shown(info or folder / "dataset_info.json")
        fail(f"there is no data set and no file {text}: {file} has {', '.join(known)}")
    beside = info or path.parent / "dataset_info.json"
    if beside.is_file() or info:
        for name, entry in read_info(beside).items():
            if isinstance(entry, dict) and entry.get("file_name") == path.name:
                return name, entry, path.parent
        if info:
            fail(f"no entry of {shown(info)} has file_name {path.name}")
    problem = wrong_in_files(path)
    if problem:
        fail(problem)
    entry = fitting(path.name, first_rows(load(path)))
    if entry is None:
        fail(
            f"{text}: its fields are of no form that is known here; write its entry by hand "
            "(readme of module 06, section 2)"
        )
    return path.stem, entry, path.parent


def first_rows(rows) -> list[dict]:
    """Enough rows to tell their form by."""
    return list(rows.select(range(min(100, len(rows)))))


def write(name: str, entry: dict, folder: Path) -> None:
    """Add the entry to the dataset_info.json of the folder; one that is there stays."""
    file = folder / "dataset_info.json"
    info = read_info(file) if file.is_file() else {}
    if name in info:
        fail(f"{shown(file)} has an entry {name} already: remove it first, or change it there")
    partial = file.with_suffix(".partial")
    content = json.dumps({**info, name: entry}, indent=2, ensure_ascii=False)
    partial.write_text(content + "\n", encoding="utf-8")
    partial.rename(file)
    print(f"written to {shown(file)}: train on it by dataset={name} dataset_dir={shown(folder)}")
