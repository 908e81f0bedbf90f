"""Fine-tuning by LLaMA-Factory: templates, training, scoring, merging, serving, refusals.

All with one short training of a tiny model: what a reader's own training teaches the real one is
judged in test_claims.py, by the score that `make quickstart` has measured.
"""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, PATIENCE, ROOT, python, refused, run

from lab import RUNS, data, jobs

MODULE = ROOT / "modules/06_LLaMA-Factory"
TRAIN = MODULE / "01_train.py"
SCORE = MODULE / "02_score.py"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Qwen2.5-Instruct's published chat template, without its branches for tools.
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nQWEN_SYSTEM<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant"
           or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".replace("QWEN_SYSTEM", QWEN_SYSTEM)
NO_SYSTEM = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
NOT_CHATML = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
CONVERSATION = [
    {"role": "user", "content": "Serve yi-34b on 2 GPUs."},
    {"role": "assistant", "content": '{"model": "yi-34b"}'},
    {"role": "user", "content": "用中文回答：端口？"},
    {"role": "assistant", "content": "8000"},
]


def result(done) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def ours() -> list[str]:
    return [name for name in jobs.running() if name.startswith("lf-")]


# Of a training that a model without content feels: 8 steps
SHORT = ("template=chatml", "max_samples=64", "logging_steps=1", "learning_rate=0.02")


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A few steps of the tiny model: (folder, result, stdout)."""
    folder = tmp_path_factory.mktemp("adapter") / "tiny"
    settings = [*SHORT, f"output_dir={folder}"]
    done = run("make", "lf-train", f"ARGS=--model {tiny_model} {' '.join(settings)}", check=0)
    return folder, result(done), done.stdout


# -----------------------------------------------------------------------------
# Settings


def on_this_machine(settings: dict) -> dict:
    """Without the keys that need a GPU or a launcher."""
    needing = ("bf16", "deepspeed", "ddp_backend")
    return {key: value for key, value in settings.items() if key not in needing}


YAMLS = {
    file.name: on_this_machine(yaml.safe_load(file.read_text()))
    for file in MODULE.glob("configs/*.yaml")
}
PRINTED = [(profile, flags) for profile in ("cpu", "4090x2") for flags in ("", "--zero2")]


@pytest.fixture(scope="module")
def printed() -> dict[tuple, tuple]:
    """What --dry-run prints under each profile and with each YAML: (settings, command)."""
    texts = {}
    for profile, flags in PRINTED:
        command = ["python", TRAIN, "--dry-run", *flags.split(), "lora_rank=4"]
        out = run(*command, PROFILE=profile, check=0).stdout
        text, command = out.rsplit("\n\n", 1)
        texts[profile, flags] = (yaml.safe_load(text), command.strip())
    return texts


@pytest.fixture(scope="module")
def understood(printed) -> dict[str, dict | str]:
    """LLaMA-Factory's own parser on all settings below, in one process of its own."""
    cases = dict(YAMLS)
    for name, settings in YAMLS.items():
        cases[f"{name} misspelt"] = settings | {"lora_rang": 8}
    for case, (settings, _) in printed.items():
        cases[str(case)] = on_this_machine(settings)
    program = ROOT / "tests/programs/parse_settings.py"
    return result(python(program, json.dumps(cases), check=0, CUDA_VISIBLE_DEVICES=""))


def test_every_yaml_is_read_by_llamafactory(understood):
    """Its own parser takes every key with its value.

    One more key, and it refuses: nothing is silently ignored.
    """
    assert len(YAMLS) == 4
    for name, settings in YAMLS.items():
        refusal = "Some keys are not used by the HfArgumentParser: ['lora_rang']"
        assert understood[f"{name} misspelt"] == refusal
        assert isinstance(understood[name], dict), understood[name]
        for key, value in settings.items():
            expected = [] if key == "report_to" else value  # `none` becomes an empty list
            assert understood[name][key] in (expected, [expected]), (name, key)


@pytest.mark.parametrize("profile, flags", PRINTED)
def test_printed_settings_are_read_by_llamafactory(printed, understood, profile, flags):
    """YAML and profile together, as --dry-run prints them: the engine knows every key."""
    settings, command = printed[profile, flags]
    assert settings["lora_rank"] == 4
    assert settings["template"] == {"cpu": "chatml", "4090x2": "qwen"}[profile]
    assert settings["bf16"] == (profile != "cpu")
    assert ("deepspeed" in settings) == bool(flags)
    folder = os.path.relpath(RUNS / "06_LLaMA-Factory", ROOT)
    name = "lora_z2" if flags else "lora"
    assert command.endswith(f"llamafactory-cli train {folder}/{name}.yaml")
    assert ("FORCE_TORCHRUN=1 NPROC_PER_NODE=2" in command) == bool(flags)
    parsed = understood[str((profile, flags))]
    assert isinstance(parsed, dict) and parsed["lora_rank"] == 4, parsed


def test_zero2_yaml_is_the_other_but_for_three_keys():
    one, two = (
        yaml.safe_load((MODULE / "configs" / f).read_text())
        for f in ("sft_lora.yaml", "sft_lora_z2.yaml")
    )
    assert {k for k in one.keys() | two.keys() if one.get(k) != two.get(k)} == {
        "deepspeed",
        "output_dir",
        "gradient_accumulation_steps",
    }
    assert (ROOT / two["deepspeed"]).is_file()


def test_zero2_json_is_read_by_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads((MODULE / "configs/zero2.json").read_text())
    names = {value for value in vars(constants).values() if isinstance(value, str)}
    assert content.keys() <= names | {"bf16", "zero_optimization"}
    DeepSpeedZeroConfig(**content["zero_optimization"])
    with pytest.raises(ValueError, match="no_such_key"):
        DeepSpeedZeroConfig(**content["zero_optimization"], no_such_key=1)


# -----------------------------------------------------------------------------
# The template


def encoded(tokenizer, name: str | None, system: str | None = None) -> list[int]:
    """The conversation as LLaMA-Factory encodes it for training, turn after turn."""
    from llamafactory.data import template
    from llamafactory.hparams import DataArguments

    shared = template.TEMPLATES.get(name)  # by the whole process
    before = shared.default_system if shared else None
    try:
        arguments = DataArguments(template=name, default_system=system)
        made = template.get_template_and_fix_tokenizer(tokenizer, arguments)
        turns = made.encode_multiturn(tokenizer, CONVERSATION)
        return [token for prompt, answer in turns for token in [*prompt, *answer]]
    finally:
        if shared:
            shared.default_system = before


def test_template_of_the_small_model(small_model):
    """`chatml` alone leaves out the system message of the model's own template; default_system
    puts it back.
    """
    from transformers import AutoTokenizer

    def fresh():
        return AutoTokenizer.from_pretrained(small_model)

    own = fresh().apply_chat_template(CONVERSATION, return_dict=False)
    bare = encoded(fresh(), "chatml")
    assert bare != own
    assert (
        fresh().decode(own).removesuffix(fresh().decode(bare))
        == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    )
    assert encoded(fresh(), "chatml", SYSTEM) == own
    assert encoded(fresh(), None) == own, (
        "without `template`, LLaMA-Factory derives it from the tokenizer's"
    )


def test_template_of_qwen(small_model):
    """`qwen` says what Qwen2.5's published template says, its default system message included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = QWEN
    own = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert encoded(tokenizer, "qwen") == own
    assert tokenizer.chat_template == QWEN
    assert QWEN_SYSTEM in tokenizer.decode(own)
    assert encoded(tokenizer, "chatml") != own


@pytest.mark.parametrize(
    "template, expected", [(QWEN, QWEN_SYSTEM), (NO_SYSTEM, ""), (NOT_CHATML, None)]
)
def test_own_system_message(tmp_path, small_model, template, expected):
    find = runpy.run_path(str(MODULE / "factory.py"))["own_system_message"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert find(tmp_path) == expected
    assert find(small_model) == SYSTEM


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "merged"
    done = run("make", "lf-merge", f"ARGS=--adapter {adapter[0]} --output {folder}", check=0)
    whole = (folder / "model.safetensors").stat().st_size
    assert result(done)["merged_gb"] == pytest.approx(whole / 1e9, abs=0.001)
    assert whole > 10 * (adapter[0] / "adapter_model.safetensors").stat().st_size
    return folder


def test_training_and_serving_say_the_same(adapter, merged):
    """The text that training printed is the base model's own template, and the merged one's."""
    from transformers import AutoTokenizer

    folder, _, out = adapter
    printed = re.search(r"  inputs:\n(.*?)  labels:", out, re.S)[1]
    trained = re.sub(r"(?m)^  ", "", printed).strip()
    rows = [row["messages"] for row in data.rows("launch_en_train")]
    (messages,) = [row for row in rows if row[0]["content"] in trained]
    base = yaml.safe_load((folder / "config.yaml").read_text())["model_name_or_path"]
    for place in (ROOT / base, merged):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.apply_chat_template(messages, tokenize=False).strip() == trained, place
        request = tokenizer.apply_chat_template(
            CONVERSATION[:1], add_generation_prompt=True, tokenize=False
        )
        assert request.endswith("GPUs.<|im_end|>\n<|im_start|>assistant\n")


# -----------------------------------------------------------------------------
# Training, scoring


def test_training(adapter):
    folder, trained, out = adapter
    assert trained["losses"][0] > trained["losses"][-1] + 0.1
    assert (trained["world_size"], trained["zero_stage"]) == (1, 0)
    assert SYSTEM in out and "trainable params" in out
    for name in ("adapter_model.safetensors", "config.yaml", "training_loss.png"):
        assert (folder / name).is_file()


def test_the_score_is_of_the_answers(adapter, tuned_answers):
    """Each model gives its own greedy answers; the printed scores are those of what is stored."""
    done = run("make", "lf-score", f"ARGS=--adapter {adapter[0]} --limit 4", check=0)
    score = result(done)
    answers = json.loads((RUNS / "06_LLaMA-Factory/answers.json").read_text())
    wanted = [row["messages"][1]["content"] for row in data.rows("launch_en_test")[:4]]
    assert [answer["wanted"] for answer in answers] == wanted
    for answer, tuned in zip(answers, tuned_answers, strict=False):
        assert begins_like(answer["tuned"], tuned)
        assert answer["base"] != answer["tuned"]
    assert score["row_count"] == 4
    assert score["wrong_count"] == sum(answer["tuned"] != answer["wanted"] for answer in answers)


def test_only_exact_answers_count(adapter, monkeypatch):
    """Three of eight right before, six after: one character more or less is wrong."""
    wanted = [row["messages"][1]["content"] for row in data.rows("launch_en_test")[:8]]
    before = [*wanted[:3], *[text[:-1] for text in wanted[3:]]]
    after = [wanted[0] + " ", *wanted[1:7], ""]
    answers = iter([before, after])
    metrics = []
    monkeypatch.setenv("PROFILE", "cpu")
    monkeypatch.syspath_prepend(str(MODULE))
    main = runpy.run_path(str(SCORE), run_name="imported")["main"]
    monkeypatch.setitem(main.__globals__, "greedy_answers", lambda *_: next(answers))
    finish = SimpleNamespace(finish=lambda _, numbers, __: metrics.append(numbers))
    monkeypatch.setitem(main.__globals__, "results", finish)
    flags = ["--adapter", str(adapter[0]), "--limit", "8"]
    monkeypatch.setattr(sys, "argv", [str(SCORE), *flags])
    main()
    (score,) = metrics
    assert (score["base_exact_pct"], score["tuned_exact_pct"]) == (37.5, 75)
    assert (score["row_count"], score["wrong_count"]) == (8, 2)


def test_zero2_is_active_and_learns_the_same(adapter, tiny_model, tmp_path):
    """DeepSpeed's checkpoint says stage 2 of 2 processes; half of the rows in each gives the losses
    of one process.
    """
    folder = tmp_path / "z2"
    settings = [*SHORT, f"output_dir={folder}"]
    done = run("make", "lf-train-z2", f"ARGS=--model {tiny_model} {' '.join(settings)}", check=0)
    trained = result(done)
    assert (trained["zero_stage"], trained["world_size"]) == (2, 2)
    assert trained["losses"] == pytest.approx(adapter[1]["losses"], rel=1e-3)
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 3])
def test_plain_ddp_and_zero3_succeed(tiny_model, tmp_path, stage):
    """The same launch without DeepSpeed, and by a JSON of stage 3: what ran is what is reported."""
    deepspeed = "null"
    if stage:
        content = json.loads((MODULE / "configs/zero2.json").read_text())
        content["zero_optimization"]["stage"] = stage
        deepspeed = tmp_path / "zero3.json"
        deepspeed.write_text(json.dumps(content))
    settings = (f"output_dir={tmp_path / 'x'}", "max_samples=16", f"deepspeed={deepspeed}")
    trained = result(python(TRAIN, "--zero2", "--model", tiny_model, *settings, check=0))
    assert (trained["zero_stage"], trained["world_size"]) == (stage, 2)


@pytest.mark.long
def test_zero2_that_is_not_active_is_refused(tiny_model, tmp_path):
    """With this variable Accelerate leaves DeepSpeed out and says nothing; the adapter is kept."""
    settings = (f"output_dir={tmp_path / 'x'}", "max_samples=16")
    command = ["python", TRAIN, "--zero2", "--model", tiny_model, *settings]
    assert "ran without ZeRO-2" in refused(*command, ACCELERATE_USE_CPU="true")
    assert (tmp_path / "x/adapter_model.safetensors").is_file()


def test_the_stage_is_read_without_running_code(tmp_path):
    """Two processes and stage 2 from DeepSpeed's files; a file with more than data is refused."""
    import pickle

    import torch

    read = runpy.run_path(str(MODULE / "outcome.py"))["read"]
    checkpoint = tmp_path / "checkpoint-4/global_step4"
    checkpoint.mkdir(parents=True)
    history = {"global_step": 4, "max_steps": 4, "log_history": [{"loss": 2.0}, {"loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(history))
    (tmp_path / "all_results.json").write_text('{"train_loss": 1.5, "train_runtime": 3.0}')
    assert read(tmp_path)[-2:] == (0, 0)
    for rank in (0, 1):
        (checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    state = {"ds_config": {"zero_optimization": {"stage": 2}}}
    torch.save(state, checkpoint / "mp_rank_00_model_states.pt")
    assert read(tmp_path) == ([2.0, 1.0], 4, 4, 3.0, 2, 2)
    torch.save(state | {"x": SimpleNamespace()}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read(tmp_path)


# -----------------------------------------------------------------------------
# Merging, chat, servers


def prompts(count: int) -> list[str]:
    return [row["messages"][0]["content"] for row in data.rows("launch_en_test")[:count]]


def greedy(model, tokenizer, requests: list[str]) -> list[list[int]]:
    """The tokens of each answer, in one batch, padding and end tokens not included."""
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": request}] for request in requests]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(
        **inputs, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return [
        [t for t in tokens if t != tokenizer.eos_token_id]
        for tokens in output[:, inputs["input_ids"].shape[1] :].tolist()
    ]


@pytest.fixture(scope="module")
def tuned_model(adapter, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter[0]).eval()


@pytest.fixture(scope="module")
def tuned_answers(tuned_model, tiny_model) -> list[str]:
    """The first 60 tokens of what the adapter answers to the first two requests."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [tokenizer.decode(answer) for answer in greedy(tuned_model, tokenizer, prompts(2))]


def begins_like(answer: str, expected: str) -> bool:
    """One goes on where the other ends, be it in the middle of a character."""
    shorter = min(len(answer), len(expected.rstrip("\ufffd")))
    return shorter > 10 and answer[:shorter] == expected[:shorter]


def test_adapter_and_merged_model_answer_alike(tuned_model, merged, tiny_model):
    """The same greedy tokens in float32, each through its own tokenizer and template.

    The base answers otherwise.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    requests = prompts(6)
    expected = greedy(tuned_model, AutoTokenizer.from_pretrained(tiny_model), requests)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.float32
    assert greedy(plain, AutoTokenizer.from_pretrained(merged), requests) == expected
    with tuned_model.disable_adapter():
        base = greedy(tuned_model, AutoTokenizer.from_pretrained(tiny_model), requests)
    assert all(before != after for before, after in zip(base, expected, strict=True))


@pytest.fixture
def no_jobs():
    """Nothing of this stage runs before and after."""
    for job in [j for n, j in jobs.running().items() if n.startswith("lf-")]:
        jobs.stop(job)
    yield
    for job in [j for n, j in jobs.running().items() if n.startswith("lf-")]:
        jobs.stop(job)


def listening(port: int) -> list[str]:
    sockets = psutil.net_connections("tcp")
    return [
        f"{s.laddr.ip}:{port}" for s in sockets if s.status == "LISTEN" and s.laddr.port == port
    ]


def living(processes) -> list:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_api(adapter, tuned_answers, no_jobs):
    """It answers as the adapter does, on loopback only, refuses a second start, and ends whole."""
    (request,) = prompts(1)
    out = run("make", "lf-api", f"ARGS=--adapter {adapter[0]}", check=0).stdout
    assert "http://127.0.0.1:8010/v1" in out and listening(8010) == ["127.0.0.1:8010"]
    body = json.dumps({"model": "tuned", "messages": [{"role": "user", "content": request}]})
    call = urllib.request.Request(
        "http://127.0.0.1:8010/v1/chat/completions",
        body.encode(),
        {"Content-Type": "application/json"},
    )
    reply = json.load(urllib.request.urlopen(call, timeout=PATIENCE))
    answer = reply["choices"][0]["message"]["content"]
    assert begins_like(answer, tuned_answers[0])
    assert "already runs at http://127.0.0.1:8010" in refused(
        "make", "lf-api", f"ARGS=--adapter {adapter[0]}"
    )
    members = jobs.members(jobs.running()["lf-api"])
    jobs.stop(jobs.running()["lf-api"])
    assert members and not living(members) and not listening(8010)


def test_webui(no_jobs):
    out = run("make", "lf-webui", check=0).stdout
    assert "http://127.0.0.1:7860" in out and listening(7860) == ["127.0.0.1:7860"]
    page = urllib.request.urlopen("http://127.0.0.1:7860/config", timeout=300).read().decode()
    assert "Model path" in page or "model_path" in page or "LLaMA" in page
    assert "launch_en_train" in (RUNS / "06_LLaMA-Factory/webui/data/dataset_info.json").read_text()


def test_port_in_use(adapter, no_jobs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = f"--adapter {adapter[0]} --port {port}"
        assert f"port {port} is in use" in refused("make", "lf-api", f"ARGS={flags}")


def test_a_server_that_cannot_start_says_why(adapter, tmp_path, no_jobs):
    """The base model has lost its weights: the engine's own reason, exit code 2, no process."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter[0], folder)
    base = yaml.safe_load((folder / "config.yaml").read_text())["model_name_or_path"]
    broken = tmp_path / "base"
    shutil.copytree(ROOT / base, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = (folder / "config.yaml").read_text().replace(base, str(broken))
    (folder / "config.yaml").write_text(settings)
    sentence = refused("make", "lf-api", f"ARGS=--adapter {folder}")
    assert "stopped while starting" in sentence and "safetensors" in sentence
    assert not ours()


def test_chat_with_piped_input(adapter, tuned_answers):
    """The adapter's answer; the input ends without `exit`, which the readme's block says."""
    (request,) = prompts(1)
    done = subprocess.run(
        ["make", "lf-chat", f"ARGS=--adapter {adapter[0]}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=f"{request}\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    answer = done.stdout.partition("Assistant: ")[2]
    assert begins_like(answer, tuned_answers[0])


# -----------------------------------------------------------------------------
# What must be refused, and what must not stay


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (
            ["dataset=alpaca"],
            "there is no data set alpaca: dataset_info.json in "
            "modules/06_LLaMA-Factory/data has launch_en_train",
        ),
        (["dataset_dir=nowhere"], "there is no nowhere/dataset_info.json"),
        (["learning_rate=fast"], "learning_rate=fast is no number"),
        (["--learning-rate"], None),
        (["1e-4"], "write KEY=VALUE"),
        (["--zero2", "--processes", "1"], "at least 2"),
        (["--zero2", "deepspeed=nowhere.json"], "there is no nowhere.json"),
        (["--model", "gpt-5"], "unknown model gpt-5"),
    ],
)
def test_bad_settings(arguments, reason):
    if reason is None:
        assert run("python", TRAIN, *arguments, check=2).stderr.count("unrecognized arguments") == 1
    else:
        assert reason in refused("python", TRAIN, *arguments)


def test_bf16_on_a_cpu():
    assert "needs a GPU" in refused("make", "lf-train", "ARGS=bf16=true", PROFILE="cpu")


def test_broken_row(tmp_path):
    """A row without its answer: which row, which field, before LLaMA-Factory has seen the file."""
    broken = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]
    rows = [*data.rows("launch_en_train")[:3], {"messages": broken}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    described = json.loads((MODULE / "data/dataset_info.json").read_text())["launch_en_train"]
    info = {"mine": described | {"file_name": "mine.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    command = ["python", TRAIN, f"dataset_dir={tmp_path}", "dataset=mine"]
    assert "row 4: field `content` of the assistant" in refused(*command)
    (tmp_path / "mine.json").unlink()
    assert "there is no data set" in refused(*command)


@pytest.mark.parametrize("target", ["lf-score", "lf-merge", "lf-chat", "lf-api"])
def test_missing_adapter(target, tmp_path):
    assert "run 'make lf-train' first" in refused("make", target, f"ARGS=--adapter {tmp_path}")


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_refusal_by_the_engine_is_one_sentence_and_keeps_what_was_trained(adapter, tiny_model):
    folder = adapter[0]
    before = contents(folder)
    sentence = refused(
        "python", TRAIN, "--model", tiny_model, f"output_dir={folder}", "lora_rang=8"
    )
    assert "Some keys are not used by the HfArgumentParser: ['lora_rang']" in sentence
    assert contents(folder) == before and not ours()


@pytest.mark.parametrize(
    "how", ["ctrl-c", *(pytest.param(how, marks=pytest.mark.long) for how in ("sigterm", "stop"))]
)
def test_interrupted_training_leaves_nothing(tiny_model, tmp_path, how):
    """Two training processes, ended in the middle by each of the three ways."""
    command = [
        sys.executable,
        TRAIN,
        "--zero2",
        "--model",
        tiny_model,
        f"output_dir={tmp_path / 'x'}",
        "num_train_epochs=500",
        "logging_steps=1",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if "'loss'" in line:
                break
        leader = psutil.Process(jobs.running()["lf-x"]["pid"])
        members = [leader, *leader.children(recursive=True)]
        launched = [p for p in members if "launcher.py" in " ".join(p.cmdline())]
        assert len(launched) >= 3  # torchrun and its two workers
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        elif how == "sigterm":
            process.terminate()
        else:
            jobs.stop(jobs.running()["lf-x"])
        process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        while living(members):  # the test's own time limit ends this
            time.sleep(0.2)
        assert "lf-x" not in jobs.running()
    finally:
        process.kill()
        running = jobs.running()
        if "lf-x" in running:
            jobs.stop(running["lf-x"])


def test_what_the_readme_says_of_the_package(monkeypatch):
    """No src/train.py and no examples in the wheel, no `eval`, vLLM only up to 0.11."""
    from importlib.metadata import files

    from llamafactory import cli

    names = [str(file) for file in files("llamafactory")]
    assert names
    assert not [n for n in names if n.endswith("src/train.py") or n.startswith("examples/")]
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "eval"])
    with pytest.raises(NotImplementedError):
        cli.main()
    source = (ROOT / ".venv/lib").glob("python3*/site-packages/llamafactory/hparams/parser.py")
    assert 'check_version("vllm>=0.4.3,<=0.11.0")' in next(source).read_text()
