"""Module 06's scoring: what is asked, what is right, how sure a share is, what is refused."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCORE = MODULE / "02_score.py"
# A chat template with tools, as Qwen2.5's writes them
TOOLS = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ "<think></think>\\n" }}
{%- endif %}{% endif %}"""
TOOL = {
    "name": "is_free",
    "description": "Whether a port is free.",
    "parameters": {"type": "object", "properties": {"port": {"type": "integer"}}},
}


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def sentence(capsys) -> str:
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("error: ")]
    return line


# -----------------------------------------------------------------------------
# What is asked


def test_the_last_answer_is_asked_for_given_all_before_it(module06, tokenizer):
    """System message and earlier turns are in the prompt, of ShareGPT's form and of alpaca's."""
    turns = module06.scoring.converted_rows("example_turns", None, 2)
    first, second = module06.scoring.questions(turns, tokenizer, {})
    assert first.prompt.startswith("<|im_start|>system\nAnswer with one line of JSON.<|im_end|>")
    assert '"port": 8888' in first.prompt and first.request.startswith("Port 8888 is taken")
    assert json.loads(first.wanted)["port"] == 8889
    assert first.target == f"{first.wanted}<|im_end|>"
    (table,) = module06.scoring.converted_rows(str(MODULE / "data/example_table.csv"), None, 1)
    (question,) = module06.scoring.questions([table], tokenizer, {})
    assert question.wanted == table["_response"][0]["content"]
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.request}], add_generation_prompt=True, tokenize=False
    )
    assert question.prompt == own


def calls_file(folder: Path) -> Path:
    """A row that ends with a call, in LLaMA-Factory's form, and its entry beside it."""
    call = {"name": "is_free", "arguments": {"port": 8000, "host": "a"}}
    messages = [
        {"role": "user", "content": "Is port 8000 free?"},
        {"role": "function_call", "content": json.dumps(call)},
    ]
    file = folder / "calls.jsonl"
    file.write_text(json.dumps({"messages": messages, "tools": json.dumps([TOOL])}) + "\n")
    entry = json.loads((MODULE / "data/dataset_info.json").read_text())["example_tools"]
    info = {"calls": entry | {"file_name": "calls.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return file


def test_a_call_is_compared_as_json(module06, tokenizer, tmp_path):
    """Tools go to the chat template; blanks and the order of arguments do not count, values do."""
    rows = module06.scoring.converted_rows(str(calls_file(tmp_path)), None, 0)
    tokenizer.chat_template = TOOLS
    (question,) = module06.scoring.questions(rows, tokenizer, {})
    assert "Whether a port is free." in question.prompt and question.is_call
    assert question.target.startswith("<tool_call>") and question.target.endswith("<|im_end|>")
    right = '<tool_call>{"arguments":{"host":"a","port":8000},  "name":"is_free"}</tool_call>'
    assert module06.scoring.is_right(question, right)
    assert module06.scoring.share_of_fields(question, right) == 1
    other = right.replace("8000", "8001")
    assert not module06.scoring.is_right(question, other)
    assert module06.scoring.share_of_fields(question, other) == pytest.approx(2 / 3)
    assert not module06.scoring.is_right(question, right + right)
    assert module06.scoring.share_of_fields(question, "Yes, it is {free}.") == 0


def test_results_of_tools_are_before_the_answer(module06, tokenizer):
    rows = module06.scoring.converted_rows("example_tools", None, 1)
    tokenizer.chat_template = TOOLS
    (question,) = module06.scoring.questions(rows, tokenizer, {})
    assert '"free": true' in question.prompt and "<tool_call>" in question.prompt
    assert not question.is_call
    assert module06.scoring.share_of_fields(question, question.wanted) is None


def test_the_switch_of_thinking_reaches_the_template(module06, tokenizer):
    rows = module06.scoring.converted_rows("launch_en_test", None, 1)
    tokenizer.chat_template = TOOLS
    (plain,) = module06.scoring.questions(rows, tokenizer, {})
    (off,) = module06.scoring.questions(rows, tokenizer, {"enable_thinking": False})
    assert off.prompt == plain.prompt + "<think></think>\n"
    assert module06.scoring.without_thoughts("<think>\nport?\n</think>\n\n8000") == "8000"


@pytest.mark.parametrize(
    "test, reason",
    [
        ("example_preference", "has pairs of answers: scoring compares with one answer"),
        ("example_kto", "has answers that may be wrong ones"),
        ("example_picture", "has pictures or sound"),
        ("no_such_rows", "there is no data set and no file no_such_rows"),
    ],
)
def test_rows_without_an_answer_to_compare(module06, capsys, test, reason):
    with pytest.raises(SystemExit) as end:
        module06.scoring.converted_rows(test, None, 0)
    assert end.value.code == 2 and reason in sentence(capsys)


def test_tools_that_the_template_leaves_out(module06, tokenizer, capsys):
    """SmolLM2's own template: a server would not show them to the model either."""
    rows = module06.scoring.converted_rows("example_tools", None, 1)
    with pytest.raises(SystemExit):
        module06.scoring.questions(rows, tokenizer, {})
    assert "row 1 has tools, and the model's own chat template leaves them out" in sentence(capsys)


# -----------------------------------------------------------------------------
# How sure


def test_intervals(module06):
    """Wilson's, as tables have them; of a loss, wider the more the rows differ."""
    for right, low, high in ((10, 0.7225, 1), (0, 0, 0.2775), (5, 0.2366, 0.7634)):
        assert module06.scoring.wilson(right / 10, 10) == pytest.approx((low, high), abs=1e-4)
    alike = module06.scoring.mean_loss([(2.0, 10), (4.0, 20)])
    assert alike == pytest.approx((0.2, 0.2, 0.2))
    mean, low, high = module06.scoring.mean_loss([(1.0, 10), (5.0, 10)])
    assert mean == 0.3 and low == 0 and high == pytest.approx(0.3 + 1.96 * 0.2)


def test_the_loss_is_the_models_own(tiny_model, tokenizer, module06):
    """Of the answer's tokens alone, as transformers computes it from labels."""
    import torch
    from transformers import AutoModelForCausalLM

    loss_of = runpy.run_path(str(SCORE), run_name="imported")["loss_of"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    prompt, target = "<|im_start|>user\nPort?<|im_end|>\n", "8000, of course<|im_end|>"
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, target))
    labels = torch.tensor([[-100] * len(before) + after])
    ids = torch.tensor([before + after])
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=labels).loss.item()
        loss, count = loss_of(model, tokenizer, prompt, target)
    assert count == len(after) and loss / count == pytest.approx(expected, rel=1e-5)


# -----------------------------------------------------------------------------
# What has been trained


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """What a full fine-tuning leaves: a model folder, and the settings of the training."""
    folder = tmp_path_factory.mktemp("full") / "model"
    shutil.copytree(tiny_model, folder)
    settings = f"finetuning_type: full\nmodel_name_or_path: {tiny_model}\nenable_thinking: false\n"
    (folder / "config.yaml").write_text(settings)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """An adapter that PEFT has made of the tiny model, untrained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(folder)
    (folder / "config.yaml").write_text(f"model_name_or_path: {tiny_model}\n")
    return folder


def test_what_a_folder_holds(module06, tiny_model, adapter, whole, small_model, capsys):
    """An adapter, a whole model with its base, a merged one, whose base nobody has written down."""
    trained = module06.factory.trained
    assert trained(str(adapter)) == (adapter, Path(tiny_model), True, {})
    assert trained(str(whole)) == (whole, Path(tiny_model), False, {"enable_thinking": False})
    assert trained(str(tiny_model)) == (Path(tiny_model), None, False, {})
    assert trained(str(adapter), str(tiny_model)).base == Path(tiny_model)
    with pytest.raises(SystemExit):
        trained(str(adapter), str(small_model))
    assert f"was trained on {tiny_model}, and --model names {small_model}" in sentence(capsys)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 32, "intermediate_size": 64}, {"num_hidden_layers": 1}]
)
def test_an_adapter_of_another_model(module06, adapter, tiny_model, capsys, change):
    """Other shapes, or a layer less, of which PEFT itself says nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, **change))
    with pytest.raises(SystemExit) as end:
        module06.scoring.put_on(base, adapter)
    assert end.value.code == 2 and "does not fit its model: " in sentence(capsys)


def test_a_whole_model_is_scored_against_its_base(module06, whole, monkeypatch, tmp_path, capsys):
    """Here a copy: the same answers, losses and fields, all of which are kept."""
    main = runpy.run_path(str(SCORE), run_name="imported")["main"]
    metrics = []
    finish = SimpleNamespace(finish=lambda _, numbers, *__: metrics.append(numbers))
    monkeypatch.setitem(main.__globals__, "results", finish)
    file = tmp_path / "answers.json"
    flags = ["--adapter", str(whole), "--limit", "2", "--answers", str(file)]
    monkeypatch.setattr(sys, "argv", [str(SCORE), *flags, "--test", "example_turns"])
    main()
    (score,) = metrics
    for name, value in score.items():
        if name.startswith("base_") and name != "base_s":
            assert score[name.replace("base_", "tuned_")] == value, name
    assert score["kept_count"] == 4 and score["row_count"] == 2
    answers = json.loads(file.read_text())
    assert [row["base_tokens"] for row in answers] == [row["tuned_tokens"] for row in answers]
    out = capsys.readouterr().out
    assert "fields, %" in out and "few rows" in out and "forgetting: loss of a text" in out
    assert re.search(r"4 of 4 general questions are answered as before", out)


def test_a_full_disk_keeps_the_answers_before(module06, tmp_path, capsys):
    file = tmp_path / "answers.json"
    module06.scoring.save(file, [{"tuned": "8000"}])
    (tmp_path / "answers.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        module06.scoring.save(file, [{"tuned": "8001"}] * 2000)
    assert end.value.code == 2 and "No space left on device" in sentence(capsys)
    assert json.loads(file.read_text()) == [{"tuned": "8000"}]
