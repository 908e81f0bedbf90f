"""Module 06 and models that think first: where an empty thought goes, and who is told of it.

The tokenizer is the small model's with Qwen's splitting of texts and Qwen3's two tokens.
"""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, python
from safetensors.numpy import save_file
from small_models import vision_model

from lab import models

MODULE = ROOT / "modules/06_LLaMA-Factory"
CHECK = MODULE / "00_check_data.py"
TRAIN = MODULE / "01_train.py"
# Qwen3's published chat template, without its branches for tools
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query_index = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
# Of later models (Qwen3-Thinking-2507, Qwen3.5): the prompt itself opens the thought
OPENED = QWEN3.replace("</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}", "BOTH").replace(
    "BOTH",
    "</think>\\n\\n' }}\n    {%- else %}{{- '<think>\\n' }}\n    {%- endif %}\n{%- endif %}",
)
ASKED = "<|im_start|>user\nWhich port?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
SAID = "8000<|im_end|>\n"
THOUGHT = "<think>\nthe usual\n</think>\n\n"
QUESTION = {"role": "user", "content": "Which port?"}
PLAIN = [QUESTION, {"role": "assistant", "content": "8000"}]
THINKING = [QUESTION, {"role": "assistant", "content": f"{THOUGHT}8000"}]
SHORT = ["max_samples=8", "plot_loss=false", "save_steps=100"]
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def thinker(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with Qwen3's chat template and its two tokens of thoughts."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(thinker):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(thinker)


@pytest.fixture
def made():
    """made(tokenizer, name, thinks): LLaMA-Factory's template; those of its table as they were."""
    import copy

    from llamafactory.data import template
    from llamafactory.hparams import DataArguments

    before = {name: copy.copy(made) for name, made in template.TEMPLATES.items()}

    def make(tokenizer, name: str | None, thinks: bool | None = True):
        told = DataArguments(template=name, enable_thinking=thinks)
        return template.get_template_and_fix_tokenizer(tokenizer, told)

    yield make
    template.TEMPLATES.update(before)


def encoded(template, tokenizer, messages: list[dict]) -> tuple[str, str, list[int]]:
    """(masked, counted in the loss) of the row as texts, and its token ids."""
    ((prompt, answer),) = template.encode_multiturn(tokenizer, messages)
    return tokenizer.decode(prompt), tokenizer.decode(answer), prompt + answer


def own_prompt(tokenizer, messages: list[dict], **switches) -> str:
    """What a server makes of the request."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **switches
    )


def own_ids(module06, tokenizer, messages: list[dict], switches: dict) -> list[int]:
    row = {"_system": "", "_tools": "", "_prompt": messages[:-1]}
    return module06.views.own_tokens(tokenizer, row, messages[-1], switches)


# -----------------------------------------------------------------------------
# Where the empty thought goes


@pytest.mark.parametrize(
    "name, thinks, masked, counted",
    [
        ("qwen3", True, ASKED, EMPTY + SAID),
        ("qwen3", False, ASKED + EMPTY, SAID),
        ("qwen3", None, ASKED + EMPTY, SAID),
        ("qwen3_nothink", True, ASKED, SAID),
        ("qwen3_nothink", False, ASKED, SAID),
        (None, True, ASKED, EMPTY + SAID),
        (None, False, ASKED + EMPTY, SAID),
    ],
)
def test_a_row_without_thoughts(made, module06, tokenizer, name, thinks, masked, counted):
    """The text that is masked is what a server makes of the request; `_nothink` is not the whole
    of what the model's own template says.
    """
    template = made(tokenizer, name, thinks)
    assert encoded(template, tokenizer, PLAIN)[:2] == (masked, counted)
    switches = module06.factory.template_switches({"enable_thinking": thinks})
    own = own_ids(module06, tokenizer, PLAIN, switches)
    same = module06.views.same_tokens(encoded(template, tokenizer, PLAIN)[2], own, tokenizer)
    assert same == (name != "qwen3_nothink")
    if same:
        assert own_prompt(tokenizer, PLAIN[:1], **switches) == masked
    assert own_prompt(tokenizer, PLAIN[:1]) == ASKED


@pytest.mark.parametrize(
    "name, thinks, masked, counted",
    [
        ("qwen3", True, ASKED, THOUGHT + SAID),
        ("qwen3", None, ASKED, THOUGHT + SAID),
        ("qwen3", False, ASKED + EMPTY, SAID),
        ("qwen3_nothink", False, ASKED, THOUGHT + SAID),
    ],
)
def test_a_row_with_thoughts(made, tokenizer, name, thinks, masked, counted):
    """false takes them away, null keeps them: for data of both kinds."""
    template = made(tokenizer, name, thinks)
    assert encoded(template, tokenizer, THINKING)[:2] == (masked, counted)


def test_several_turns(made, module06, tokenizer):
    """The model's own template has the empty thought before the last answer only; LLaMA-Factory
    before each, unless only the last is learnt (mask_history).
    """
    template = made(tokenizer, "qwen3", False)
    pairs = template.encode_multiturn(tokenizer, PLAIN * 2)
    assert [tokenizer.decode(prompt) for prompt, _ in pairs] == [ASKED + EMPTY] * 2
    own = own_ids(module06, tokenizer, PLAIN * 2, OFF)
    assert tokenizer.decode(own).count(EMPTY) == 1
    assert [token for pair in pairs for part in pair for token in part] != own
    last = template.encode_multiturn(tokenizer, PLAIN * 2, discarding_history_cot=True)
    assert [token for pair in last for part in pair for token in part] == own


def test_a_prompt_that_opens_the_thought(made, module06, tokenizer, monkeypatch):
    """Derived, the answer is learnt as a thought; by name and false, all is as a server has it."""
    monkeypatch.setattr(tokenizer, "chat_template", OPENED)
    assert own_prompt(tokenizer, PLAIN[:1]) == ASKED + "<think>\n"
    derived = made(tokenizer, None)
    assert encoded(derived, tokenizer, PLAIN)[:2] == (ASKED + "<think>\n", SAID)
    for thinks, right in ((True, False), (False, True)):
        ids = encoded(made(tokenizer, "qwen3_5", thinks), tokenizer, PLAIN)[2]
        switches = module06.factory.template_switches({"enable_thinking": thinks})
        assert (ids == own_ids(module06, tokenizer, PLAIN, switches)) == right


def test_the_catalogue_knows_which_model_thinks():
    """Each template is one of LLaMA-Factory's; it reasons where vLLM gets a parser of reasoning."""
    from llamafactory.data.template import TEMPLATES, ReasoningTemplate

    chats = {name: model["template"] for name, model in models.catalogue().items()}
    for name, template in chats.items():
        if template is not None:
            reasons = isinstance(TEMPLATES[template], ReasoningTemplate)
            assert reasons == ("reasoning-parser" in models.parsers(name)), name
    assert chats["qwen3-8b"] == "qwen3" and chats["qwen3-vl-8b-instruct"] == "qwen3_vl_nothink"


# -----------------------------------------------------------------------------
# Who is told: the check, scoring, chat, API, the merged model, vLLM


@pytest.mark.parametrize("thinks", ["true", "false", "null"])
def test_chat_and_api_ask_as_scoring_and_the_server_do(
    module06, made, tokenizer, thinker, tmp_path, thinks
):
    """Their engine encodes the request with an empty answer and takes the prompt of it."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(thinker)})
    )
    save_file({}, tmp_path / "adapter_model.safetensors")
    text = f"model_name_or_path: {thinker}\ntemplate: qwen3\nenable_thinking: {thinks}\n"
    (tmp_path / "config.yaml").write_text(text)
    done = module06.factory.trained(str(tmp_path))
    settings = module06.factory.settings_for(MODULE / "configs/infer.yaml", done, "float32")
    assert "enable_thinking" in settings
    assert settings.enable_thinking == {"true": True, "false": False, "null": None}[thinks]
    switches = done.switches
    template = made(tokenizer, settings.template, settings.enable_thinking)
    answer = {"role": "assistant", "content": ""}
    prompt, _ = template.encode_oneturn(tokenizer, [QUESTION, answer])
    asked = own_prompt(tokenizer, [QUESTION], **switches)
    assert tokenizer.decode(prompt) == asked == ASKED + EMPTY * (thinks != "true")
    row = {"_system": "", "_tools": "", "_prompt": [QUESTION], "_response": [THINKING[1]]}
    (question,) = module06.scoring.questions([row], tokenizer, switches)
    assert (question.prompt, question.wanted) == (asked, "8000")
    assert question.target == THOUGHT * (thinks == "true") + SAID.strip()


@pytest.mark.parametrize(
    "settings, differing, says",
    [
        ("template=qwen3", 0, "that counts in the loss: the model learns not to think"),
        ("template=qwen3 enable_thinking=false", 0, "is masked: ask for answers with enable_thi"),
        ("template=qwen3_nothink", 2, "'<|im_start|>assistant\\n<think>"),
        ("template=null enable_thinking=null", 0, "2 of 2 answers have no thoughts"),
    ],
)
def test_the_check_is_told_what_the_training_is_told(
    module06, made, thinker, tmp_path, monkeypatch, capsys, settings, differing, says
):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": f"Port {n}?", "output": "8000"} for n in (1, 2)]))
    main = runpy.run_path(str(CHECK), run_name="imported")["main"]
    metrics = []
    finish = SimpleNamespace(finish=lambda _, numbers, *__: metrics.append(numbers))
    monkeypatch.setitem(main.__globals__, "results", finish)
    flags = [str(file), "--model", str(thinker), "--training", *settings.split()]
    monkeypatch.setattr(sys, "argv", [str(CHECK), *flags])
    main()
    assert metrics[0]["template_differs_count"] == differing
    assert says in capsys.readouterr().out


def test_a_template_that_does_not_exist(module06, thinker, monkeypatch, capsys):
    main = runpy.run_path(str(CHECK), run_name="imported")["main"]
    flags = ["--model", str(thinker), "--training", "template=qwen33"]
    monkeypatch.setattr(sys, "argv", [str(CHECK), *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "error: LLaMA-Factory has no template qwen33" in capsys.readouterr().err


def test_a_call_with_thoughts_is_a_call(module06):
    call = '<think>\nhm\n</think>\n\n{"name": "is_free", "arguments": {"port": 1}}'
    row = {"_system": "", "_prompt": [QUESTION]}
    *_, message = module06.views.as_chat(row, {"role": "function", "content": call})
    assert message["tool_calls"][0]["function"]["name"] == "is_free"
    assert message["content"] == "<think>\nhm\n</think>"


# -----------------------------------------------------------------------------
# LLaMA-Factory's own trainings


@pytest.fixture(scope="module")
def trainings(thinker, small_model, tmp_path_factory) -> dict[str, SimpleNamespace]:
    """{thoughts, pictures}: settings as 01_train.py prints them, what LLaMA-Factory says to them,
    and the folder it writes to.
    """
    folder = tmp_path_factory.mktemp("trainings")
    picturing = vision_model(folder / "pictures-model", small_model)
    of_pictures = ["template=qwen2_vl", "dataset=example_picture", "num_train_epochs=8"]
    commands = {
        "thoughts": [thinker, "template=qwen3", "enable_thinking=false", "max_steps=1"],
        "pictures": [picturing, *of_pictures, "learning_rate=0.02", "logging_steps=1"],
    }
    files = []
    for name, (model, *settings) in commands.items():
        output = f"output_dir={folder / name}"
        flags = ["--dry-run", "--model", model, *settings, *SHORT, output]
        out = python(TRAIN, *flags, check=0).stdout
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(out.rpartition("\n\n")[0])
    python(ROOT / "tests/programs/llamafactory_trainings.py", *files, check=0)
    return {
        file.stem: SimpleNamespace(
            settings=file.read_text(),
            said=file.with_suffix(".log").read_text(),
            folder=folder / file.stem / "unfinished",
        )
        for file in files
    }


def test_training_and_merging_carry_the_switch(module06, trainings, tmp_path, monkeypatch, capsys):
    """The engine itself masks the empty thought; the merged folder knows of it, and what vLLM
    must be told is printed.
    """
    from llamafactory.train.tuner import export_model

    training = trainings["thoughts"]
    inputs, labels = training.said.split("inputs:")[1].split("labels:")
    assert f"<|im_start|>assistant\n{EMPTY}{{" in inputs
    assert "think>" not in labels and '{"model"' in labels
    adapter, merged = training.folder.parent, tmp_path / "merged"
    (training.folder / module06.unfinished.RUN).write_text("{}")
    module06.unfinished.finish(adapter, training.settings)
    main = runpy.run_path(str(MODULE / "03_merge.py"), run_name="imported")["main"]
    config = module06.factory.FOLDER / "merge.yaml"
    monkeypatch.setattr(
        module06.factory, "run", lambda *_: export_model(yaml.safe_load(config.read_text()))
    )
    monkeypatch.setattr(sys, "argv", ["", "--adapter", str(adapter), "--output", str(merged)])
    monkeypatch.setitem(main.__globals__, "results", SimpleNamespace(finish=lambda *_: None))
    main()
    out = capsys.readouterr().out
    assert 'ARGS="--default-chat-template-kwargs.enable_thinking=false"' in out
    assert module06.factory.trained(str(merged)) == (merged, None, False, OFF)
    kept = yaml.safe_load((merged / "config.yaml").read_text())
    assert kept == {"template": "qwen3", "enable_thinking": False}
    source = MODULE / "configs/infer.yaml"
    done = module06.factory.trained(str(merged))
    assert module06.factory.settings_for(source, done, "float32").template == "qwen3"
    assert (merged / "chat_template.jinja").read_text() == QWEN3


def test_the_readers_example_goes_on_after_a_thought(module06, capsys):
    """What the training shows of the engine's log: the empty lines of a thought end nothing."""
    log = f"inputs:\n{ASKED}{EMPTY}{SAID}label_ids:\n[1, 2]\nlabels:\n{SAID}\nmore\n"
    module06.factory.show(log.splitlines(keepends=True), SimpleNamespace(write=len))
    out = capsys.readouterr().out
    assert out.count("8000<|im_end|>") == 2 and "label_ids" not in out and "more" not in out


def test_pictures_train_the_language_layers_only(trainings):
    """A LoRA of Qwen2.5-VL's kind on drawn pictures: its tower and its merger have no adapter."""
    from safetensors import safe_open

    training = trainings["pictures"]
    inputs = training.said.split("inputs:")[1].split("label_ids:")[0]
    assert re.search(r"<\|vision_start\|>(<\|image_pad\|>)+<\|vision_end\|>What is drawn", inputs)
    steps = (training.folder / "trainer_log.jsonl").read_text().splitlines()
    losses = [step["loss"] for step in map(json.loads, steps) if "loss" in step]
    assert losses[-1] < losses[0] - 1
    with safe_open(training.folder / "adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
        learnt = [name for name in names if stored.get_tensor(name).abs().sum() > 0]
    assert names == learnt and all(".language_model.layers." in name for name in names)
    assert len(names) == 2 * 2 * 7  # A and B, of two layers' seven matrices
