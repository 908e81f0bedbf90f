"""Fine-tuning by LLaMA-Factory: the template, training, scoring, merging, serving, and what must be
refused.
"""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, python, refused, run

from lab import RUNS, data, jobs

MODULE = ROOT / "modules/06_LLaMA-Factory"
TRAIN, SCORE, MERGE, CHAT = (
    MODULE / f"{name}.py" for name in ("01_train", "02_score", "03_merge", "04_chat")
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Qwen2.5-Instruct's published chat template, without its branches for tools.
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The real model, tuned once by the profile's values: (folder, result)."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    done = run("make", "lf-train", f"ARGS=output_dir={folder}", check=0)
    return folder, result(done), done.stdout


@pytest.fixture(scope="module")
def tiny_adapter(tiny_model, tmp_path_factory):
    """A few steps of the tiny model: (folder, result, stdout)."""
    folder = tmp_path_factory.mktemp("tiny_adapter") / "tiny"
    done = python(
        TRAIN,
        "--model",
        tiny_model,
        f"output_dir={folder}",
        "template=chatml",
        "max_samples=64",
        "logging_steps=1",
        "learning_rate=0.02",
        check=0,
    )
    return folder, result(done), done.stdout


# -----------------------------------------------------------------------------
# Settings


def parsed_by_the_engine(cases: dict[str, dict]) -> dict[str, dict | str]:
    """LLaMA-Factory's own parser on each of the settings: what it understood, or its refusal. In a
    process of its own.
    """
    code = (
        "import json, sys\nfrom llamafactory.hparams import parser as p\nfrom transformers import HfArgumentParser\n"
        "found = {}\n"
        "for name, settings in json.loads(sys.argv[1]).items():\n"
        "    try: parts = HfArgumentParser(p._TRAIN_ARGS if 'stage' in settings else p._INFER_ARGS).parse_dict(settings)\n"
        "    except ValueError as e: found[name] = str(e)\n"
        "    else: found[name] = {k: getattr(v, 'value', v) for part in parts for k, v in vars(part).items() if k in settings}\n"
        "print(json.dumps(found))"
    )
    return result(python("-c", code, json.dumps(cases), check=0, CUDA_VISIBLE_DEVICES=""))


def on_this_machine(settings: dict) -> dict:
    """Without the keys that need a GPU or a launcher."""
    return {
        key: value
        for key, value in settings.items()
        if key not in ("bf16", "deepspeed", "ddp_backend")
    }


def test_every_yaml_is_read_by_llamafactory():
    """Its own parser takes every key with its value; one more key, and it refuses: nothing is
    silently ignored.
    """
    files = {
        f.name: on_this_machine(yaml.safe_load(f.read_text()))
        for f in MODULE.glob("configs/*.yaml")
    }
    parsed = parsed_by_the_engine(
        files | {f"{name}+": settings | {"lora_rang": 8} for name, settings in files.items()}
    )
    assert len(files) == 4
    for name, settings in files.items():
        assert parsed[f"{name}+"] == "Some keys are not used by the HfArgumentParser: ['lora_rang']"
        assert isinstance(parsed[name], dict), parsed[name]
        for key, value in settings.items():
            expected = [] if key == "report_to" else value  # `none` becomes an empty list
            assert parsed[name][key] in (expected, [expected]), (name, key)


def test_printed_settings_are_read_by_llamafactory():
    """YAML and profile together, as --dry-run prints them: the engine knows every key."""
    cases = {}
    folder = os.path.relpath(RUNS / "06_LLaMA-Factory", ROOT)
    for profile in ("cpu", "4090x2"):
        for script in ([], ["--zero2"]):
            out = run(
                "python", TRAIN, "--dry-run", *script, "lora_rank=4", PROFILE=profile, check=0
            ).stdout
            text, command = out.rsplit("\n\n", 1)
            settings = yaml.safe_load(text)
            assert (
                settings["lora_rank"] == 4
                and settings["template"] == {"cpu": "chatml", "4090x2": "qwen"}[profile]
            )
            assert settings["bf16"] == (profile != "cpu") and ("deepspeed" in settings) == bool(
                script
            )
            assert command.strip().endswith(
                f"llamafactory-cli train {folder}/{'lora_z2' if script else 'lora'}.yaml"
            )
            assert ("FORCE_TORCHRUN=1 NPROC_PER_NODE=2" in command) == bool(script)
            cases[f"{profile} {script}"] = on_this_machine(settings)
    for case, found in parsed_by_the_engine(cases).items():
        assert isinstance(found, dict) and found["lora_rank"] == 4, (case, found)


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


def test_zero2_json_is_read_by_deepspeed():
    code = (
        "import json, sys\nfrom deepspeed.runtime.zero.config import DeepSpeedZeroConfig\nfrom deepspeed.runtime import constants\n"
        "d = json.load(open(sys.argv[1]))\nnames = {v for v in vars(constants).values() if isinstance(v, str)} | {'bf16', 'zero_optimization'}\n"
        "assert d.keys() <= names, d.keys() - names\nDeepSpeedZeroConfig(**d['zero_optimization'])\n"
        "try: DeepSpeedZeroConfig(**d['zero_optimization'], no_such_key=1)\nexcept Exception as e: print('refused', type(e).__name__)"
    )
    assert (
        "refused ValidationError"
        in python("-c", code, MODULE / "configs/zero2.json", check=0).stdout
    )


# -----------------------------------------------------------------------------
# The template


def encoded(tokenizer, template: str | None, system: str | None = None) -> list[int]:
    """The conversation as LLaMA-Factory encodes it for training, prompt and answer of every turn in
    a row.
    """
    from llamafactory.data import template as t
    from llamafactory.hparams import DataArguments

    before = t.TEMPLATES[template].default_system if template else None
    try:
        found = t.get_template_and_fix_tokenizer(
            tokenizer, DataArguments(template=template, default_system=system)
        )
        return [
            token
            for pair in found.encode_multiturn(tokenizer, CONVERSATION)
            for part in pair
            for token in part
        ]
    finally:
        if template:
            t.TEMPLATES[
                template
            ].default_system = before  # the templates are shared by the whole process


def test_template_of_the_small_model(small_model):
    """`chatml` alone leaves out the system message that the model's own template says; with
    default_system both are equal.
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
    """`qwen` says what Qwen2.5's published template says, its default system message included (the
    small tokenizer carries it).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = QWEN
    own = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert encoded(tokenizer, "qwen") == own
    assert tokenizer.chat_template == QWEN and "created by Alibaba Cloud" in tokenizer.decode(own)
    assert encoded(tokenizer, "chatml") != own


@pytest.mark.parametrize(
    "template, expected",
    [
        (QWEN, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
            "",
        ),
        ("{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}", None),
    ],
)
def test_own_system_message(tmp_path, small_model, template, expected):
    find = runpy.run_path(str(MODULE / "factory.py"))["own_system_message"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert find(tmp_path) == expected
    assert find(small_model) == SYSTEM


def test_training_and_serving_say_the_same(tiny_adapter, tmp_path):
    """The text that training printed = the base model's own template = the template stored in the
    merged folder.
    """
    from transformers import AutoTokenizer

    folder, _, out = tiny_adapter
    merged = tmp_path / "merged"
    python(MERGE, "--adapter", folder, "--output", merged, check=0)
    row = data.rows("launch_en_train")
    trained = re.sub(r"(?m)^  ", "", re.search(r"  inputs:\n(.*?)  labels:", out, re.S)[1])
    (match,) = [r["messages"] for r in row if r["messages"][0]["content"] in trained]
    base = yaml.safe_load((folder / "config.yaml").read_text())["model_name_or_path"]
    for place in (ROOT / base, merged):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.apply_chat_template(match, tokenize=False).strip() == trained.strip(), (
            place
        )
        assert tokenizer.apply_chat_template(
            CONVERSATION[:1], add_generation_prompt=True, tokenize=False
        ).endswith("GPUs.<|im_end|>\n<|im_start|>assistant\n")


# -----------------------------------------------------------------------------
# Training, scoring


def test_training(adapter):
    folder, found, out = adapter
    assert found["losses"][0] > 20 * found["losses"][-1] and (
        found["world_size"],
        found["zero_stage"],
    ) == (1, 0)
    assert SYSTEM in out and "trainable params" in out
    assert all(
        (folder / f).is_file()
        for f in ("adapter_model.safetensors", "config.yaml", "training_loss.png")
    )


def test_score_before_and_after(adapter):
    """Nothing right before, at least three of four after; the printed scores are those of the stored
    answers.
    """
    done = run("make", "lf-score", f"ARGS=--adapter {adapter[0]} --limit 16", check=0)
    found = result(done)
    assert (
        found["base_exact_pct"] == 0 and found["tuned_exact_pct"] >= 75 and found["row_count"] == 16
    )
    answers = json.loads((RUNS / "06_LLaMA-Factory/answers.json").read_text())
    wanted = [row["messages"][1]["content"] for row in data.rows("launch_en_test")[:16]]
    assert [a["wanted"] for a in answers] == wanted
    assert (
        sum(a["tuned"] != w for a, w in zip(answers, wanted, strict=True)) == found["wrong_count"]
    )


def test_zero2_is_active_and_learns_the_same(tiny_adapter, tiny_model, tmp_path):
    """DeepSpeed's checkpoint says stage 2 of 2 processes; half of the rows in each gives the losses
    of one process.
    """
    arguments = ["template=chatml", "max_samples=64", "logging_steps=1", "learning_rate=0.02"]
    found = result(
        run(
            "make",
            "lf-train-z2",
            f"ARGS=--model {tiny_model} output_dir={tmp_path / 'z2'} {' '.join(arguments)}",
            check=0,
        )
    )
    assert (found["zero_stage"], found["world_size"]) == (2, 2)
    assert (
        found["losses"] == pytest.approx(tiny_adapter[1]["losses"], rel=1e-3)
        and found["losses"][0] > found["losses"][-1] + 0.1
    )
    assert (tmp_path / "z2/adapter_model.safetensors").is_file()


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
    found = result(python(TRAIN, "--zero2", "--model", tiny_model, *settings, check=0))
    assert (found["zero_stage"], found["world_size"]) == (stage, 2)


def test_the_stage_is_read_without_running_code(tmp_path):
    """Two processes and stage 2 from DeepSpeed's files; one that holds more than data is refused."""
    import pickle
    import types

    import torch

    read = runpy.run_path(str(MODULE / "outcome.py"))["read"]
    checkpoint = tmp_path / "checkpoint-4/global_step4"
    checkpoint.mkdir(parents=True)
    history = {"global_step": 4, "log_history": [{"loss": 2.0}, {"loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(history))
    (tmp_path / "all_results.json").write_text('{"train_loss": 1.5, "train_runtime": 3.0}')
    assert read(tmp_path, 0.0)[-2:] == (0, 0)
    for rank in (0, 1):
        (checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    state = {"ds_config": {"zero_optimization": {"stage": 2}}}
    torch.save(state, checkpoint / "mp_rank_00_model_states.pt")
    assert read(tmp_path, 0.0) == ([2.0, 1.0], 4, 3.0, 2, 2)
    torch.save(state | {"x": types.SimpleNamespace()}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read(tmp_path, 0.0)


# -----------------------------------------------------------------------------
# Merging, chat, servers


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "merged"
    found = result(
        run("make", "lf-merge", f"ARGS=--adapter {adapter[0]} --output {folder}", check=0)
    )
    assert found["merged_gb"] > 10 * found["adapter_gb"] > 0
    return folder


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


def test_adapter_and_merged_model_answer_alike(adapter, merged, small_model):
    """The same greedy tokens in float32, each through its own tokenizer and template; and the base
    answers otherwise.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    requests = prompts(6)
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter[0]).eval()
    expected = greedy(tuned, AutoTokenizer.from_pretrained(small_model), requests)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.float32
    assert greedy(plain, AutoTokenizer.from_pretrained(merged), requests) == expected
    with tuned.disable_adapter():
        assert (
            greedy(tuned, AutoTokenizer.from_pretrained(small_model), requests[:1]) != expected[:1]
        )


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


def test_api(adapter, no_jobs):
    """It answers in the trained format on loopback only, refuses a second start, and ends whole."""
    (request,) = prompts(1)
    out = run("make", "lf-api", f"ARGS=--adapter {adapter[0]}", check=0).stdout
    assert "http://127.0.0.1:8010/v1" in out and listening(8010) == ["127.0.0.1:8010"]
    body = json.dumps({"model": "tuned", "messages": [{"role": "user", "content": request}]})
    call = urllib.request.Request(
        "http://127.0.0.1:8010/v1/chat/completions",
        body.encode(),
        {"Content-Type": "application/json"},
    )
    answer = json.load(urllib.request.urlopen(call, timeout=120))["choices"][0]["message"][
        "content"
    ]
    assert answer == data.rows("launch_en_test")[0]["messages"][1]["content"]
    assert "already runs at http://127.0.0.1:8010" in refused(
        "make", "lf-api", f"ARGS=--adapter {adapter[0]}"
    )
    members = jobs.members(jobs.running()["lf-api"])
    jobs.stop(jobs.running()["lf-api"])
    assert (
        members
        and not [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        and not listening(8010)
    )


def test_webui(no_jobs):
    out = run("make", "lf-webui", check=0).stdout
    assert "http://127.0.0.1:7860" in out and listening(7860) == ["127.0.0.1:7860"]
    page = urllib.request.urlopen("http://127.0.0.1:7860/config", timeout=300).read().decode()
    assert "Model path" in page or "model_path" in page or "LLaMA" in page
    assert "launch_en_train" in (RUNS / "06_LLaMA-Factory/webui/data/dataset_info.json").read_text()


def test_port_in_use(tiny_adapter, no_jobs):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(
            "make", "lf-api", f"ARGS=--adapter {tiny_adapter[0]} --port {port}"
        )


def test_a_server_that_cannot_start_says_why(tiny_adapter, tmp_path, no_jobs):
    """The base model has lost its weights: the engine's own reason, exit code 2, no process."""
    import shutil

    folder, broken = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(tiny_adapter[0], folder)
    base = yaml.safe_load((folder / "config.yaml").read_text())["model_name_or_path"]
    shutil.copytree(ROOT / base, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = (folder / "config.yaml").read_text().replace(base, str(broken))
    (folder / "config.yaml").write_text(settings)
    said = refused("make", "lf-api", f"ARGS=--adapter {folder}")
    assert "stopped while starting" in said and "safetensors" in said and not ours()


def chat(adapter, text: str) -> str:
    """The output of `make lf-chat` for this input."""
    done = subprocess.run(
        ["make", "lf-chat", f"ARGS=--adapter {adapter}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout


def test_chat_with_piped_input(adapter):
    """The same answer as scoring gets."""
    (request,) = prompts(1)
    answer = data.rows("launch_en_test")[0]["messages"][1]["content"]
    assert f"Assistant: {answer}\n" in chat(adapter[0], f"{request}\nexit\n")


def test_chat_whose_input_ends_without_exit(tiny_adapter):
    assert "Assistant: " in chat(tiny_adapter[0], "Hello\n")


# -----------------------------------------------------------------------------
# What must be refused, and what must not stay


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["dataset=alpaca"],
            "there is no data set alpaca: dataset_info.json in modules/06_LLaMA-Factory/data has launch_en_train",
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
def test_bad_settings(arguments, words):
    if words is None:
        assert run("python", TRAIN, *arguments, check=2).stderr.count("unrecognized arguments") == 1
    else:
        assert words in refused("python", TRAIN, *arguments)


def test_bf16_on_a_cpu():
    assert "needs a GPU" in refused("make", "lf-train", "ARGS=bf16=true", PROFILE="cpu")


def test_broken_row(tmp_path):
    """A row without its answer: which row, which field, before LLaMA-Factory has seen the file."""
    rows = [
        *data.rows("launch_en_train")[:3],
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    info = {
        "mine": json.loads((MODULE / "data/dataset_info.json").read_text())["launch_en_train"]
        | {"file_name": "mine.json"}
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert "row 4: field `content` of the assistant" in refused(
        "python", TRAIN, f"dataset_dir={tmp_path}", "dataset=mine"
    )
    (tmp_path / "mine.json").unlink()
    assert "there is no data set" in refused(
        "python", TRAIN, f"dataset_dir={tmp_path}", "dataset=mine"
    )


@pytest.mark.parametrize("target", ["lf-score", "lf-merge", "lf-chat", "lf-api"])
def test_missing_adapter(target, tmp_path):
    assert "run 'make lf-train' first" in refused("make", target, f"ARGS=--adapter {tmp_path}")


def test_a_refusal_by_the_engine_is_one_sentence_and_keeps_what_was_trained(
    tiny_adapter, tiny_model
):
    folder = tiny_adapter[0]
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    said = refused("python", TRAIN, "--model", tiny_model, f"output_dir={folder}", "lora_rang=8")
    assert "Some keys are not used by the HfArgumentParser: ['lora_rang']" in said
    assert {
        f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()
    } == before and not ours()


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
        assert (
            sum("launcher.py" in " ".join(p.cmdline()) for p in members) >= 3
        )  # torchrun and its two workers
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        elif how == "sigterm":
            process.terminate()
        else:
            jobs.stop(jobs.running()["lf-x"])
        process.communicate(timeout=300)
        assert process.returncode != 0
        deadline = time.monotonic() + 20
        while [
            p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ] and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (
            not [p for p in members if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            and "lf-x" not in jobs.running()
        )
    finally:
        process.kill()
        if "lf-x" in (running := jobs.running()):
            jobs.stop(running["lf-x"])


def test_what_the_readme_says_of_the_package():
    """No src/train.py and no examples in the wheel, no `eval`, and vLLM as a back end only up to
    0.11.
    """
    from importlib.metadata import files

    names = [str(f) for f in files("llamafactory")]
    assert names and not [
        f for f in names if f.endswith("src/train.py") or f.startswith("examples/")
    ]
    done = run("llamafactory-cli", "eval")
    assert done.returncode != 0 and "NotImplementedError" in done.stderr
    source = (ROOT / ".venv/lib").glob("python3*/site-packages/llamafactory/hparams/parser.py")
    assert 'check_version("vllm>=0.4.3,<=0.11.0")' in next(source).read_text()
