"""What module 06 says of a data set before it trains on it: the right rows and the wrong ones.

Each wrong one is a file that LLaMA-Factory refuses without naming the row, or trains on nothing of.
"""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
CHECK = MODULE / "00_check_data.py"
DATA = MODULE / "data"
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
}
MESSAGES = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
ASKED = {"role": "user", "content": "my parcel is late"}
SAID = {"role": "assistant", "content": "Sorry, let me look."}
SYSTEM = {"role": "system", "content": "You are a support agent."}
ALPACA = {"instruction": "name a lake", "input": "", "output": "Titicaca"}
CONVERSATION = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
CALL = {"role": "function_call", "content": '{"name": "is_free", "arguments": {"port": 1}}'}
LOGGED = {"type": "function", "function": {"name": "is_free", "arguments": '{"port": 1}'}}
TOOLS = {"columns": {"messages": "messages", "tools": "tools"}}
TOOLS |= {"tags": TAGS | {"observation_tag": "tool", "function_tag": "function_call"}}


@pytest.fixture
def entries(monkeypatch):
    monkeypatch.syspath_prepend(MODULE)
    import entries

    return entries


def written(folder, file_name: str, rows) -> None:
    """The rows as a file of the form that its name says; bytes and texts as they are."""
    file = folder / file_name
    if isinstance(rows, str | bytes):
        file.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix in (".csv", ".parquet"):
        import pandas

        table = pandas.DataFrame(rows)
        table.to_csv(file, index=False) if file.suffix == ".csv" else table.to_parquet(file)
    else:
        file.write_text(json.dumps(rows))


def dialogue(*messages) -> list[dict]:
    """A file of two rows, of which the second is these messages."""
    return [{"messages": [ASKED, SAID]}, {"messages": list(messages)}]


def called(**arguments) -> dict:
    """A message of the assistant that calls a tool, the arguments an object."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


SEPARATED = json.dumps({"messages": [ASKED | {"content": "a\u2028b"}, SAID]}, ensure_ascii=False)
RIGHT = {
    "system message, .json": (
        "a.json",
        dialogue(SYSTEM, ASKED, SAID),
        {"tags": TAGS | {"system_tag": "system"}},
    ),
    "openai's formatting": ("a.jsonl", dialogue(ASKED, SAID), {"formatting": "openai"}),
    "ShareGPT's own names": (
        "a.json",
        [{"conversations": CONVERSATION}],
        {"columns": None, "tags": None},
    ),
    "several turns": ("a.jsonl", dialogue(ASKED, SAID, ASKED, SAID), {}),
    ".csv": (
        "a.csv",
        [{"q": "a", "a": "b"}],
        {"formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}, "tags": None},
    ),
    ".parquet": ("a.parquet", [ALPACA], {"formatting": None, "columns": None, "tags": None}),
    "tools": (
        "a.json",
        [{"messages": [ASKED, CALL, {"role": "tool", "content": "{}"}, SAID], "tools": "[]"}],
        TOOLS,
    ),
    "a line separator in a text": ("a.jsonl", SEPARATED.encode(), {}),
    "a BOM before lines": ("a.jsonl", "\ufeff" + SEPARATED, {}),
    "an object over several lines": ("a.json", json.dumps(dialogue(ASKED, SAID)[0], indent=1), {}),
    "a tag's name as a word": ("a.json", dialogue(ASKED | {"content": "a <video> tag?"}, SAID), {}),
    "a column that is null": (
        "a.json",
        dialogue(ASKED, SAID),
        {"columns": {"messages": "messages", "system": None}},
    ),
    "a thought before a call": (
        "a.json",
        [{"messages": [ASKED, CALL | {"content": "<think>hm</think>" + CALL["content"]}]}],
        {"tags": TOOLS["tags"]},
    ),
}

WRONG = {
    "cut JSON": ("a.json", '[{"messages": [', {}, "a.json is not valid JSON in line 1: Expecting"),
    "cut line": (
        "a.jsonl",
        '{"messages": []}\n{"messages"\n',
        {},
        "a.jsonl is not valid JSON in line 2: ",
    ),
    "no rows": ("a.json", "[]", {}, "a.json has no rows"),
    "an object of lists": (
        "a.json",
        {"data": [ALPACA]},
        {},
        "its rows are under `data`: save only that list",
    ),
    "a list of texts": ("a.json", ["hello"], {}, "row 1 must be an object {...}, it is str"),
    "texts and numbers": (
        "a.json",
        dialogue(ASKED, SAID | {"content": 7}),
        {},
        "a.json: row 2: `messages[].content` is a number, in row 1 it is a text",
    ),
    "a text for true": (
        "a.json",
        dialogue(ASKED, SAID),
        {"ranking": "false"},
        "`ranking` must be true or false, it is 'false'",
    ),
    "another encoding": ("a.json", '["你好"]'.encode("gb18030"), {}, "a.json is no UTF-8 text"),
    "JSON in .txt": (
        "a.txt",
        json.dumps([ALPACA]),
        {"formatting": None, "columns": None, "tags": None},
        "call it .json",
    ),
    "no such type": ("a.yaml", "", {}, "a.yaml is of no type that LLaMA-Factory reads"),
    "format": (
        "a.json",
        dialogue(ASKED, SAID),
        {"format": "sharegpt"},
        "ignores `format` without a word; did you mean `formatting`?",
    ),
    "column": (
        "a.json",
        dialogue(ASKED, SAID),
        {"columns": {"message": "messages"}},
        "ignores `message` in `columns` without a word; did you mean `messages`?",
    ),
    "alpaca's columns": (
        "a.json",
        dialogue(ASKED, SAID),
        {"columns": {"prompt": "messages"}},
        "`columns` must name messages; it has prompt",
    ),
    "half of the tags": (
        "a.json",
        dialogue(ASKED, SAID),
        {"tags": {"role_tag": "role"}},
        "`tags` must name content_tag, user_tag, assistant_tag",
    ),
    "ranking": (
        "a.json",
        dialogue(ASKED, SAID),
        {"ranking": True},
        "has `ranking: true`, pairs of answers",
    ),
    "a field that is not there": (
        "a.json",
        dialogue(ASKED, SAID),
        {"columns": {"messages": "messages", "system": "system"}},
        "row 1 has no field `system`, which the entry takes as system; it has `messages`",
    ),
    "unknown role": (
        "a.json",
        dialogue(ASKED, SAID | {"role": "bot"}),
        {},
        "row 2: message 2 is of 'bot': the entry's tags know assistant, user",
    ),
    "system without its tag": (
        "a.json",
        dialogue(SYSTEM, ASKED, SAID),
        {},
        "row 2: message 1 is of 'system': the entry's tags know",
    ),
    "system in the middle": (
        "a.json",
        dialogue(ASKED, SAID, SYSTEM, ASKED, SAID),
        {"tags": TAGS | {"system_tag": "system"}},
        "row 2: message 3 is of 'system': only the first message may be",
    ),
    "twice the user": (
        "a.json",
        dialogue(ASKED, ASKED, SAID),
        {},
        "row 2: message 2 is of 'user', here must be one of assistant",
    ),
    "no answer at the end": (
        "a.json",
        dialogue(ASKED, SAID, ASKED),
        {},
        "row 2: the last message must be of assistant, it is of 'user'",
    ),
    "empty answer": (
        "a.json",
        dialogue(ASKED, SAID | {"content": " "}),
        {},
        "row 2: message 2: field `content` is empty",
    ),
    "no text": (
        "a.json",
        dialogue(ASKED | {"content": None}, SAID),
        {},
        "row 2: message 1: field `content` must be a text, it is None",
    ),
    "no messages": ("a.json", dialogue(), {}, "row 2: field `messages` must be a list of messages"),
    "types that do not fit": (
        "a.json",
        [{"messages": "text"}, {"messages": [ASKED]}],
        {},
        "a.json: row 2: `messages` is a list, in row 1 it is a text",
    ),
    "wrong tags": (
        "a.json",
        [{"messages": CONVERSATION}],
        {},
        "row 1: message 1 has no field `role`, which the entry's tags name; it has `from`, `value`",
    ),
    "empty prompt": (
        "a.json",
        [ALPACA, ALPACA | {"instruction": ""}],
        {"formatting": None, "columns": None, "tags": None},
        "row 2: field `instruction` must be a text that is not empty, it is ''",
    ),
    "alpaca without an answer": (
        "a.json",
        [ALPACA | {"output": None}],
        {"formatting": None, "columns": None, "tags": None},
        "row 1: field `output` must be a text that is not empty, it is None",
    ),
    "a call that is no JSON": (
        "a.json",
        [{"messages": [ASKED, CALL | {"content": "is_free(1)"}], "tools": "[]"}],
        TOOLS,
        "row 1: message 2 must be JSON",
    ),
    "arguments in a text": (
        "a.json",
        [
            {
                "messages": [ASKED, CALL | {"content": '{"name": "f", "arguments": "{}"}'}],
                "tools": "[]",
            }
        ],
        TOOLS,
        "row 1: message 2 has `arguments` in a text, it must be an object",
    ),
    "a call as OpenAI's API logs it": (
        "a.json",
        dialogue(ASKED, {"role": "assistant", "content": None, "tool_calls": [LOGGED]}),
        {"formatting": "openai"},
        "row 2: message 2 has `arguments` in a text, it must be an object",
    ),
    "tools that are no text": (
        "a.json",
        [{"messages": [ASKED, SAID], "tools": [{"name": "f"}]}],
        TOOLS,
        "row 1: field `tools` must be JSON in a text",
    ),
    "no picture": (
        "a.json",
        [{"messages": [ASKED, SAID], "images": ["a.png"]}],
        {"columns": {"messages": "messages", "images": "images"}},
        "row 1: the texts have 0 <image>, field `images` names 1 images",
    ),
    "a picture that is not there": (
        "a.json",
        [{"messages": [{"role": "user", "content": "<image>"}, SAID], "images": ["a.png"]}],
        {"columns": {"messages": "messages", "images": "images"}},
        "row 1: there is no file a.png",
    ),
    "a picture without a path": (
        "a.json",
        [{"messages": [{"role": "user", "content": "<image>"}, SAID], "images": [5]}],
        {"columns": {"messages": "messages", "images": "images"}},
        "row 1: field `images` has 5 where the path of a file belongs",
    ),
    "two sources": ("a.json", dialogue(ASKED, SAID), {"hf_hub_url": "a/b"}, "by one of file_name,"),
    "num_samples": (
        "a.json",
        dialogue(ASKED, SAID),
        {"num_samples": "1"},
        "`num_samples` must be a whole number from 1, it is '1'",
    ),
    "a KTO set in stage sft": (
        "a.json",
        [ALPACA | {"label": True}],
        {
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
            "tags": None,
        },
        "has `kto_tag`, which is for stage kto; this is stage sft",
    ),
    "a history of objects": (
        "a.json",
        [ALPACA | {"history": [{"user": "a", "assistant": "b"}]}],
        {
            "formatting": "alpaca",
            "columns": {"prompt": "instruction", "response": "output", "history": "history"},
            "tags": None,
        },
        "row 1: field `history` must be a list of [question, answer]",
    ),
    "a number as the answer": (
        "a.csv",
        [{"q": "a", "a": 2}],
        {"formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}, "tags": None},
        "row 1: field `a` must be a text that is not empty, it is 2, a int",
    ),
    "arguments that other rows put there": (
        "a.json",
        [{"messages": [ASKED, called(port=1)]}, {"messages": [ASKED, called(city="x")]}],
        {"formatting": "openai", "tags": TAGS | {"function_tag": "function_call"}},
        "row 1: message 2 has null in `arguments`, which other rows' put there",
    ),
    "a tool without properties": (
        "a.json",
        [{"messages": [ASKED, SAID], "tools": '[{"name": "f", "parameters": {}}]'}],
        TOOLS,
        'row 1: field `tools` must have "parameters": {"properties": {...}}',
    ),
    "only a system message": (
        "a.json",
        dialogue(SYSTEM),
        {"tags": TAGS | {"system_tag": "system"}},
        "row 2: there is only a system message",
    ),
    "a message that is a text": (
        "a.json",
        [{"messages": ["hello"]}],
        {},
        "row 1: message 1 must be an object {...}, it is 'hello'",
    ),
}


def entry(file_name: str, changes: dict) -> dict:
    """The entry for messages by role, changed; None takes a key away."""
    changed = {"file_name": file_name, **MESSAGES, **changes}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize("case", RIGHT)
def test_right_rows_are_read(tmp_path, entries, case):
    file_name, rows, changes = RIGHT[case]
    written(tmp_path, file_name, rows)
    loaded, attr = entries.check("mine", entry(file_name, changes), tmp_path, "sft")
    assert len(loaded) == (1 if isinstance(rows, str | bytes) else len(rows))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_named(tmp_path, entries, case, capsys):
    file_name, rows, changes, sentence = WRONG[case]
    written(tmp_path, file_name, rows)
    with pytest.raises(SystemExit) as end:
        entries.check("mine", entry(file_name, changes), tmp_path, "sft")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1


def test_the_keys_are_llamafactorys(entries):
    from dataclasses import fields

    from llamafactory.data.parser import DatasetAttr

    known = {field.name for field in fields(DatasetAttr)}
    ours = {*entries.COLUMNS, *entries.TAGS, *entries.KEYS} - {*entries.SOURCES, "columns", "tags"}
    assert ours == known - {"load_from", "dataset_name"}


@pytest.mark.parametrize("name", ["turns", "tools", "table", "preference", "kto", "picture"])
def test_the_examples_are_right_and_their_entries_are_guessed(tmp_path, entries, name):
    """What `make lf-new-data` would write reads the rows as the committed entry does."""
    import fitting  # beside entries

    known = json.loads((DATA / "dataset_info.json").read_text())[f"example_{name}"]
    stage = entries.usual_stage(known)
    rows, attr = entries.check(name, known, DATA, stage)
    guessed = fitting.fitting(known["file_name"], list(rows))
    _, again = entries.check(name, guessed, DATA, stage)
    from llamafactory.data.converter import get_dataset_converter

    told = SimpleNamespace(media_dir=str(DATA))
    read = get_dataset_converter(attr.formatting, attr, told)
    read_again = get_dataset_converter(again.formatting, again, told)
    assert [read(row) for row in rows] == [read_again(row) for row in rows] != []


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            ALPACA | {"verified": True},
            {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
        ),
        (
            ALPACA | {"label": 0},  # else both answers would be learnt, the good one and the bad
            {
                "columns": {
                    "kto_tag": "label",
                    "prompt": "instruction",
                    "query": "input",
                    "response": "output",
                }
            },
        ),
        ({"instruction": "a", "reply": "b"}, None),
        ({"text": "a"}, {"columns": {"prompt": "text"}}),
        ({"问题": "a", "回答": "b"}, None),
        ({"prompt": "a", "chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, None),
        (
            {"meta": [{"id": 1}], "tools": [{"name": "f"}], "messages": [None, ASKED, SAID]},
            {"formatting": "sharegpt"},
        ),
        (
            {"messages": [ASKED, SAID | {"tool_calls": []}]},
            {"formatting": "sharegpt", "tags": TAGS},
        ),
        (
            {"messages": [ASKED | {"role": "User"}, SAID | {"role": "Assistant"}]},
            {"tags": TAGS | {"user_tag": "User", "assistant_tag": "Assistant"}},
        ),
        (
            {"messages": [ASKED, called(port=1)]},
            {"formatting": "openai", "tags": TAGS | {"function_tag": "function_call"}},
        ),
    ],
)
def test_the_entry_goes_by_the_names_of_the_fields(entries, row, expected):
    import fitting

    guessed = fitting.fitting("a.json", [row])
    if expected is None:
        assert guessed is None
    else:
        assert {key: guessed.get(key) for key in expected} == expected


# -----------------------------------------------------------------------------
# The commands


def test_an_own_file_is_checked_and_its_entry_written(tmp_path):
    """A file of ours with a long row, a repeated one and one that the held-out file has too."""
    long = {"role": "assistant", "content": "Sorry. " * 40}
    mine = [[ASKED, SAID], [ASKED, SAID], [ASKED | {"content": "where is it?"}, long]]
    written(tmp_path, "mine.jsonl", [{"messages": messages} for messages in mine])
    written(tmp_path, "test.json", [{"messages": [ASKED, SAID]}])
    file = tmp_path / "mine.jsonl"
    flags = f"ARGS=--held-out {tmp_path}/test.json --cutoff-len 64 --rows 1"
    out = run("make", "lf-check-data", f"FILE={file}", flags, check=0).stdout
    assert "3 rows, none is wrong" in out
    assert re.search(r"masked +my parcel is late.*\n.*\n +trained +Sorry, let me look\.", out)
    assert "cut: 1 texts are longer, 1 of them lose a part of the answer, 0 all of it" in out
    assert "repeated: 1 of 3 rows" in out
    assert "held out: 1 of 1 prompts" in out
    assert "template chatml: 3 of 3 texts" in out
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["cut_count"] == metrics["repeated_count"] == metrics["leaked_count"] == 1

    assert "dataset=mine" in run("make", "lf-new-data", f"FILE={file}", check=0).stdout
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["mine"]["tags"] == TAGS
    assert "has an entry mine already" in refused("make", "lf-new-data", f"FILE={file}")


def test_every_wrong_row_is_listed_with_an_entry_that_fits(tmp_path):
    written(tmp_path, "mine.json", [{"conversations": CONVERSATION}, {"conversations": []}])
    mine = {"file_name": "mine.json", **MESSAGES, "columns": {"messages": "conversations"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": mine}))
    done = run("make", "lf-check-data", f"FILE={tmp_path}/mine.json", check=2)
    assert "\nrow 1: message 1 has no field `role`" in done.stdout
    assert '"user_tag": "human", "assistant_tag": "gpt"' in done.stdout
    assert "row 2: field `conversations` must be a list of messages" in done.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (
            ["nowhere.json"],
            "there is no data set and no file nowhere.json: modules/06_LLaMA-Factory/data/",
        ),
        (["launch_en_tran"], "; did you mean `launch_en_train`?"),
        (["--info", str(DATA)], "is a folder: name the dataset_info.json in it"),
        (["--training", "templat=chatml"], "no setting templat; did you mean `template`?"),
        (["--cutoff-len", "0"], "--cutoff-len must be at least 1"),
        (["alpaca_zh"], "the rows of alpaca_zh are in no file here"),
        (["launch_en_test", "--held-out", "alpaca_zh"], "the rows of alpaca_zh are in no file"),
        (["launch_en_test", "--stage", "dpo"], "does not have `ranking: true`"),
    ],
)
def test_bad_requests(arguments, reason):
    assert reason in refused("python", CHECK, *arguments)


def test_the_template_that_is_not_the_models_own_is_shown():
    """Tools: LLaMA-Factory's chatml writes them, the small model's own template leaves them out."""
    out = run("python", CHECK, "example_tools", check=0).stdout
    assert "template chatml: 0 of 8 texts" in out
    assert re.search(r"LLaMA-Factory's .*You have access to the following tools", out)
    assert "takes none" in run("python", CHECK, "example_picture", check=0).stdout
