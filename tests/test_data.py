"""The data set: always the same, held out for real, and refused in one sentence where a row is
broken.
"""

import json
import re

import pytest
from conftest import python, refused

from lab import data

NAMES = ["launch_en_train", "launch_en_test", "launch_zh_train", "launch_zh_test"]


def test_files_are_what_the_script_writes():
    """`make data` has nothing to write."""
    assert "differ: none" in python("scripts/make_data.py", "--check", check=0).stdout


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_held_out_split_is_held_out(language):
    """No combination of values and no phrasing of the test split occurs in training; a phrasing is
    what is left without the values.
    """
    seen = {}
    for split in ("train", "test"):
        answers, phrasings = set(), set()
        for row in data.rows(f"launch_{language}_{split}"):
            request, answer = (message["content"] for message in row["messages"])
            values = json.loads(answer)
            assert list(values) == [
                "model",
                "gpus",
                "port",
                "max_len",
                "dtype",
            ] and answer == json.dumps(values)
            text = request
            for field, value in sorted(values.items(), key=lambda item: -len(str(item[1]))):
                assert str(value) in request, f"{field} is not in: {request}"
                text = re.sub(rf"(?<![\w.-]){re.escape(str(value))}(?![\w-]|\.\d)", "_", text)
            answers.add(answer)
            phrasings.add(text)
        assert len(answers) == len(data.rows(f"launch_{language}_{split}")), (
            "a combination occurs twice"
        )
        seen[split] = answers, phrasings
    assert not seen["train"][0] & seen["test"][0]
    assert not seen["train"][1] & seen["test"][1]
    assert 3 <= len(seen["test"][1]) < len(seen["train"][1]) < 20, (
        "the values were not taken out of the phrasings"
    )


@pytest.mark.parametrize(
    "content, words",
    [
        ('[{"messages": [', "not valid JSON at line 1"),
        ("[]", "not an empty one"),
        (
            '[{"messages": [{"role": "user", "content": "a"}]}, {"text": "b"}]',
            "row 2 has no list `messages`",
        ),
        (
            '[{"messages": [{"role": "system", "content": "a"}]}]',
            "row 1: field `role` must be user",
        ),
        (
            '[{"messages": [{"role": "user", "content": "a"}, '
            '{"role": "assistant", "content": 3}]}]',
            "row 1: field `content` of the assistant",
        ),
    ],
)
def test_broken_rows(tmp_path, content, words):
    (tmp_path / "broken.json").write_text(content)
    assert words in refused(
        "python",
        "-c",
        "import sys; from lab import data; data.rows(sys.argv[1])",
        tmp_path / "broken.json",
    )


def test_missing_data_set():
    assert "launch_en_train" in refused("python", "-c", "from lab import data; data.rows('alpaca')")


def test_blocks(small_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    blocks = data.blocks(tokenizer, "launch_en_test", 64)
    assert blocks.shape[1] == 64 and len(blocks) > 50
    assert data.rows("launch_en_test")[0]["messages"][0]["content"] in tokenizer.decode(
        blocks[:2].flatten()
    )
