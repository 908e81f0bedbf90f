"""Fine-tuning by LLaMA-Factory: templates, training, scoring, merging, serving, refusals.

All with one short training of a tiny model: what a reader's own training teaches the real one is
judged in test_claims.py, by the score that `make quickstart` has measured.
"""

import importlib
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
import workers
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


@pytest.fixture
def module06(monkeypatch):
    """Its helper files, imported as its scripts import them."""
    names = ("checkpoints", "unfinished", "factory", "outcome", "checks")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(MODULE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


# Of a training that a model without content feels: 8 steps
SHORT = ("dataset=launch_en_train", "template=chatml", "max_samples=64", "logging_steps=1")
SHORT += ("learning_rate=0.02",)


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
METHODS = {
    file.stem: on_this_machine(yaml.safe_load(file.read_text()))
    for file in MODULE.glob("configs/methods/*.yaml")
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
    for name, changed in METHODS.items():
        cases[name] = YAMLS["sft_lora.yaml"] | changed
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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_read_by_llamafactory(understood, name):
    """On top of sft_lora.yaml: its parser takes every key with its value."""
    assert isinstance(understood[name], dict), understood[name]
    for key, value in METHODS[name].items():
        read = understood[name][key]
        if key == "fsdp":
            read = " ".join(read)
        elif key == "fsdp_config":
            read = {setting: read[setting] for setting in value}
        assert read in (value, [value]), key


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


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_json_is_read_by_deepspeed(monkeypatch, stage):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    content = json.loads((MODULE / f"configs/zero{stage}.json").read_text())
    assert content["zero_optimization"]["stage"] == stage
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
def test_own_system_message(tmp_path, small_model, module06, template, expected):
    find = module06.factory.own_system_message
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


def scored(monkeypatch, adapter, before: list[str], after: list[str], *flags: str) -> dict:
    """The metrics of 02_score.py where base and tuned model answer thus."""
    answers = iter([before, after])
    metrics = []

    def greedy_answers(model, tokenizer, prompts, *_):
        texts = next(answers) if len(prompts) == len(before) else [str(len(metrics))] * len(prompts)
        return texts, [[0]] * len(texts)

    monkeypatch.setenv("PROFILE", "cpu")
    monkeypatch.syspath_prepend(str(MODULE))
    main = runpy.run_path(str(SCORE), run_name="imported")["main"]
    monkeypatch.setitem(main.__globals__, "greedy_answers", greedy_answers)
    finish = SimpleNamespace(finish=lambda _, numbers, *__: metrics.append(numbers))
    monkeypatch.setitem(main.__globals__, "results", finish)
    monkeypatch.setattr(sys, "argv", [str(SCORE), "--adapter", str(adapter), *flags])
    main()
    return metrics[0]


def test_only_exact_answers_count(adapter, monkeypatch):
    """Three of eight right before, six after: one character more or less is wrong. Of the wanted
    object's five fields each right one counts, in an answer that is JSON.
    """
    wanted = [row["messages"][1]["content"] for row in data.rows("launch_en_test")[:8]]
    before = [*wanted[:3], *[text[:-1] for text in wanted[3:]]]
    one_field = json.dumps(json.loads(wanted[7]) | {"gpus": -1})
    after = [wanted[0] + " ", *wanted[1:7], one_field]
    score = scored(monkeypatch, adapter[0], before, after, "--limit", "8")
    assert (score["base_exact_pct"], score["tuned_exact_pct"]) == (37.5, 75)
    assert (score["base_field_pct"], score["tuned_field_pct"]) == (37.5, 97.5)
    assert (score["row_count"], score["wrong_count"]) == (8, 2)
    assert score["base_exact_low_pct"] < 37.5 < score["base_exact_high_pct"] < 75
    assert score["tuned_loss"] < score["base_loss"] < score["base_high_loss"]
    assert score["base_neutral_loss"] != score["tuned_neutral_loss"]
    assert score["kept_count"] == 4


@pytest.fixture(scope="module")
def zero2_adapter(tiny_model, tmp_path_factory):
    """The same by ZeRO-2 in two processes: (folder, result)."""
    folder = tmp_path_factory.mktemp("zero2") / "z2"
    settings = [*SHORT, f"output_dir={folder}"]
    done = run("make", "lf-train-z2", f"ARGS=--model {tiny_model} {' '.join(settings)}", check=0)
    return folder, result(done)


def test_zero2_is_active_and_learns_the_same(adapter, zero2_adapter):
    """DeepSpeed's checkpoint says stage 2 of 2 processes; half of the rows in each gives the losses
    of one process.
    """
    folder, trained = zero2_adapter
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


def test_the_stage_is_read_without_running_code(tmp_path, module06):
    """Two processes and stage 2 from DeepSpeed's files; a file with more than data is refused."""
    import pickle

    import torch

    def read():
        return module06.outcome.read(tmp_path, tmp_path / "log")

    (tmp_path / "log").write_text("trainable params: 4,884,480 || all params: 139,399,488")
    (tmp_path / "trainer_log.jsonl").write_text("")
    checkpoint = tmp_path / "checkpoint-4/global_step4"
    checkpoint.mkdir(parents=True)
    history = {"global_step": 4, "max_steps": 4, "log_history": [{"loss": 2.0}, {"loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(history))
    (tmp_path / "all_results.json").write_text('{"train_loss": 1.5, "train_runtime": 3.0}')
    assert read()[4:6] == (0, 0)
    for rank in (0, 1):
        (checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    state = {"ds_config": {"zero_optimization": {"stage": 2}}}
    torch.save(state, checkpoint / "mp_rank_00_model_states.pt")
    assert read() == ([2.0, 1.0], 4, 4, 3.0, 2, 2, False, 4884480, 0.0, 0.0, [], None)
    torch.save(state | {"x": SimpleNamespace()}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read()


# -----------------------------------------------------------------------------
# Interrupted and resumed


def left_at_step_4(finished, folder):
    """What a training of the same settings, ended after its first checkpoint, leaves."""
    unfinished = folder / "unfinished"
    unfinished.mkdir(parents=True)
    shutil.copytree(finished / "checkpoint-4", unfinished / "checkpoint-4")
    shutil.copy(finished / "run.json", unfinished)
    return unfinished


def last_words(done) -> str:
    """The one sentence of a training that was ended or has failed."""
    (line,) = [line for line in done.stderr.splitlines() if re.match("error: |ended from", line)]
    assert "Traceback" not in done.stderr + done.stdout
    return line


def weights(folder, name="adapter_model.safetensors") -> bytes:
    return (folder / name).read_bytes()


def logged(folder) -> list[dict]:
    """What the engine has logged of each step, a resumed training's after the first one's."""
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    return [log for log in map(json.loads, lines) if "loss" in log]


def steps_trained(folder) -> list[int]:
    return [log["current_steps"] for log in logged(folder)]


def mounted(folder, script: str, **kwargs):
    """Run the shell script where `folder` is a file system of its own, of 6 MiB."""
    mount = f"mount -t tmpfs -o size=6m tmpfs {folder} && "
    return run("unshare", "--mount", "--map-root-user", "bash", "-c", mount + script, **kwargs)


@pytest.mark.skipif(not workers.can_be_alone(), reason="no namespaces can be made here")
def test_a_full_disk_and_the_rest_of_the_training(adapter, tiny_model, tmp_path):
    """The second checkpoint finds no room: one sentence, the first is whole. With room, RESUME=1
    gives the losses and the adapter of the training that was not interrupted, bit for bit.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    train = f"ARGS=--model {tiny_model} {' '.join(SHORT)} output_dir={disk}/tiny"
    script = (
        f"make lf-train '{train}' && exit 1; grow() {{ mount -o remount,size=64m {disk}; }}; grow; "
        f"make lf-train RESUME=1 '{train}' && cp -r {disk}/tiny {tmp_path}"
    )
    done = mounted(disk, script, check=0)
    sentence = last_words(done)
    assert "no room was left on the disk" in sentence
    assert "unfinished/checkpoint-4 is whole: RESUME=1 goes on from it" in sentence
    assert "checkpoint-8 is not whole and passed over: " in done.stdout
    assert result(done)["losses"] == adapter[1]["losses"]
    assert weights(tmp_path / "tiny") == weights(adapter[0])
    steps = steps_trained(tmp_path / "tiny")
    assert steps[-4:] == [5, 6, 7, 8] and steps.count(4) == 1
    assert not (tmp_path / "tiny/unfinished").exists()


def test_full_fine_tuning_goes_on_exactly(tiny_model, tmp_path):
    """All weights instead of an adapter."""
    settings = ["finetuning_type=full", *SHORT]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    command = ["make", "lf-train", f"ARGS=--model {tiny_model} {' '.join(settings)} output_dir="]
    first = run(*command[:2], f"{command[2]}{whole}", check=0)
    left_at_step_4(whole, rest)
    second = run(*command[:2], "RESUME=1", f"{command[2]}{rest}", check=0)
    assert f"goes on from {rest}/unfinished/checkpoint-4" in second.stdout
    assert result(second)["losses"] == result(first)["losses"]
    assert steps_trained(rest) == [5, 6, 7, 8]
    assert weights(rest, "model.safetensors") == weights(whole, "model.safetensors")


def test_zero2_goes_on_exactly_beside_an_older_training(
    adapter, zero2_adapter, tiny_model, tmp_path
):
    """A finished training of one process lies in the folder, of a date to come: neither its
    checkpoint nor its date is taken for the new one's.
    """
    folder = tmp_path / "z2"
    shutil.copytree(adapter[0], folder)
    for file in (folder / "checkpoint-8").iterdir():
        os.utime(file, (2**32, 2**32))
    left_at_step_4(zero2_adapter[0], folder)
    flags = f"ARGS=--model {tiny_model} {' '.join(SHORT)} output_dir={folder}"
    trained = result(run("make", "lf-train-z2", "RESUME=1", flags, check=0))
    assert (trained["zero_stage"], trained["world_size"]) == (2, 2)
    assert trained["losses"] == zero2_adapter[1]["losses"]
    assert weights(folder) == weights(zero2_adapter[0])
    assert steps_trained(folder) == [5, 6, 7, 8]


@pytest.fixture(scope="module")
def stopped_early(tiny_model, tmp_path_factory):
    """(folder, result, command) of a training that soon knows its few rows by heart, and stops."""
    folder = tmp_path_factory.mktemp("early") / "x"
    settings = [*SHORT[:2], "max_samples=32", "val_size=16", "learning_rate=0.01"]
    settings += ["num_train_epochs=20", "eval_steps=2", "save_steps=2", "logging_steps=2"]
    flags = f"ARGS=--model {tiny_model} {' '.join(settings)}"
    command = ["make", "lf-train", "METHOD=early_stopping", flags]
    done = run(*command[:-1], f"{flags} output_dir={folder}", check=0)
    assert "where it stopped early" in done.stdout
    return folder, result(done), command


def test_early_stopping_keeps_the_best_checkpoint(stopped_early):
    """What lies in the folder is the one of the lowest loss on the rows that were kept apart."""
    folder, trained, _ = stopped_early
    best = trained["best_step_count"]
    assert trained["step_count"] == best + 2 * 2 < 40
    assert trained["eval_losses"][best // 2 - 1] == min(trained["eval_losses"])
    assert weights(folder) == weights(folder / f"checkpoint-{best}")
    assert weights(folder) != weights(folder / f"checkpoint-{trained['step_count']}")


@pytest.mark.long
def test_early_stopping_resumed_ends_at_the_same_step(stopped_early, tmp_path):
    """From the best checkpoint: the same losses, the same weights."""
    folder, trained, command = stopped_early
    kept = f"checkpoint-{trained['best_step_count']}"
    shutil.copytree(folder / kept, tmp_path / "unfinished" / kept)
    shutil.copy(folder / "run.json", tmp_path / "unfinished")
    done = run(*command[:-1], "RESUME=1", f"{command[-1]} output_dir={tmp_path}", check=0)
    assert result(done)["eval_losses"] == trained["eval_losses"]
    assert result(done)["step_count"] == trained["step_count"]
    assert weights(tmp_path) == weights(folder)


def test_only_its_own_end_is_a_right_end(module06, tmp_path, capsys):
    """A training that would stop early, and was told to end before, has not finished."""
    outcome = module06.outcome.Outcome
    settings = {"early_stopping_steps": 2}
    for losses, ended in (([3.0, 2.0, 2.5], False), ([3.0, 2.0, 2.5, 2.0], True)):
        trained = outcome([1.0], 6, 40, 1.0, 1, 0, False, 9, 1.0, 0.0, losses, 4)
        assert trained.stopped_by_itself(2) == ended
        if ended:
            module06.unfinished.refuse_early_end(tmp_path, trained, settings)
            continue
        with pytest.raises(SystemExit) as end:
            module06.unfinished.refuse_early_end(tmp_path, trained, settings)
        assert end.value.code == 143 and "step 6 of 40" in capsys.readouterr().err


def start_training(*flags):
    """The script in the background, which has printed a loss."""
    process = subprocess.Popen(
        [sys.executable, TRAIN, *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for line in process.stdout:
        if "'loss'" in line:
            break
    return process


def ended(process):
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def test_sigterm_saves_and_sigkill_loses_little(tiny_model, tmp_path, module06):
    """SIGTERM: the engine saves and ends, and RESUME=1 computes the next step as the first run had.

    SIGKILL of the engine: one sentence, and a checkpoint at most 4 steps old.
    """
    folder = tmp_path / "x"
    unfinished = folder / "unfinished"
    settings = [*SHORT, f"output_dir={folder}", "num_train_epochs=500"]
    flags = ["--model", tiny_model, *settings]
    process = start_training(*flags)
    try:
        os.killpg(process.pid, signal.SIGTERM)  # to the script and to lab.launch at once
        done = ended(process)
        assert done.returncode == 143
        (saved,) = re.findall(r"checkpoint-(\d+) is whole: RESUME=1 goes on", last_words(done))
        assert "holds an unfinished training" in refused("python", TRAIN, *flags)
        other = ["--resume", *flags, "seed=1", "max_samples=32"]
        sentence = refused("python", TRAIN, *other)
        assert "seed was 42 and is 1" in sentence and "max_samples was 64 and is 32" in sentence

        process = start_training("--resume", *flags)
        engine = psutil.Process(jobs.running()["lf-x"]["pid"])
        while logged(unfinished)[-1]["current_steps"] < int(saved) + 6:
            time.sleep(0.05)
        engine.kill()
        done = ended(process)
        assert done.returncode == 2 and "was killed" in last_words(done)
        (kept,) = re.findall(r"checkpoint-(\d+) is whole: RESUME=1 goes on", last_words(done))
        logs = logged(unfinished)
        assert logs[-1]["current_steps"] - int(kept) <= 4 and int(kept) > int(saved)
        # Where the signal came before the step's end, the first run too went on to its end.
        next_step = [log["loss"] for log in logs if log["current_steps"] == int(saved) + 1]
        assert len(set(next_step)) == 1
        assert not ours()
    finally:
        process.kill()


RUN_OF_ONE = {"processes": 1, "finetuning_type": "lora"}
RUN_OF_TWO = RUN_OF_ONE | {"processes": 2, "deepspeed": {"zero_optimization": {"stage": 2}}}


def shorten(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_step(file):
    file.write_text(file.read_text().replace('"global_step": 8', '"global_step": 12'))


@pytest.mark.parametrize(
    "processes, name, damage, reason",
    [
        (1, "adapter_model.safetensors", shorten, "cannot be read"),
        (1, "adapter_config.json", os.remove, "is missing"),
        (1, "optimizer.pt", shorten, "is cut short"),
        (1, "optimizer.pt", flip, "has damaged bytes"),
        (1, "scheduler.pt", os.remove, "is missing"),
        (1, "rng_state.pth", os.remove, "is missing"),
        (1, "trainer_state.json", shorten, "is cut short"),
        (1, "trainer_state.json", other_step, "is of step 12"),
        (2, "rng_state_1.pth", os.remove, "is missing"),
        (2, "latest", lambda file: file.write_text("global_step4"), "names global_step4"),
        (2, "global_step8/zero_pp_rank_1_mp_rank_00_optim_states.pt", os.remove, "is missing"),
        (2, "global_step8/mp_rank_00_model_states.pt", shorten, "is cut short"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    adapter, zero2_adapter, tmp_path, module06, processes, name, damage, reason
):
    """Each kind of damage has its name, and the checkpoint before is the last whole one."""
    folder = tmp_path / "training"
    shutil.copytree((adapter if processes == 1 else zero2_adapter)[0], folder)
    identity = RUN_OF_ONE if processes == 1 else RUN_OF_TWO
    assert module06.checkpoints.last_whole(folder, identity) == (folder / "checkpoint-8", {})
    damage(folder / "checkpoint-8" / name)
    whole, broken = module06.checkpoints.last_whole(folder, identity)
    assert whole == folder / "checkpoint-4"
    assert reason in broken[folder / "checkpoint-8"]


def test_a_clock_that_jumps_back_costs_no_checkpoint(tmp_path, module06):
    """transformers keeps the folders of the latest date; dated by their steps, the newest stays."""
    from transformers.trainer_utils import rotate_checkpoints

    for step, date in ((8, 2**32), (12, 2**32 + 9), (100, 2**31)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step == 100:  # saved after the jump
            module06.checkpoints.date_by_step(tmp_path)
        os.utime(tmp_path / f"checkpoint-{step}", (date, date))
    rotate_checkpoints(str(tmp_path), 2, use_mtime=True)
    assert [path.name for path in module06.checkpoints.numbered(tmp_path)] == [
        "checkpoint-100",
        "checkpoint-12",
    ]


def begins(unfinished, output, run, **flags):
    args = {"resume": False, "resume_or_begin": False, "fresh": False} | flags
    return unfinished.begin(output, run, SimpleNamespace(**args), "no-such-job")


def test_only_the_unfinished_training_of_the_same_run_goes_on(adapter, tmp_path, capsys, module06):
    """Beside a finished one with a higher step; refused by name otherwise; FRESH=1 removes it."""
    unfinished = module06.unfinished
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-8").rename(tmp_path / "checkpoint-20")
    run = json.loads((tmp_path / "run.json").read_text())
    with pytest.raises(SystemExit):
        begins(unfinished, tmp_path, run, resume=True)
    assert "nothing to resume" in capsys.readouterr().err
    assert begins(unfinished, tmp_path, run, resume_or_begin=True) is None
    shutil.rmtree(tmp_path / "unfinished")
    left = left_at_step_4(adapter[0], tmp_path)
    assert begins(unfinished, tmp_path, run, resume=True) == left / "checkpoint-4"
    rows = "rows of launch_en_train"
    for name, value in {"processes": 2, "model_name_or_path": "other", rows: "0" * 8}.items():
        with pytest.raises(SystemExit):
            begins(unfinished, tmp_path, run | {name: value}, resume_or_begin=True)
        assert f"{name} was {json.dumps(run[name])} and is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        begins(unfinished, tmp_path, run)
    assert "RESUME=1 goes on from it, FRESH=1 removes it" in capsys.readouterr().err
    assert begins(unfinished, tmp_path, run, fresh=True) is None
    assert [file.name for file in left.iterdir()] == ["run.json"]
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "checkpoint-20").is_dir()


def test_the_rows_belong_to_the_run(tmp_path, module06):
    """The same settings over another text of the same file: another checksum."""
    from omegaconf import OmegaConf

    shutil.copytree(MODULE / "data", tmp_path, dirs_exist_ok=True)
    settings = OmegaConf.create({"dataset": "launch_en_train", "dataset_dir": str(tmp_path)})
    before = module06.unfinished.identity(settings, 1)
    file = tmp_path / "launch_en_train.json"
    file.write_text(file.read_text().replace("GPU", "card"))
    after = module06.unfinished.identity(settings, 1)
    (difference,) = module06.unfinished.differences(before, after)
    assert difference.startswith("rows of launch_en_train was ")


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
            "there is no data set alpaca: "
            "modules/06_LLaMA-Factory/data/dataset_info.json has launch_en_train",
        ),
        (["dataset_dir=nowhere"], "there is no nowhere/dataset_info.json"),
        (["learning_rate=fast"], "learning_rate=fast is no number"),
        (["max_steps=some"], "max_steps=some is no number"),
        (["num_train_epochs=0"], "num_train_epochs=0: it must be more than 0"),
        (["bf16=maybe"], "bf16=maybe: it is true or false"),
        (["dataset=launch_en_tran"], "did you mean `launch_en_train`?"),
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
    assert "row 4: message 2: field `content` is empty" in refused(*command)
    (tmp_path / "mine.json").unlink()
    assert "there is no file" in refused(*command)


@pytest.mark.parametrize("target", ["lf-score", "lf-merge", "lf-chat", "lf-api"])
def test_missing_adapter(target, tmp_path):
    assert "run 'make lf-train' first" in refused("make", target, f"ARGS=--adapter {tmp_path}")


@pytest.mark.parametrize("target", ["lf-score", "lf-merge", "lf-chat", "lf-api"])
def test_adapter_that_does_not_fit(target, adapter, tmp_path):
    """Cut weights, and the adapter of a model of another width: said before a model is loaded."""
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter[0], broken)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be read" in refused("make", target, f"ARGS=--adapter {broken}")
    weights = load_file(adapter[0] / file.name)
    narrow = {name: each[:, :-1] if "lora_A" in name else each for name, each in weights.items()}
    save_file({name: each.copy() for name, each in narrow.items()}, file)
    assert "is of another model than" in refused("make", target, f"ARGS=--adapter {broken}")


def test_merging_overwrites_nothing_else(adapter, tmp_path):
    base = json.loads((adapter[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    folders = {adapter[0]: "adapter's folder", base: "its base model", tmp_path: "something else"}
    for folder, reason in folders.items():
        flags = f"ARGS=--adapter {adapter[0]} --output {folder}"
        assert reason in refused("make", "lf-merge", flags)


@pytest.mark.skipif(not workers.can_be_alone(), reason="no namespaces can be made here")
def test_merging_that_fails_leaves_the_earlier_one(adapter, merged, tmp_path):
    """The disk takes the small files, not the weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    earlier = disk / "merged"
    script = (
        f"mkdir {earlier} && cp {merged}/config.* {earlier} && "
        f"! make lf-merge 'ARGS=--adapter {adapter[0]} --output {earlier}' && "
        f"for name in json yaml; do cmp {merged}/config.$name {earlier}/config.$name; done && "
        f"ls {disk}"
    )
    done = mounted(disk, script, check=0)
    assert "no room was left on the disk" in last_words(done)
    assert done.stdout.splitlines()[-1] == "merged"  # and no merged.partial


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
    settings = (f"output_dir={tmp_path / 'x'}", "num_train_epochs=500", "logging_steps=1")
    process = start_training("--zero2", "--model", tiny_model, *settings)
    try:
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
