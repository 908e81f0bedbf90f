"""The file of a data set: why LLaMA-Factory could not read it, and its rows as it sees them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lab import fail, shown


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
    return read_json(file)[1]


def read_json(file: Path) -> tuple[list, str]:
    """(the rows, how a sentence goes on that begins with the file's name, "" where all is well)."""
    rows = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        return rows, f" is no UTF-8 text: byte {e.start} is {e.object[e.start]:#04x}"
    marked = text.startswith("\ufeff")
    text = text.removeprefix("\ufeff")
    blank = re.compile(r"\s*")
    decoder = json.JSONDecoder()
    place = blank.match(text).end()
    while place < len(text):
        try:
            row, end = decoder.raw_decode(text, place)
        except ValueError as e:
            line = text.count("\n", 0, place if rows else e.pos) + 1
            return rows, f" is not valid JSON in line {line}: {e.msg}"
        rows.append(row)
        place = blank.match(text, end).end()
    if len(rows) == 1 and isinstance(rows[0], list):
        if marked:
            return rows, " begins with a byte order mark (BOM): save it without one"
        rows = rows[0]
    if not rows:
        return rows, " has no rows"
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            return rows, f": row {number} must be an object {{...}}, it is {type(row).__name__}"
    for name in ("data", "rows", "train", "examples") if len(rows) == 1 else ():
        if isinstance(rows[0].get(name), list):
            return rows, f": its rows are under `{name}`: save only that list"
    return rows, ""


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
        other = mixed(read_json(files[0])[0]) if kind == "json" else ""
        if other:
            fail(f"{shown(files[0])}: {other}")
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        fail(
            f"{shown(path)} cannot be read as a table, every field of one type in all rows: "
            f"{' '.join(lines[:2])[:300]}"
        )


def mixed(rows: list[dict]) -> str:
    """Which field is of another type than in an earlier row; "" where none is."""
    first = {}
    for number, row in enumerate(rows, 1):
        for place, kind in types(row):
            before, earlier = first.setdefault(place, (number, kind))
            if kind != earlier:
                return f"row {number}: `{place}` is {kind}, in row {before} it is {earlier}"
    return ""


def types(value, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, type) of everything in a row that is not null: `messages[].content`, "a text"."""
    if isinstance(value, dict):
        if place:
            yield place, "an object"
        for name, inner in value.items():
            yield from types(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        yield place, "a list"
        for inner in value:
            yield from types(inner, f"{place}[]")
    elif value is not None:
        names = {str: "a text", bool: "true or false"}
        yield place, names.get(type(value), "a number")
