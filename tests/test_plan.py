"""scripts/plan.py: answers, refusals, and this repository's own recipes on one and two cards."""

import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, refused
from conftest import python as python_here
from conftest import run as run_here

from lab import machine as this_machine
from lab import models
from lab.planner import speed, weights
from lab.planner.config import read
from lab.planner.constants import GIB
from lab.planner.serving import kv_bytes_per_token
from lab.profile import read_yaml

PLAN = "scripts/plan.py"
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CONFIG |= {"intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768}

# The planner then takes RTX 4090s, whatever this machine has.
NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}


def run(*command, **kwargs):
    return run_here(*command, **NO_CARD | kwargs)


def python(*command, **kwargs):
    return python_here(*command, **NO_CARD | kwargs)


def printed(line: str) -> dict:
    """The JSON object that the command prints."""
    return json.loads(python(PLAN, *shlex.split(line), "--json", check=0).stdout)


@pytest.fixture(scope="module")
def plan():
    """scripts/plan.py as a module."""
    import importlib

    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("plan")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def read_line(plan):
    """The question of a command line."""
    from plan_parts import arguments

    return arguments.read_line


@pytest.fixture(scope="module")
def answer(plan, read_line):
    """The answer to a command line."""
    return lambda line: plan.plan(read_line(line))


def test_a_name_a_folder_and_a_config_give_one_answer(tmp_path, answer):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    by_name = printed("serve --model qwen2.5-7b-instruct --gpus 1")
    assert by_name["fits"] and by_name["suggestion"] == "" and by_name["kv_tokens"] > 32768
    for model in ("Qwen/Qwen2.5-7B-Instruct", tmp_path, tmp_path / "config.json"):
        assert answer(f"serve --model {model} --gpus 1") == by_name


HEAVY = {"torch", "vllm", "transformers", "deepspeed", "accelerate", "numpy", "omegaconf"}


def test_no_engine_and_no_network(tmp_path):
    """An answer needs neither torch nor an engine, and opens no connection."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code = (
        "import runpy, socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "sys.path.insert(0, 'scripts')\n"  # as Python does for a script
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for line in (
        f"serve --model {tmp_path} --json",
        f"train --model {tmp_path}/config.json",
        "image-edit --recipe nf4",
        "",
    ):
        python("-c", code, PLAN, *shlex.split(line), check=0)


FITS = {  # what must and must not fit 2 x 24 GB, each from a published or measured fact
    # facts of the model cards: 29.5 GB over two cards
    "serve --model qwen2.5-14b-instruct --max-model-len 8192": True,
    "serve --model qwen2.5-14b-instruct --gpus 1": False,
    "serve --model qwen2.5-14b-instruct --gpus 1 --dtype fp8 --max-model-len 8192": True,
    "serve --model qwen2.5-32b-instruct --max-model-len 8192": False,
    "serve --model qwen2.5-32b-instruct --dtype int4 --max-model-len 8192": True,
    "serve --model qwen2.5-7b-instruct --gpus 1 --dtype float32": False,
    "train --model qwen2.5-7b-instruct --gpus 1 --dtype float32": False,
    "train --model qwen2.5-7b-instruct --gpus 2 --zero 3 --checkpointing": False,
    "train --model qwen2.5-7b-instruct --zero 3 --offload optimizer+param --checkpointing": True,
    "train --model qwen2.5-7b-instruct --gpus 1 --method qlora --checkpointing": True,
    "train --model qwen2.5-1.5b-instruct --gpus 1": False,
    "train --model qwen2.5-7b-instruct --gpus 2 --engine ddp": False,
    "train --model qwen2.5-14b-instruct --method lora --zero 3 --checkpointing": True,
    "train --model qwen2.5-32b-instruct --method lora --engine fsdp": False,
    "train --model qwen2.5-32b-instruct --method lora --checkpointing": False,
    "train --model qwen2.5-14b-instruct --zero 3 --load whole --method lora": False,
    "train --model qwen2.5-7b-instruct --method lora --loss dpo --checkpointing": True,
    "train --model qwen2.5-7b-instruct --method lora --loss dpo --checkpointing --micro-batch 2": (
        False
    ),
    "image-edit --gpus 2 --recipe plain": False,
    "image-edit --gpus 2 --recipe fp8": True,
    "image-edit --gpus 1 --recipe fp8": False,
    "image-edit --gpus 1 --recipe nf4": True,
    "image-edit --gpus 1 --recipe group-offload": True,
    "image-edit --gpus 1 --recipe model-offload": False,
    "image-edit --gpus 2 --recipe gguf": True,
}


@pytest.mark.parametrize("line", FITS)
def test_verdicts(answer, line):
    verdict = answer(line)
    assert verdict["fits"] == FITS[line], verdict
    parts = dict(verdict["per_gpu_gib"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=0.02)
    assert parts["weights"] >= 0 and verdict["host_gib"] > 0
    assert bool(verdict["suggestion"]) != verdict["fits"]


@pytest.mark.parametrize("line", [line for line, fits in FITS.items() if not fits])
def test_suggestions_fit(answer, line):
    """What the planner proposes is a command line of its own, and that one fits."""
    suggestion = answer(line)["suggestion"]
    assert suggestion.startswith("--"), suggestion
    assert answer(f"{line} {suggestion}")["fits"]


def test_three_cards_take_the_split_that_the_heads_allow(answer):
    """28 heads over 3 cards: two of them are used, unless three are asked for."""
    three = answer("serve --model qwen2.5-7b-instruct --gpus 3")
    two = answer("serve --model qwen2.5-7b-instruct --gpus 2")
    assert three["tp"] == 2 and three | {"notes": []} == two
    assert "over 3 cards does not divide the model: it has 28 heads" in three["notes"][0]


def test_preferences(answer):
    """A second model only beside full training; pairs are two sequences; no speed is predicted."""
    line = "train --model qwen2.5-1.5b-instruct --gpus 1 --checkpointing"
    answers = {}
    for method in ("full", "lora"):
        for loss in ("sft", "dpo", "kto", "simpo", "orpo"):
            answers[method, loss] = answer(f"{line} --method {method} --loss {loss}")
    with_reference = {key for key, it in answers.items() if "reference_model" in it["per_gpu_gib"]}
    assert with_reference == {("full", "dpo"), ("full", "kto")}
    assert answers["full", "dpo"]["per_gpu_gib"]["reference_model"] == pytest.approx(
        1_543_714_304 * 2 / 2**30, abs=0.01
    )
    assert (
        answers["lora", "dpo"]["moment"]
        == answers["lora", "kto"]["moment"]
        == ("reference forward")
    )
    logits = {
        loss: answers["lora", loss]["per_gpu_gib"]["logits"] / (151_936 * 1024 / 2**30)
        for loss in ("sft", "dpo", "kto", "simpo", "orpo")
    }
    expected = {"sft": 12, "dpo": 40, "kto": 24, "simpo": 24, "orpo": 24}
    assert logits == pytest.approx(expected, rel=1e-3)
    assert answers["lora", "sft"]["predicted_speed"]
    assert not answers["lora", "dpo"]["predicted_speed"]


@pytest.mark.parametrize(
    "variant, model",
    [
        ("dpo", "qwen2.5-7b-instruct"),
        ("simpo", "qwen2.5-7b-instruct"),
        ("orpo", "qwen2.5-7b-instruct"),
        ("kto", "qwen2.5-7b-instruct"),
        ("dpo-1.5b", "qwen2.5-1.5b-instruct"),
        ("full-dpo", "qwen2.5-0.5b-instruct"),
        ("full-512", "qwen2.5-0.5b-instruct"),
    ],
)
def test_preferences_as_measured(answer, variant, model):
    """Within 1 % of the peak of PyTorch's allocator; the plans were made before the measurement."""
    file = ROOT / f"results/h200-cap24/06_LLaMA-Factory/01_train-{variant}.json"
    record = json.loads(file.read_text())
    used = record["config"]
    loss = used.get("pref_loss", used["stage"])
    planned = answer(
        f"train --model {model} --gpus 1 --checkpointing --method {used['finetuning_type']} "
        f"--lora-rank {used['lora_rank']} --loss {'dpo' if loss == 'sigmoid' else loss} "
        f"--seq-len {used['cutoff_len']} --micro-batch {used['per_device_train_batch_size']} "
        f"--accumulate {used['gradient_accumulation_steps']}"
    )["per_gpu_gib"]
    total = planned["total"] - planned["cuda_context"]
    assert total == pytest.approx(record["metrics"]["peak_gib"], rel=0.01)


def test_a_recipe_has_the_loss_of_its_settings(plan):
    """By LLaMA-Factory's stage and pref_loss; two rows a card, of which four would not fit."""
    recipes = {recipe.command: recipe.request for recipe in recipes_on(plan, 1)}
    for name in ("dpo", "kto", "simpo", "orpo"):
        setup = recipes[f"make lf-train METHOD={name}"].setup
        assert (setup.loss, setup.micro_batch, setup.accumulate) == (name, 2, 4)
    assert recipes["make lf-train"].setup.loss == "sft"


def test_no_suggestion_where_nothing_helps(answer):
    small_card = answer("serve --model qwen2.5-32b-instruct --gpus 1 --gpu-memory-gib 8")
    assert "smaller model" in small_card["suggestion"]


TWO_CARDS = {
    *(f"make vllm-serve RECIPE={name}-tp2" for name in ("32b-awq", "qwen3.5-27b-fp8")),
    *(f"make vllm-serve RECIPE={name}-tp2" for name in ("gemma-4-31b-w4a16", "qwen3-vl-8b")),
    *("make lf-train-z2 METHOD=ddp", "make lf-train-z2", "make lf-train-z2 METHOD=zero3"),
    "make lf-train-z2 METHOD=zero3 MODEL=qwen2.5-14b-instruct",
    *("make train-ddp", "make train-z2-offload", "make train-z3-nvme"),
    *("make train-z3-offload", "make train-z3-offload CONFIG=z3-offload-64gb"),
    *(f"make train-z{stage}" for stage in range(4)),
    *(f"make train-accelerate CONFIG={name}" for name in ("ddp", "fsdp", "deepspeed_zero2")),
}
ON_NO_CARD = "modules/06_LLaMA-Factory/configs/merge.yaml"  # export_device: cpu
INSIDE = {  # read through sft_lora_z2.yaml and methods/zero3.yaml
    f"modules/06_LLaMA-Factory/configs/{name}.json" for name in ("zero2", "zero3")
}


def recipes_on(plan, count: int) -> list:
    from plan_parts import Cards

    return plan.recipes(Cards(f"4090x{count}", count))


@pytest.mark.parametrize("cards", [1, 2])
def test_every_recipe_of_the_repository_fits(plan, cards):
    """No recipe that the profile's 24 GB cards cannot hold may be committed."""
    recipes = recipes_on(plan, cards)
    too_many = {recipe.command for recipe in recipes if recipe.request.setup.gpus > cards}
    assert too_many == (TWO_CARDS if cards == 1 else set())
    for command, file, request in recipes:
        verdict = plan.plan(request)
        needed = f"{command} ({file}) on {request.setup.gpus} x 24 GB: {verdict['per_gpu_gib']}"
        assert verdict["fits"], f"{needed}; {verdict['suggestion']}"


@pytest.mark.parametrize("cards", [1, 2])
def test_no_configuration_slips_past_the_planner(plan, cards):
    configurations = [
        *ROOT.glob("modules/*/configs/*.*"),
        *ROOT.glob("modules/03_vllm/configs/recipes/*"),
        ROOT / "modules/05_DeepSpeed/ds_config.json",
    ]
    files = {path.relative_to(ROOT).as_posix() for path in configurations}
    own_profile = f"configs/profiles/4090x{cards}.yaml"
    planned = {recipe.file for recipe in recipes_on(plan, cards)}
    files = {file for file in files if "two_nodes" not in file}  # how it is started, no recipe
    planned = {file for file in planned if "/methods/" not in file}  # some need what LoRA needs
    assert planned - {own_profile} == files - {ON_NO_CARD} - INSIDE
    sections = set()
    for name, values in read_yaml(ROOT / own_profile).items():
        if isinstance(values, dict) and values.get("model"):
            sections.add(name)
    known = {"smoke", "serve", "image_edit", "throughput", "train", "zero", "finetune"}
    assert sections == known, "a new section needs a line in scripts/plan_parts/recipes.py"


def test_a_recipe_that_does_not_fit_is_found(plan):
    """The tests above can fail: a 14B served on one card."""
    two_cards = recipes_on(plan, 2)[0].request
    on_one_of_them = replace(two_cards.setup, tp=1)
    assert not plan.plan(two_cards._replace(setup=on_one_of_them))["fits"]
    one_card = recipes_on(plan, 1)[0].request
    assert not plan.plan(one_card._replace(model="qwen2.5-14b-instruct"))["fits"]


def card(name: str, cuda_gib: float, *capability: int) -> dict:
    return {
        "index": 0,
        "uuid": "",
        "name": f"NVIDIA GeForce {name}",
        "capability": list(capability),
        "memory_gib": cuda_gib,
        "cuda_gib": cuda_gib,
    }


RTX3090 = card("RTX 3090", 23.6, 8, 6)
RTX4090 = card("RTX 4090", 23.6, 8, 9)
RTX5090 = card("RTX 5090", 31.3, 12, 0)


@pytest.fixture
def answer_on(plan, read_line, monkeypatch):
    """The answer to a command line on a machine with these cards."""
    from plan_parts import cards_here

    for variable in ("PROFILE", "MEMORY_CAP_GIB"):
        monkeypatch.delenv(variable, raising=False)

    def answer_on(cards: list[dict], line: str) -> dict:
        monkeypatch.setattr(this_machine, "gpus", lambda: cards)
        return plan.plan(read_line(line, cards_here()))

    return answer_on


SERVE = "serve --model qwen2.5-14b-instruct --max-model-len 8192"


def test_the_cards_own_values(answer_on):
    """A larger card holds more, a faster one is faster, one without FP8 says so."""
    ampere = answer_on([RTX3090] * 2, SERVE)
    ada = answer_on([RTX4090] * 2, SERVE)
    blackwell = answer_on([RTX5090] * 2, SERVE)
    assert ada == answer_on([], SERVE) and ada["notes"] == []
    assert ampere["kv_tokens"] == ada["kv_tokens"] and blackwell["kv_tokens"] > 2 * ada["kv_tokens"]
    for name in ("decode_tok_per_s", "prefill_tok_per_s"):
        speeds = [answer["predicted_speed"][name] for answer in (ampere, ada, blackwell)]
        assert speeds == sorted(set(speeds))

    fp8 = "serve --model qwen2.5-7b-instruct --max-model-len 8192 --dtype fp8"
    on_ada = answer_on([RTX4090], fp8)
    on_ampere = answer_on([RTX3090], fp8)
    name = "decode_tok_per_s"
    ratio = on_ada["predicted_speed"][name] / on_ampere["predicted_speed"][name]
    # A step of one request reads the memory, and has some time of its own.
    assert 1.04 < ratio < 1008 / 936
    assert "RTX 3090 multiplies no FP8" in on_ampere["notes"][0] and on_ada["notes"] == []


def test_which_of_the_cards_count(answer_on, monkeypatch):
    two_4090s = answer_on([RTX4090] * 2, SERVE)
    two_3090s = answer_on([RTX3090] * 2, SERVE)
    # Of two unlike cards the smaller memory and the slower card.
    unlike = answer_on([RTX5090, RTX3090], SERVE)
    assert unlike["kv_tokens"] == two_3090s["kv_tokens"]
    assert unlike["predicted_speed"] == two_3090s["predicted_speed"]
    assert answer_on([card("RTX 6000", 47.0, 8, 9)] * 2, SERVE)["predicted_speed"] == {}
    # One card is planned for as one, more than two as the two that the profile takes.
    assert answer_on([RTX4090], SERVE)["fits"] is False
    assert answer_on([RTX4090] * 4, SERVE) == two_4090s
    # A capped one as the smaller that it stands for.
    monkeypatch.setenv("MEMORY_CAP_GIB", "23.6")
    assert answer_on([RTX5090] * 2, SERVE)["kv_tokens"] == two_4090s["kv_tokens"]


@pytest.mark.parametrize(
    ("card", "suggestion", "way"),
    [
        (RTX4090, "--kv-dtype fp8", "TRITON_ATTN"),
        (RTX3090, "--concurrency 3", "leave --kv-cache-dtype out"),
    ],
    ids=["with FP8", "without"],
)
def test_an_fp8_cache_needs_a_word(answer_on, card, suggestion, way):
    """vLLM reads it by FlashInfer, which nvcc compiles; on cards with FP8, Triton reads it too.

    No card without is advised to it.
    """
    line = "serve --model qwen2.5-7b-instruct --gpus 1 --max-model-len 32768 --concurrency 5"
    advised = answer_on([card], line)
    asked = answer_on([card], f"{line} --kv-dtype fp8")
    assert advised["suggestion"] == suggestion and way in asked["notes"][0]
    assert ("TRITON_ATTN" in str(advised["notes"])) == ("fp8" in suggestion)


def test_make_plan_on_one_card():
    out = run("make", "plan", "PROFILE=4090x1", check=0).stdout
    assert "this repository on 1 x RTX 4090" in out and "DOES NOT FIT" not in out
    lines = [line for line in out.splitlines() if line.endswith("needs 2 cards")]
    assert {line.split("  ")[0] for line in lines} == TWO_CARDS


def test_make_plan_on_3090s():
    rtx3090 = {"name": "NVIDIA GeForce RTX 3090", "memory_gib": 24, "reserved_gib": 0.31}
    machine = {
        "FAKE_CARDS": json.dumps([rtx3090 | {"capability": [8, 6]}] * 2),
        "PYTHONPATH": str(ROOT / "tests/fakes"),
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    out = python(PLAN, check=0, **machine).stdout
    assert "this repository on 2 x RTX 3090" in out and "DOES NOT FIT" not in out
    serve = ["serve", "--model", "qwen2.5-7b-instruct", "--dtype", "fp8"]
    out = python(PLAN, *serve, check=0, **machine).stdout
    assert "on 2 x 23.6 GiB" in out and "predicted speed on RTX 3090s" in out
    assert "RTX 3090 multiplies no FP8" in out


def test_cards_are_described_with_their_sources():
    for name, rates in read_yaml(ROOT / "configs/cards.yaml").items():
        assert rates["source"] and speed.nominal(1, (name,)).bandwidth == rates["bandwidth"] * 1e9
    assert speed.nominal() == speed.Machine()


def test_make_plan():
    out = run("make", "plan", check=0).stdout
    assert "make vllm-serve" in out and "make train-z3" in out and "DOES NOT FIT" not in out
    too_large = "ARGS=serve --model qwen2.5-14b-instruct --gpus 1"
    out = run("make", "plan", too_large, check=0).stdout
    assert "does not fit; the cheapest change that does: " in out


def test_the_readme_shows_what_appears():
    """The sample in module 01's readme, line by line, in the output of its command."""
    text = (ROOT / "modules/01_single_gpu_smoke/planner.md").read_text()
    sample = re.search(r"```text\n(serve .*?)```", text, re.S)[1]
    command = ["serve", "--model", "qwen2.5-32b-instruct", "--gpus", "2"]
    out = python(PLAN, *command, check=0).stdout.splitlines()
    assert all(line in out for line in sample.splitlines() if line.strip() != "...")


def test_calibration_lines(answer):
    """Every line is a command of the planner that it says fits, and no test line is a fit line."""
    cases = read_yaml(ROOT / "configs/calibration.yaml")
    assert {case["use"] for case in cases.values()} == {"fit", "test"}
    assert len({case["plan"] for case in cases.values()}) == len(cases)
    for name, case in cases.items():
        assert answer(case["plan"])["fits"], name


CALIBRATE = "scripts/calibrate.py"


def test_calibrate_without_a_gpu():
    """No GPU is no error: it says so; an unknown line is one."""
    done = python(CALIBRATE, "--only", "full-0.5b", check=0, PROFILE="cpu")
    assert "it needs 1 x 24 GiB" in done.stderr
    assert "nothing to measure on this machine" in done.stdout
    assert "there is no line full-9b" in refused("python", CALIBRATE, "--only", "full-9b")


@pytest.mark.parametrize("flags", ["", "--method lora --checkpointing"])
def test_calibrate_trains(flags, tiny_model):
    """What measures on a GPU trains on a CPU too; only there is no device memory to read."""
    line = f"train --gpus 1 --seq-len 64 --model {tiny_model} {flags}"
    done = python(CALIBRATE, "--worker", line, check=0, PROFILE="cpu")
    assert json.loads(done.stdout.removeprefix("measured "))["host_gib"] > 0.1


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        "--engine fsdp",
        "--engine fsdp --method lora --offload optimizer+param",
        "--zero 2",
        "--zero 3 --offload optimizer+param",
        "--zero 3 --offload optimizer+param --method lora",
    ],
)
def test_calibrate_trains_divided(flags, tiny_model):
    line = f"train --gpus 2 --seq-len 64 --model {tiny_model} {flags}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"PROFILE": "cpu", "DS_ACCELERATOR": "cpu"}
    done = python(*launcher, CALIBRATE, "--worker", line, check=0, **environment)
    assert '"host_gib"' in done.stdout


@pytest.mark.long
def test_calibrate_serves(read_line, tiny_model, tmp_path, monkeypatch):
    """vLLM's own report of its cache is read from a real engine, 1 GiB on a CPU; and its times."""
    import importlib

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config = models.config(str(tiny_model)) | {"head_dim": 32}  # vLLM's least on a CPU
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    line = f"serve --gpus 1 --model {file} --max-model-len 512 --max-num-seqs 8 --enforce-eager"
    measured = importlib.import_module("calibrate").serve(read_line(line), tmp_path / "log")
    assert {"batch_1_step_ms", "batch_8_step_ms"} == {name for name in measured if "step" in name}
    model = read(config)
    cache_gib = measured["kv_tok_count"] * kv_bytes_per_token(model) / GIB
    assert cache_gib == pytest.approx(1, rel=0.02)


@pytest.fixture(scope="module")
def tables(plan):
    import importlib

    return importlib.import_module("tables")


@pytest.mark.parametrize("use", ["fit", "test"])
def test_predictions_hold_against_measurement(tables, use):
    """Serving within 2 %, the peak of training and the host's memory within 5 %.

    On lines that fixed no constant, and on the others.
    """
    rows = tables.errors(use)
    goals = {"weights (GiB)": 0.02, "KV tokens": 0.02, "peak (GiB)": 0.05, "host (GiB)": 0.05}
    assert len(rows) >= 12 and {row.quantity for row in rows} == goals.keys()
    for row in rows:
        goal = goals[row.quantity]
        assert row.predicted == pytest.approx(row.measured, rel=goal), row


@pytest.fixture(scope="module")
def speeds(plan):
    import importlib

    return importlib.import_module("speeds")


def test_speeds_hold_against_measurement(speeds):
    """On lines that fixed no constant: what waits for the card within 11 %, others within 35 %."""
    rows = [row for row in speeds.compared() if row.use == "test"]
    assert {row.kind for row in rows} == {"decode", "prefill", "training", "busy"}
    assert len(rows) >= 30
    for row in rows:
        few = re.fullmatch(r"a step of ([\d,]+) (requests|tokens a card)", row.what)
        number = int(few[1].replace(",", "")) if few else 0
        waits = number <= 32 if row.kind == "decode" else number >= 4096
        goal = 0.11 if few and waits else 0.35
        assert row.predicted_ms == pytest.approx(row.measured_ms, rel=goal), row


def test_speeds_of_4090s_that_others_published(speeds):
    """A sweep whose load is known, within 20 %; it fixed no constant."""
    sweep = [row for row in speeds.published() if row.model.startswith("mistral")]
    assert len(sweep) == 5
    for row in sweep:
        assert row.predicted == pytest.approx(row.measured, rel=0.2), row


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("serve --model qwen3-30b-a3b --gpus 2", "only dense models with full attention"),
        ("serve --model gpt-oss-20b --gpus 1", "only dense models with full attention"),
        ("serve --model qwen2.5-7b-instruct --gpus 1 --dtype int4", "int4 was not measured"),
        ("serve --model qwen2.5-7b-instruct --gpus 1 --enforce-eager", "without CUDA graphs"),
        ("train --model qwen2.5-7b-instruct --zero 2 --offload optimizer", "the host's memory"),
        ("train --model qwen2.5-vl-7b-instruct --image-tokens 324", "no training with pictures"),
    ],
)
def test_no_speed_for_what_was_not_measured(plan, read_line, capsys, flags, why):
    request = read_line(flags)
    answer = plan.plan(request)
    assert answer["predicted_speed"] == {}
    plan.show(request, answer)
    assert f"no predicted speed: {why}" in capsys.readouterr().out


def test_expected_speeds(speeds, capsys):
    """Ranges hold their prediction; one card runs what one card can; slower cards are slower."""
    from plan_parts import Cards

    two = {(row.command, row.what): row for row in speeds.expected(Cards())}
    for row in two.values():
        assert row.low < row.predicted < row.high, row
    one = {(row.command, row.what) for row in speeds.expected(Cards("4090x1", 1))}
    commands = {command for command, _ in one}
    assert "make vllm-serve" in commands and "make train-z2" not in commands
    for row in speeds.expected(Cards(names=("RTX 3090",), fp8=False)):
        faster = two[row.command, row.what]
        assert (row.predicted > faster.predicted) == (row.unit == "ms"), row
    with pytest.raises(SystemExit, match="2"):
        list(speeds.expected(Cards(names=("RTX 6000",))))
    assert "configs/cards.yaml has no RTX 6000" in capsys.readouterr().err


def test_states_hold_against_measurement(tables):
    """Bytes of parameters, gradients and optimizer states in the records of every stage: 2 %."""
    rows = tables.errors("states")
    assert len(rows) >= 10
    for row in rows:
        assert row.predicted == pytest.approx(row.measured, rel=0.02), row


BAD = {
    "no config": ("serve --model {tmp}", "no config.json"),
    "no such model": ("serve --model nowhere", "there is no model nowhere"),
    "not json": ("serve --model {tmp}/broken.json", "is no config.json"),
    "a list": ("serve --model {tmp}/list.json", "must be an object"),
    "unknown architecture": ("serve --model {tmp}/unknown.json", "OneForAllForCausalLM"),
    "a size missing": ("serve --model {tmp}/half.json", "hidden_size"),
    "a negative size": ("train --model {tmp}/negative.json", "must be a whole number, at least 1"),
    "tp and heads": ("serve --model qwen2.5-7b-instruct --gpus 3 --tp 3", "does not divide"),
    "tp and cards": ("serve --model qwen2.5-7b-instruct --gpus 1 --tp 2", "needs 2 cards"),
    "no gpus": ("serve --model qwen2.5-7b-instruct --gpus 0", "at least 1"),
    "absurd batch": ("train --model qwen2.5-7b-instruct --micro-batch -4", "at least 1"),
    "a word for a number": ("train --model qwen2.5-7b-instruct --seq-len many", "whole number"),
    "no memory": ("serve --model qwen2.5-7b-instruct --gpu-memory-gib 0", "at least 0.1"),
    "not a number": ("serve --model qwen2.5-7b-instruct --gpu-memory-gib nan", "at least 0.1"),
    "more than the card": (
        "serve --model qwen2.5-7b-instruct --gpu-memory-utilization 1.5",
        "share of the card",
    ),
    "zero 9": ("train --model qwen2.5-7b-instruct --zero 9", "0, 1, 2, 3"),
    "offload without zero": ("train --model qwen2.5-7b-instruct --offload optimizer", "--zero"),
    "fsdp offloads all": (
        "train --model qwen2.5-7b-instruct --engine fsdp --offload optimizer",
        "--offload optimizer+param",
    ),
    "fsdp and nvme": (
        "train --model qwen2.5-7b-instruct --engine fsdp --offload optimizer+param "
        "--offload-device nvme",
        "to the host only",
    ),
    "nvme without offload": (
        "train --model qwen2.5-7b-instruct --offload-device nvme",
        "moves nothing without --offload",
    ),
    "offloaded reference": (
        "train --model qwen2.5-7b-instruct --loss dpo --zero 3 --offload optimizer+param",
        "where dpo's reference model lies",
    ),
    "unknown loss": ("train --model qwen2.5-7b-instruct --loss ppo", "invalid choice: 'ppo'"),
    "awq in full": ("train --model qwen2.5-32b-instruct-awq", "--method lora"),
    "awq packed again": (
        "train --model qwen2.5-32b-instruct-awq --method qlora --gpus 1",
        "packs 16-bit weights only: give --method lora",
    ),
    "awq and zero 3": (
        "train --model qwen2.5-32b-instruct-awq --method lora --zero 3",
        "divides none of those by ZeRO-3 or FSDP",
    ),
    "awq and fsdp": (
        "train --model qwen2.5-32b-instruct-awq --method lora --engine fsdp",
        "divides none of those by ZeRO-3 or FSDP",
    ),
    "pictures without a tower": (
        "train --model qwen2.5-7b-instruct --image-tokens 100",
        "this one has none",
    ),
    "pictures longer than the sequence": (
        "train --model qwen2.5-vl-7b-instruct --method lora --image-tokens 2000",
        "are more than --seq-len 1024",
    ),
    "image model": ("image-edit --model qwen2.5-7b-instruct", "image editing model"),
    "image recipe": ("image-edit --recipe magic", "unknown recipe magic"),
}


@pytest.fixture
def bad_files(tmp_path):
    half = {name: value for name, value in CONFIG.items() if name != "hidden_size"}
    contents = {
        "list": [],
        "unknown": CONFIG | {"architectures": ["OneForAllForCausalLM"]},
        "half": half,
        "negative": CONFIG | {"num_hidden_layers": -3},
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, plan, bad_files, monkeypatch, capsys):
    line, reason = BAD[case]
    command = ["plan.py", *shlex.split(line.format(tmp=bad_files))]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(this_machine, "gpus", list)
    with pytest.raises(SystemExit) as exit_code:
        plan.main()
    written = capsys.readouterr()
    assert exit_code.value.code == 2 and written.out == ""
    assert re.fullmatch(rf"error: .*{re.escape(reason)}.*\n", written.err), written.err


def test_a_refusal_of_the_command():
    assert "--tp 2 x --pp 1 needs 2 cards, there are 1" in refused(
        "python", PLAN, *shlex.split(BAD["tp and cards"][0])
    )


def test_quantised_checkpoints_are_understood():
    """Qwen2.5-32B-Instruct-GPTQ-Int4 and -AWQ have 19.3 GB, as their config.json has it."""
    config = models.config("qwen2.5-32b-instruct")
    for method in ("gptq", "awq"):
        model = read(config | {"quantization_config": {"quant_method": method, "bits": 4}})
        assert model.stored == "int4"
        assert weights.stored_bytes(model) / 1e9 == pytest.approx(19.3, rel=0.01)
    assert read(config | {"quantization_config": {"quant_method": "fp8"}}).stored == "fp8"


def test_communication_model():
    """The alpha-beta model at its edges.

    One card moves nothing; large messages go at the ring's 2 (n-1)/n; small ones by latency.
    """
    machine = speed.Machine(gpus=1024, gpus_per_node=8)

    def seconds(kind: str, size: float, cards: int) -> float:
        return speed.collective(kind, size, cards, machine)

    assert seconds("all_reduce", 1e9, 1) == 0
    assert seconds("all_reduce", 1e9, 2) == pytest.approx(1e9 / machine.link, rel=0.01)
    assert seconds("all_gather", 1e9, 8) == pytest.approx(7 / 8 * 1e9 / machine.link, rel=0.01)
    small = seconds("all_reduce", 8, 1024)
    assert small == pytest.approx(20 * machine.network_latency, rel=0.01)
    times = [seconds("all_reduce", 1e9, cards) for cards in (2, 8, 16, 64, 1024)]
    assert times == sorted(times)
