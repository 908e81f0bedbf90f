"""The data set: always the same, held out for real, refused in one sentence where it is broken."""

import json
import re

import pytest
from conftest import python

from lab import data

FIELDS = ["model", "gpus", "port", "max_len", "dtype"]


def test_files_are_what_the_script_writes():
    """`make data` has nothing to write."""
    assert "differ: none" in python("scripts/make_data.py", "--check", check=0).stdout


def phrasing(request: str, values: dict) -> str:
    """What is left of a request without its values, each of which must be in it."""
    texts = sorted(map(str, values.values()), key=len, reverse=True)
    left = request
    for text in texts:
        assert text in request, f"{text} is not in: {request}"
        left = re.sub(rf"(?<![\w.-]){re.escape(text)}(?![\w-]|\.\d)", "_", left)
    return left


def split(name: str) -> tuple[set[str], set[str]]:
    """The answers and the phrasings of a data set, no answer of which occurs twice."""
    answers = set()
    phrasings = set()
    rows = data.rows(name)
    for row in rows:
        request, answer = (message["content"] for message in row["messages"])
        values = json.loads(answer)
        assert list(values) == FIELDS
        assert answer == json.dumps(values)
        answers.add(answer)
        phrasings.add(phrasing(request, values))
    assert len(answers) == len(rows), "a combination occurs twice"
    return answers, phrasings


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_held_out_split_is_held_out(language):
    """No combination of values and no phrasing of the test split occurs in training."""
    trained_answers, trained_phrasings = split(f"launch_{language}_train")
    answers, phrasings = split(f"launch_{language}_test")
    assert not trained_answers & answers
    assert not trained_phrasings & phrasings
    # Were the values not taken out, there would be as many phrasings as rows.
    assert 3 <= len(phrasings) < len(trained_phrasings) < 20


def test_pairs_and_judged_answers_are_right_and_wrong():
    """launch_en_pairs: one answer is launch_en_varied's, the other is not; judged: one of them."""
    right = {
        row["messages"][0]["content"]: row["messages"][1] for row in data.rows("launch_en_varied")
    }
    pairs = data.pairs("launch_en_pairs")
    for pair in pairs:
        assert pair["chosen"] == right[pair["messages"][0]["content"]]
        assert pair["rejected"]["content"] != pair["chosen"]["content"]
    lengths = {len(pair["rejected"]["content"]) - len(pair["chosen"]["content"]) for pair in pairs}
    assert min(lengths) < -10  # a field is missing
    assert max(lengths) > 20  # a polite sentence
    for answer, pair in zip(data.pairs("launch_en_judged"), pairs, strict=True):
        is_right = answer["output"] == pair["chosen"]["content"]
        assert answer["label"] == is_right


def test_varied_rows_have_their_fields_in_many_orders():
    """launch_en_varied: the answers of launch_en_train, half of its requests, none of the test."""
    whole = data.rows("launch_en_train")
    varied = data.rows("launch_en_varied")
    assert varied[::2] == whole[::2]
    answers, phrasings = split("launch_en_varied")
    assert answers == split("launch_en_train")[0]
    assert not phrasings & split("launch_en_test")[1]
    orders = set()
    for row in varied[1::2]:
        request, answer = (message["content"] for message in row["messages"])
        values = json.loads(answer)
        texts = [str(values[name]) for name in ("model", "max_len", "dtype")]
        texts += ["port ", " GPUs" if "GPU" in request else " cards"]
        places = [request.index(text) for text in texts]
        orders.add(tuple(sorted(range(5), key=places.__getitem__)))
    assert len(orders) > 60  # of 120


USER = {"role": "user", "content": "a"}
BROKEN = {
    '[{"messages": [': "not valid JSON at line 1",
    "[]": "not an empty one",
    json.dumps([{"messages": [USER]}, {"text": "b"}]): "row 2 has no list `messages`",
    json.dumps([{"messages": [USER | {"role": "system"}]}]): "row 1: field `role` must be user",
    json.dumps([{"messages": [USER, {"role": "assistant", "content": 3}]}]): (
        "row 1: field `content` of the assistant"
    ),
}


def refusal(name: str, capsys) -> str:
    """The one sentence with which the data set is refused, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        data.rows(name)
    sentences = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(sentences) == 1
    return sentences[0]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_rows(content, tmp_path, capsys):
    file = tmp_path / "broken.json"
    file.write_text(content)
    assert BROKEN[content] in refusal(str(file), capsys)


def test_missing_data_set(capsys):
    assert "launch_en_train" in refusal("alpaca", capsys)


def test_blocks(small_model):
    """The texts one after another, cut into blocks of equal length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    blocks = data.blocks(tokenizer, "launch_en_test", 64)
    assert blocks.shape[1] == 64
    assert len(blocks) > 50
    first_request = data.rows("launch_en_test")[0]["messages"][0]["content"]
    assert first_request in tokenizer.decode(blocks[:2].flatten())
