"""DeepSpeed: every ZeRO stage computes what plain data parallelism computes, holds the bytes it promises, and refuses bad input."""

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, python, refused, run

from lab import jobs, memory, models

MODULE = ROOT / "modules/05_DeepSpeed"
TRAIN = MODULE / "train.py"
CONFIGS = [MODULE / "ds_config.json", *sorted((MODULE / "configs").glob("*.json"))]
CPU = {"PROFILE": "cpu"}  # on GPUs too: what is compared is computed in fp32
STEPS, MICRO_BATCH, ACCUMULATE, LEARNING_RATE = 5, 2, 2, "1e-3"
# Bytes per parameter of (parameters, gradients, optimizer states) in each of 2 processes in fp32, written out.
BYTES = {0: (4, 4, 8), 1: (4, 4, 6), 2: (4, 2, 6), 3: (2, 2, 6)}


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours() -> list[int]:
    """Living processes of this module's training, launchers included, whoever started them."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if "modules/05_DeepSpeed/train.py" in " ".join(p.info["cmdline"] or [])]


def shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved") / "z3"


@pytest.fixture(scope="module")
def stages(tiny_model, saved) -> dict[int, dict]:
    """One training at each stage, two processes each, started as the readme says; stage 3 also saves."""
    flags = f"--model {tiny_model} --micro-batch {MICRO_BATCH} --accumulate {ACCUMULATE} --learning-rate {LEARNING_RATE}"
    found = {}
    for stage in BYTES:
        more = f" --steps {STEPS - 1} --save {saved}" if stage == 3 else f" --steps {STEPS}"
        done = run("make", f"train-z{stage}", f"ARGS={flags}{more}", **CPU)
        found[stage] = result(done)
        assert len(done.stdout.splitlines()) == 1, "the launcher's chatter belongs to stderr"
    return found


@pytest.fixture(scope="module")
def reference(tiny_model) -> list[float]:
    """Losses of one process without DeepSpeed that sees the same blocks in every step."""
    flags = ["--steps", STEPS, "--micro-batch", 2 * MICRO_BATCH, "--accumulate", ACCUMULATE, "--learning-rate", LEARNING_RATE]
    return result(python("modules/04_Accelerate/01_train_ddp.py", "--model", tiny_model, *flags, **CPU))["losses"]


@pytest.mark.parametrize("stage", BYTES)
def test_the_engine_runs_the_stage_of_the_target(stages, stage):
    assert (stages[stage]["zero_stage"], stages[stage]["world_size"]) == (stage, 2)


@pytest.mark.parametrize("stage", BYTES)
def test_losses_are_those_of_one_process(stages, reference, stage):
    """Two processes with micro-batch b, their states divided or not, and one process with 2b: the same numbers, step by step."""
    losses = stages[stage]["losses"]
    assert len(losses) == STEPS - (stage == 3) and losses[-1] < losses[0] - 0.1, "the losses must fall, or equality proves little"
    for ours_, theirs in zip(losses, reference, strict=False):
        assert ours_ == pytest.approx(theirs, rel=5e-6)


@pytest.mark.parametrize("stage", BYTES)
def test_state_bytes(stages, stage):
    """The tensors of the running engine weigh what the theory says, each kind by itself; so does the script's own theory."""
    for kind, width in zip(("parameter", "gradient", "optimizer"), BYTES[stage], strict=True):
        expected = width * stages[stage]["parameters_count"] / 2**30
        assert stages[stage][f"{kind}_state_gib"] == pytest.approx(expected, rel=0.02), kind
        assert stages[stage][f"{kind}_state_theory_gib"] == pytest.approx(expected, rel=1e-9), kind


@pytest.mark.parametrize("stage", BYTES)
def test_the_planner_predicts_these_bytes(stages, tiny_model, stage):
    """lab/memory.py, which knows only the config.json, against the tensors of the running engine, each kind within 2 %."""
    model = memory.read(models.config(str(tiny_model)))
    assert model.parameters == stages[stage]["parameters_count"]
    predicted = memory.train(model, gpus=2, engine="deepspeed", zero=stage, dtype="float32", accumulate=ACCUMULATE)["states_gib"]
    for kind, name in (("parameter", "parameters"), ("gradient", "gradients"), ("optimizer", "optimizer")):
        assert predicted[name] == pytest.approx(stages[stage][f"{kind}_state_gib"], rel=0.02), kind


def test_compare(stages, reference):
    """The trainings above side by side, from their records; others, with another learning rate or not run, are named and left out."""
    done = run("make", "-s", "train-compare", check=0)
    found = result(done)
    assert found["engine_count"] >= 5 and found["compared_step_count"] == STEPS - 1 and found["largest_difference_ratio"] < 5e-6
    assert all(f"train_z{stage}_difference_ratio" in found for stage in BYTES)


def test_compare_refuses_and_leaves_out(tmp_path, reference):
    """No yardstick; nothing beside it; then the record of a training with another seed."""
    assert "the yardstick is missing: run 'make train-one'" in refused("make", "train-compare", RECORDS=str(tmp_path))
    record = json.loads((ROOT / "runs/tests/records/04_Accelerate/01_train_ddp-one.json").read_text())
    (tmp_path / "04_Accelerate").mkdir()
    (tmp_path / "04_Accelerate/01_train_ddp-one.json").write_text(json.dumps(record))
    record["config"]["seed"] = 7
    (tmp_path / "04_Accelerate/01_train_ddp.json").write_text(json.dumps(record))
    done = run("make", "-s", "train-compare", check=2, RECORDS=str(tmp_path))
    assert "other settings: make train-ddp (seed 7, not 0)" in done.stdout and "not run: make train-z3" in done.stdout and "nothing to compare" in done.stderr


def test_every_stage_saves_memory(stages):
    sums = [stages[stage]["state_gib"] for stage in BYTES]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == 4


def test_a_stage_3_model_is_saved_whole(stages, saved, reference):
    """The folder loads in plain transformers, no tensor is empty, and the loss on the next step's blocks is the reference's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lab import data

    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert all(w.numel() for w in model.parameters()) and sum(w.numel() for w in model.parameters()) == stages[3]["parameters_count"]
    blocks = data.blocks(AutoTokenizer.from_pretrained(saved), "launch_en_train", 128)
    per_step = 2 * MICRO_BATCH * ACCUMULATE
    batch = blocks[(STEPS - 1) * per_step : STEPS * per_step]
    with torch.no_grad():
        assert model(input_ids=batch, labels=batch).loss.item() == pytest.approx(reference[STEPS - 1], rel=5e-6)


@pytest.mark.long
def test_stop_ends_a_training(tiny_model):
    process = subprocess.Popen(
        ["make", "train-z2", f"ARGS=--model {tiny_model} --steps 100000"], cwd=ROOT, env=ENVIRONMENT | CPU, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in process.stderr:
            if line.startswith("step   3"):
                break
        assert len(ours()) >= 4
        run("make", "stop", check=0)
        process.communicate(timeout=60)
        assert process.returncode != 0 and not ours() and not shared_memory()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# -----------------------------------------------------------------------------
# Configurations


def keys_that_are_read(config: dict) -> set[str]:
    """Top-level keys that DeepSpeed's own parser asks for; the parts with a pydantic model refuse an unknown key themselves."""
    from deepspeed.runtime.config import DeepSpeedConfig

    class Asked(dict):
        asked = set()

        def __getitem__(self, key):
            Asked.asked.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            Asked.asked.add(key)
            return super().get(key, default)

    DeepSpeedConfig(Asked(config))
    return Asked.asked


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_key_is_read(file):
    """No key of ours is one that DeepSpeed ignores; the file is the design's, or as the target's name says."""
    import inspect

    import torch
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(file.read_text())
    filled = json.loads(file.read_text().replace('"train_micro_batch_size_per_gpu": "auto"', '"train_micro_batch_size_per_gpu": 1'))
    filled = json.loads(json.dumps(filled).replace('"gradient_accumulation_steps": "auto"', '"gradient_accumulation_steps": 1'))
    assert set(config) <= keys_that_are_read(filled)
    DeepSpeedZeroConfig(strict=True, **config["zero_optimization"])
    names = {name for field, info in DeepSpeedBF16Config.model_fields.items() for name in (field, info.alias)}
    assert set(config["bf16"]) <= names and set(config["optimizer"]) == {"type", "params"}
    known = set(inspect.signature(torch.optim.AdamW).parameters) | {"torch_adam", "adam_w_mode"}
    assert set(config["optimizer"]["params"]) <= known
    if file.stem == "ds_config":
        design = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True}
        assert design.items() <= config["zero_optimization"].items()
        assert config["bf16"] == {"enabled": True} and config["gradient_accumulation_steps"] == 4
    else:
        assert config["zero_optimization"]["stage"] == int(file.stem[1:]) and "offload_optimizer" not in config["zero_optimization"]


GOOD = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    "change, flags, words",
    [
        ({"zero_optimisation": {"stage": 3}}, [], "never reads zero_optimisation"),
        ({"zero_optimization": {"stage": 2, "overlap": True}}, [], "overlap"),
        ({"zero_optimization": {"stage": 4}}, [], "stage"),
        ({"optimizer": {"type": "AdamW", "parameters": {}, "params": {"lr": 1e-4}}}, [], "never reads parameters"),
        ({"optimizer": {"type": "AdamW"}}, [], "optimizer that has params"),
        ({"train_batch_size": 7}, [], "train_batch_size is 7, but micro-batch 2 x accumulation 1 x 2 processes = 4"),
        ({"train_batch_size": 4}, ["--accumulate", "2"], "2 processes = 8"),
        ({"gradient_accumulation_steps": 4}, ["--accumulate", "2"], "fixes gradient_accumulation_steps at 4, the command line says 2"),
        ({"train_micro_batch_size_per_gpu": 0}, [], "whole numbers above 0"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, [], "learning rate must be a number"),
        ({}, ["--steps", "0"], "whole numbers above 0"),
        ({}, ["--seq-len", "1"], "--seq-len at least 2"),
        ({}, ["--data", "alpaca"], "launch_en_train"),
        ({}, ["--micro-batch", "9999"], "lower --micro-batch"),
    ],
)
def test_bad_settings(tmp_path, tiny_model, change, flags, words):
    """Said by each process before it meets the others; here by one of two."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(GOOD | change))
    assert words in refused("python", TRAIN, "--deepspeed", file, "--model", tiny_model, *flags, WORLD_SIZE="2", RANK="0", **CPU)


def test_unreadable_configurations(tmp_path):
    assert "there is no DeepSpeed configuration" in refused("python", TRAIN, "--deepspeed", tmp_path / "none.json", WORLD_SIZE="2", **CPU)
    (tmp_path / "broken.json").write_text('{"zero_optimization": {')
    assert "not valid JSON at line 1" in refused("python", TRAIN, "--deepspeed", tmp_path / "broken.json", WORLD_SIZE="2", **CPU)


def test_one_process_is_refused():
    """By the script alone, and through make, the launcher and the job that carries both: exit code 2, one sentence, nothing left."""
    assert "at least 2, here is 1" in refused("python", TRAIN, **CPU)
    assert "at least 2, here is 1" in refused("make", "train-z2", "PROCESSES=1", **CPU)


def test_state_bytes_table():
    """112 / 70 / 63 / 56 GB for 7B on 2 GPUs; 4x and 8x only as limits."""
    found = result(python("modules/05_DeepSpeed/01_state_bytes.py"))
    assert [found[f"mixed_z{stage}_gb"] for stage in range(4)] == [112, 70, 63, 56]
    assert [found[f"fp32_z{stage}_gb"] for stage in range(4)] == [112, 84, 70, 56]
    assert found["estimate_stage2_gpu_gb"] == 7 * 2 + 7 * 18 / 2
    many = result(python("modules/05_DeepSpeed/01_state_bytes.py", "--processes", 4096))
    assert [round(many[f"mixed_z{stage}_saved_ratio"], 1) for stage in range(3)] == [1, 4, 8]
    for flag, value in itertools.product(("--parameters", "--processes", "--card-gb"), ("0", "-1")):
        refused("python", "modules/05_DeepSpeed/01_state_bytes.py", flag, value)
    refused("python", "modules/05_DeepSpeed/01_state_bytes.py", "--parameters", "nan")


def test_nothing_is_left_running():
    time.sleep(1)
    assert not ours() and not shared_memory() and not [name for name in jobs.running() if name.startswith("train-z")]
