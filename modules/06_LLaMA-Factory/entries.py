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
    if not isinstance(entry.get("num_samples"), int | None):
        return f": `num_samples` must be a whole number, it is {entry['num_samples']!r}"
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
# The file


def files_of(path: Path) -> list[Path]:
    """The file, or those of the folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def wrong_in_files(path: Path) -> str:
    """What is wrong with the file, or with the folder of files; "" where it can be read."""
    from llamafactory.extras.constants import FILEEXT2TYPE

    if not path.exists():
        return f"there is no file {shown(path)}"
    files = files_of(path)
    kinds = {FILEEXT2TYPE.get(file.suffix[1:]) for file in files}
    if not files or len(kinds) > 1:
        names = ", ".join(file.name for file in files[:5]) or "nothing"
        return f"the folder {shown(path)} must hold files of one type, it holds {names}"
    if None in kinds:
        known = ", ".join(f".{kind}" for kind in FILEEXT2TYPE)
        return f"{shown(path)} is of no type that LLaMA-Factory reads: {known}"
    for file in files:
        if kinds == {"text"} and not wrong_in_json(file):
            return f"{shown(file)} holds JSON, and a .txt is read line by line: call it .json"
        problem = wrong_in_json(file) if kinds == {"json"} else ""
        if problem:
            return f"{shown(file)}{problem}"
    return ""


def wrong_in_json(file: Path) -> str:
    """Why it is neither one JSON list of objects nor objects after each other; "" where it is."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        return f" is no UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}"
    marked = text.startswith("\ufeff")
    text = text.removeprefix("\ufeff")
    rows = []
    blank = re.compile(r"\s*")
    decoder = json.JSONDecoder()
    place = blank.match(text).end()
    while place < len(text):
        try:
            row, end = decoder.raw_decode(text, place)
        except ValueError as e:
            line = text.count("\n", 0, place if rows else e.pos) + 1
            return f" is not valid JSON in line {line}: {e.msg}"
        rows.append(row)
        place = blank.match(text, end).end()
    if len(rows) == 1 and isinstance(rows[0], list):
        if marked:
            return " begins with a byte order mark (BOM): save it without one"
        rows = rows[0]
    if not rows:
        return " has no rows"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return f": row {number} must be an object {{...}}, it is {type(row).__name__}"
    for name in ("data", "rows", "train", "examples") if len(rows) == 1 else ():
        if isinstance(rows[0].get(name), list):
            return f": its rows are under `{name}`: save only that list"
    return ""


def load(path: Path, split: str | None):
    """The rows as LLaMA-Factory sees them: datasets.Dataset, a field that a row lacks is None."""
    import datasets
    from llamafactory.extras.constants import FILEEXT2TYPE

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the sentence below is enough
    files = files_of(path)
    kind = FILEEXT2TYPE[files[0].suffix[1:]]
    try:
        return datasets.load_dataset(kind, data_files=list(map(str, files)), split=split or "train")
    except Exception as e:  # of datasets, pyarrow and pandas
        cause = e
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        fail(
            f"{shown(path)} cannot be read as a table, every field of one type in all rows: "
            f"{' '.join(lines[:2])[:300]}"
        )


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
        fail(f"there is no data set and no file {text}: {file} has {', '.join(known)}")
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
    if entry is None:
        fail(
            f"{text}: its fields ({', '.join(rows.column_names)}) do not tell which is the prompt "
            "and which the answer: write its entry by hand (your_data.md of module 06, section 2)"
        )
    name = re.sub(r"[\s,]+", "_", path.stem)  # a name with a comma would be two
    return name, entry, path.parent


def write(name: str, entry: dict, folder: Path) -> None:
    """Add the entry to the dataset_info.json of the folder; one that is there stays."""
    file = folder / "dataset_info.json"
    info = read_info(file) if file.is_file() else {}
    if name in info:
        fail(f"{shown(file)} has an entry {name} already: remove it first, or change it there")
    partial = file.with_suffix(".partial")
    content = json.dumps({**info, name: entry}, indent=2, ensure_ascii=False)
    try:
        partial.write_text(content + "\n", encoding="utf-8")
        partial.rename(file)
    except OSError as e:
        fail(f"cannot write {shown(file)}: {e.strerror}")
    settings = shlex.join([f"dataset={name}", f"dataset_dir={shown(folder)}"])
    print(f"written to {shown(file)}: train on it by {settings}")
