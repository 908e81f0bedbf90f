"""DeepSpeed: every ZeRO stage computes what plain data parallelism does, and holds what it says.

One launch of two processes trains at every stage, one after another; that each make target starts
its own is in the readme's blocks.
"""

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ENVIRONMENT, RECORDS, ROOT, in_processes, python, recipe, refused, run

from lab import jobs, models
from lab.planner import training, weights
from lab.planner.config import read

MODULE = ROOT / "modules/05_DeepSpeed"
TRAIN = MODULE / "train.py"
CONFIGS = [MODULE / "ds_config.json", *sorted((MODULE / "configs").glob("*.json"))]
CPU = {"PROFILE": "cpu"}  # on GPUs too: what is compared is computed in fp32
STEPS = 5
MICRO_BATCH = 2
ACCUMULATE = 2
LEARNING_RATE = "1e-3"
SEQ_LEN = 32
FORMS = json.loads(Path(__file__).with_name("deepspeed_forms.json").read_text())
SMALL_FORM = "LLaMA-Factory ds_z3"
# Bytes per parameter of (parameters, gradients, optimizer states) in each of 2 processes in fp32,
# written out.
BYTES = {0: (4, 4, 8), 1: (4, 4, 6), 2: (4, 2, 6), 3: (2, 2, 6)}


def result(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"script"')]
    return json.loads(lines[-1])


def ours() -> list[int]:
    """Living processes of this module's training, launchers included, in this worker's network."""
    here = os.readlink("/proc/self/ns/net")  # another worker may be training
    pids = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        try:
            network = os.readlink(f"/proc/{process.pid}/ns/net")
        except OSError:  # it has just ended, or is another user's
            continue
        if "modules/05_DeepSpeed/train.py" in command and network == here:
            pids.append(process.pid)
    return pids


def shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saved") / "z3"


@pytest.fixture(scope="module")
def trained(tiny_model, saved, tmp_path_factory) -> list[dict]:
    """A training at each stage in the same two processes, then by a form that people use, and at
    the end stage 3 again, which saves.
    """
    flags = ["--model", tiny_model, "--micro-batch", MICRO_BATCH, "--accumulate", ACCUMULATE]
    flags += ["--learning-rate", LEARNING_RATE, "--seq-len", SEQ_LEN]
    form = tmp_path_factory.mktemp("form") / "ds_config.json"
    form.write_text(json.dumps(FORMS[SMALL_FORM]))
    short = ["--model", tiny_model, "--steps", "2", "--seq-len", "8", "--micro-batch", "1"]
    configs = [MODULE / f"configs/z{stage}.json" for stage in BYTES]
    runs = [[TRAIN, "--deepspeed", config, *flags, "--steps", STEPS] for config in configs[:3]]
    runs.append([TRAIN, "--deepspeed", form, *short])
    last = ["--steps", STEPS - 1, "--save", saved]
    runs.append([TRAIN, "--deepspeed", configs[3], *flags, *last])
    commands = json.dumps([[str(word) for word in run] for run in runs])
    program = ROOT / "tests/programs/in_turn.py"
    done = run("deepspeed", "--num_gpus=2", program, commands, check=0, **CPU)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"script"')]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def stages(trained) -> dict[int, dict]:
    first = trained[:3]
    last = trained[4]
    return dict(enumerate([*first, last]))


@pytest.fixture(scope="module")
def without_deepspeed(tiny_model) -> dict[str, dict]:
    """One process that sees the same blocks in every step; all stages of mini_zero in two."""
    same = ["--model", tiny_model, "--steps", STEPS, "--accumulate", ACCUMULATE]
    same += ["--learning-rate", LEARNING_RATE, "--seq-len", SEQ_LEN, "--micro-batch"]
    alone = ROOT / "modules/04_Accelerate/01_train_ddp.py"
    commands = {
        "one process": [alone, *same, 2 * MICRO_BATCH],
        "twin": recipe("mini-zero", *same, MICRO_BATCH),
    }
    return in_processes("transformers.models.llama.modeling_llama", commands, **CPU)


@pytest.fixture
def reference(without_deepspeed) -> list[float]:
    """Losses of one process."""
    return without_deepspeed["one process"]["losses"]


@pytest.mark.parametrize("stage", BYTES)
def test_the_engine_runs_the_stage_of_the_target(stages, stage):
    assert (stages[stage]["zero_stage"], stages[stage]["world_size"]) == (stage, 2)
    recipe = run("make", "-n", f"train-z{stage}", check=0).stdout
    assert f"--deepspeed modules/05_DeepSpeed/configs/z{stage}.json" in recipe


@pytest.mark.parametrize("stage", BYTES)
def test_losses_are_those_of_one_process(stages, reference, stage):
    """Two processes with micro-batch b, their states divided or not, and one process with 2b: the
    same numbers, step by step.
    """
    losses = stages[stage]["losses"]
    assert len(losses) == STEPS - (stage == 3)
    assert losses[-1] < losses[0] - 0.1, "the losses must fall, or equality proves little"
    for ours_, theirs in zip(losses, reference, strict=False):
        assert ours_ == pytest.approx(theirs, rel=5e-6)


@pytest.mark.parametrize("stage", BYTES)
def test_state_bytes(stages, stage):
    """The tensors of the running engine weigh what the theory says, each kind by itself; so does
    the script's own theory.
    """
    for kind, width in zip(("parameter", "gradient", "optimizer"), BYTES[stage], strict=True):
        expected = width * stages[stage]["parameters_count"] / 2**30
        assert stages[stage][f"{kind}_state_gib"] == pytest.approx(expected, rel=0.02), kind
        assert stages[stage][f"{kind}_state_theory_gib"] == pytest.approx(expected, rel=1e-9), kind


@pytest.mark.parametrize("stage", BYTES)
def test_the_planner_predicts_these_bytes(stages, tiny_model, stage):
    """lab/planner, which knows only the config.json, against the tensors of the running engine,
    each kind within 2 %.
    """
    model = read(models.config(str(tiny_model)))
    assert weights.parameters(model) == stages[stage]["parameters_count"]
    setup = training.Training(
        gpus=2, engine="deepspeed", zero=stage, dtype="float32", accumulate=ACCUMULATE
    )
    predicted = training.train(model, setup).states_gib
    for kind, name in (
        ("parameter", "parameters"),
        ("gradient", "gradients"),
        ("optimizer", "optimizer"),
    ):
        assert predicted[name] == pytest.approx(stages[stage][f"{kind}_state_gib"], rel=0.02), kind


# -----------------------------------------------------------------------------
# The twin: mini_zero


@pytest.fixture
def twin(without_deepspeed) -> dict:
    return without_deepspeed["twin"]


@pytest.mark.parametrize("stage", BYTES)
def test_the_twin_computes_what_deepspeed_does(twin, stages, stage):
    """Loss by loss, and as many bytes of each kind between backward and step."""
    theirs = stages[stage]
    ours_ = twin["losses"][f"stage {stage}"]
    assert ours_[: len(theirs["losses"])] == pytest.approx(theirs["losses"], rel=5e-6)
    kinds = ("parameters", "gradients", "optimizer")
    for kind, width in zip(kinds, BYTES[stage], strict=True):
        measured = twin[f"z{stage}_{kind}_per_parameter_bytes"]
        assert measured == pytest.approx(width, rel=1e-3)
        state = theirs[f"{kind.removesuffix('s')}_state_gib"] * 2**30
        assert measured == pytest.approx(state / theirs["parameters_count"], rel=0.02)


def test_the_twin_sends_what_the_paper_says(twin, tiny_model):
    """Numbers a step and parameter: 2 psi, 2 psi, (accumulate + 1) psi, 3 psi a micro-step.

    At stage 3 what is outside of the layers is gathered once, not twice, a micro-step; of the
    layers never more than two are there.
    """
    model = read(models.config(str(tiny_model)))
    psi = weights.parameters(model)
    outside = (model.vocab * model.hidden + model.hidden) / psi  # tied embedding, last norm
    expected = {0: 2, 1: 2, 2: ACCUMULATE + 1, 3: ACCUMULATE * (3 - outside)}
    for stage, numbers in expected.items():
        sent = twin[f"z{stage}_sent_per_parameter_ratio"]
        assert sent == pytest.approx(numbers, rel=1e-3)
        assert twin[f"z{stage}_sent_theory_ratio"] == pytest.approx(numbers, rel=1e-3)
    assert twin["z3_layers_there_count"] == 2


@pytest.mark.long
def test_the_twin_offloads(tiny_model, twin):
    flags = f"--model {tiny_model} --steps {STEPS} --micro-batch {MICRO_BATCH} --stages 1 2 3"
    flags += f" --accumulate {ACCUMULATE} --learning-rate {LEARNING_RATE} --offload"
    flags += f" --seq-len {SEQ_LEN}"
    offloaded = result(run("make", "-s", "mini-zero", f"ARGS={flags}", check=0, **CPU))
    for stage in (1, 2, 3):
        assert offloaded["losses"][f"stage {stage}"] == twin["losses"][f"stage {stage}"]


@pytest.mark.parametrize(
    "script", ["05_DeepSpeed/03_mini_zero.py", "04_Accelerate/04_mini_accelerate.py"]
)
def test_what_saves_nothing_takes_no_folder(script, tmp_path):
    done = python(f"modules/{script}", "--save", tmp_path, check=2)
    assert "unrecognized arguments: --save" in done.stderr


def test_the_twin_refuses():
    assert "1 process is running" in refused("make", "mini-zero", "PROCESSES=1", **CPU)


def test_compare(stages, reference):
    """The trainings above side by side, from their records; others, with another learning rate or
    not run, are named and left out.
    """
    compared = result(run("make", "-s", "train-compare", check=0))
    assert compared["engine_count"] >= 5
    assert compared["compared_step_count"] == STEPS - 1
    assert compared["largest_difference_ratio"] < 5e-6
    assert all(f"train_z{stage}_difference_ratio" in compared for stage in BYTES)


def test_compare_refuses_and_leaves_out(tmp_path, reference):
    """No yardstick; nothing beside it; then the record of a training with another seed."""
    assert "the yardstick is missing: run 'make train-one'" in refused(
        "make", "train-compare", RECORDS=str(tmp_path)
    )
    record = json.loads((RECORDS / "04_Accelerate/01_train_ddp-one.json").read_text())
    (tmp_path / "04_Accelerate").mkdir()
    (tmp_path / "04_Accelerate/01_train_ddp-one.json").write_text(json.dumps(record))
    record["config"]["seed"] = 7
    (tmp_path / "04_Accelerate/01_train_ddp.json").write_text(json.dumps(record))
    done = run("make", "-s", "train-compare", check=2, RECORDS=str(tmp_path))
    assert "other settings: make train-ddp (seed 7, not 0)" in done.stdout
    assert "not run: make train-z3" in done.stdout
    assert "nothing to compare" in done.stderr


def test_every_stage_saves_memory(stages):
    sums = [stages[stage]["state_gib"] for stage in BYTES]
    assert sums == sorted(sums, reverse=True) and len(set(sums)) == 4


def test_a_stage_3_model_is_saved_whole(stages, saved, reference):
    """The folder loads in plain transformers, no tensor is empty, and the loss on the next step's
    blocks is the reference's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lab import data

    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    sizes = [weight.numel() for weight in model.parameters()]
    assert all(sizes) and sum(sizes) == stages[3]["parameters_count"]
    blocks = data.blocks(AutoTokenizer.from_pretrained(saved), "launch_en_train", SEQ_LEN)
    per_step = 2 * MICRO_BATCH * ACCUMULATE
    batch = blocks[(STEPS - 1) * per_step : STEPS * per_step]
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert loss == pytest.approx(reference[STEPS - 1], rel=5e-6)


@pytest.mark.long
def test_stop_ends_a_training(tiny_model):
    process = subprocess.Popen(
        ["make", "train-z2", f"ARGS=--model {tiny_model} --steps 100000"],
        cwd=ROOT,
        env=ENVIRONMENT | CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stderr:
            if line.startswith("step   3"):
                break
        assert len(ours()) >= 4
        run("make", "stop", check=0)
        process.communicate(timeout=300)
        assert process.returncode != 0 and not ours() and not shared_memory()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# -----------------------------------------------------------------------------
# Configurations

PROFILE = SimpleNamespace(dtype="float32", micro_batch=2, accumulate=1, learning_rate=1e-4)
HIDDEN = 64
SWAPPED = {"nvme_path": "runs/05_DeepSpeed/nvme", "buffer_size": 1e8}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judged(content, flags): what train.py makes of a file, in this process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.syspath_prepend(str(MODULE))
    import ds_check
    import ds_config

    def judge(content: dict, **flags):
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(content))
        given = {"micro_batch": None, "accumulate": None, "learning_rate": None} | flags
        config = ds_config.Config(file)
        config.settle(SimpleNamespace(**given), PROFILE, world=2)
        config.fill(8, SimpleNamespace(hidden_size=HIDDEN))
        ds_check.check(config)
        return config

    return judge


def autos(value) -> bool:
    if isinstance(value, dict):
        return any(autos(part) for part in value.values())
    return value == "auto"


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_people_use_are_taken(judged, form):
    """Whole, by transformers' rules: nothing is left "auto", nothing that the file says changes."""
    config = judged(FORMS[form])
    assert not autos(config.values)
    for key, value in FORMS[form].items():
        for name, fixed in value.items() if isinstance(value, dict) else ():
            if not isinstance(fixed, dict) and fixed != "auto":
                assert config.values[key][name] == fixed
    zero = config.values["zero_optimization"]
    if FORMS[form]["zero_optimization"].get("reduce_bucket_size") == "auto":
        assert zero["reduce_bucket_size"] == HIDDEN**2
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * HIDDEN**2)
        assert zero["stage3_param_persistence_threshold"] == 10 * HIDDEN
    params = config.values["optimizer"]["params"]
    if "optimizer" not in FORMS[form]:
        trainer = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        assert trainer.items() <= params.items()
        offloaded = "offload_optimizer" in zero
        assert params.get("torch_adam", False) != offloaded
    if FORMS[form].get("gradient_clipping") == "auto":
        assert config.values["gradient_clipping"] == 1.0
    schedule = config.values.get("scheduler", {}).get("params", {})
    if FORMS[form].get("scheduler", {}).get("params", {}).get("total_num_steps") == "auto":
        assert schedule["total_num_steps"] == 8 and schedule["warmup_max_lr"] == 1e-4


def test_the_original_file_stands_in_the_module():
    """Word for word but for white space; the others are what their target's name says."""
    assert json.loads((MODULE / "ds_config.json").read_text()) == FORMS["original design"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_key_is_read(judged, file):
    content = json.loads(file.read_text())
    for part in content["zero_optimization"].values():  # as swap.py fills them
        if isinstance(part, dict) and part["device"] == "nvme":
            part |= {key: value for key, value in SWAPPED.items() if part.get(key) == "auto"}
    config = judged(content)
    if file.stem != "ds_config":
        assert config.stage == int(file.stem[1])
        assert ("offload_optimizer" in config.zero) == ("-" in file.stem)


def test_bfloat16_is_the_old_name_of_bf16(judged):
    assert judged({"bfloat16": {"enabled": True}}).dtype == "bfloat16"


# It compiles CPUAdam and computes in bf16, which a CPU without AVX-512 emulates.
@pytest.mark.long
def test_the_original_command_trains(tiny_model):
    """From the module's folder, with the original file, word for word."""
    command = ["deepspeed", "--num_gpus=2", "train.py", "--deepspeed", "ds_config.json"]
    flags = ["--model", tiny_model, "--steps", "2", "--seq-len", "8", "--micro-batch", "1"]
    offloaded = result(run(*command, *flags, cwd=MODULE, **CPU))
    assert offloaded["zero_stage"] == FORMS["original design"]["zero_optimization"]["stage"]
    assert offloaded["optimizer"] == "DeepSpeedCPUAdam" and len(offloaded["losses"]) == 2


def test_a_form_of_auto_trains(trained):
    """LLaMA-Factory's: its engine runs what transformers' rules have filled in."""
    by_form = trained[3]
    assert by_form["zero_stage"] == FORMS[SMALL_FORM]["zero_optimization"]["stage"]
    assert by_form["optimizer"] == "AdamW" and len(by_form["losses"]) == 2


def test_fp16_is_refused_where_the_cpu_lacks_it(judged, capsys):
    """DeepSpeed's own accelerator is asked; it would raise a ValueError in the engine."""
    import torch

    config = judged(FORMS["MedicalGPT zero_stage3"])
    import ds_check

    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU computes in fp16")
    with pytest.raises(SystemExit) as refusal:
        ds_check.refuse_type(config)
    assert refusal.value.code == 2 and "AVX512-FP16" in capsys.readouterr().err


ADAM = {"type": "AdamW", "params": {"lr": "auto"}}
ZERO2 = {"zero_optimization": {"stage": 2}}
STAGE_3 = {"zero_hpz_partition_size": 2, "zero_quantized_weights": True}
STAGE_3 |= {"zero_quantized_gradients": True, "memory_efficient_linear": False}
NVME = {"device": "nvme"}
SUPER = {"device": "cpu", "super_offload": True}
PARAMS = [
    ({"betas": [0.9]}, "betas is [0.9]: write two numbers"),
    ({"betas": [0.9, 0.99, 0.999]}, "write two numbers"),
    ({"weight_decay": -1}, "Invalid weight_decay"),
    ({"amsgrad": True}, "FusedAdam has no amsgrad"),
    ({"max_grad_norm": 1.0}, "is gradient_clipping to DeepSpeed"),
]
REFUSED = [
    # Keys
    ({"zero_optimisation": {"stage": 3}}, {}, "zero_optimisation: did you mean zero_optimization?"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, {}, "did you mean overlap_comm?"),
    ({"optimizer": {**ADAM, "parameters": {}}}, {}, "never reads optimizer.parameters"),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, {}, "old name of bf16"),
    ({"amp": {"enabled": True}}, {}, "AMP integration has been removed"),
    # Shapes and texts
    ({"bf16": True}, {}, 'bf16 is true: write an object, such as {"enabled": true}'),
    ({"zero_optimization": True}, {}, 'such as {"stage": 2}'),
    ({"bf16": {"enabled": "false"}}, {}, 'bf16.enabled is the text "false": write false'),
    ({"bf16": {"enabled": "off"}}, {}, 'bf16.enabled is "off": write true, false or "auto"'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-4"}}}, {}, "params.lr is the text"),
    ({"aio": 5}, {}, "aio is 5: write an object, such as {}"),
    # Keys of sections that DeepSpeed reads key by key, and of stage 3 by their other name
    ({"aio": {"blocksize": 1}}, {}, "aio.blocksize: did you mean block_size?"),
    ({"aio": {"block_size": "auto"}}, {}, 'aio.block_size is "auto", which nobody fills'),
    ({"scheduler": {"type": "WarmupLR", "parms": {}}}, {}, "never reads scheduler.parms"),
    ({"zero_optimization": {"stage": 2, "max_live_parameters": 1}}, {}, "no effect at stage 2"),
    ({"optimizer": {"type": "Lamb", "params": {"momentum": 0.9}}}, {}, "FusedLamb does not take"),
    ({"data_types": {"grad_accum_dtypes": "fp32"}}, {}, "did you mean grad_accum_dtype?"),
    ({"torch_autocast": {"enable": True}}, {}, "torch_autocast.enable: did you mean enabled?"),
    ({"flops_profiler": {"profile_steps": 5}}, {}, "did you mean profile_step?"),
    ({"activation_checkpointing": {"profiles": True}}, {}, "did you mean profile?"),
    ({"checkpoint": {"writer": {"typo": 1}}}, {}, "checkpoint.writer.typo: did you mean type?"),
    ({"comms_logger": {"enable": True}}, {}, "comms_logger.enable: did you mean enabled?"),
    # Types that DeepSpeed finds in a step, or never
    ({"flops_profiler": {"profile_step": "five"}}, {}, 'profile_step is "five": write a number'),
    ({"prescale_gradients": "off"}, {}, 'prescale_gradients is "off": write true or false'),
    ({"wall_clock_breakdown": "yes"}, {}, 'wall_clock_breakdown is "yes": write true or false'),
    ({"steps_per_print": "inf"}, {}, 'steps_per_print is "inf": write a number'),
    ({"steps_per_print": 0}, {}, "steps_per_print is 0, by which DeepSpeed divides"),
    ({"data_types": {"grad_accum_dtype": "fp8"}}, {}, 'grad_accum_dtype is "fp8": write bf16'),
    ({"torch_autocast": True}, {}, "torch_autocast is true: write an object"),
    ({"gradient_clipping": float("nan")}, {}, "not valid JSON: NaN is no number of it"),
    ({"gradient_clipping": float("inf")}, {}, "not valid JSON: Infinity is no number of it"),
    ({"gradient_clipping": -1}, {}, "gradient_clipping is -1: write a number"),
    # What this environment or train.py cannot do
    ({"comet": {"enabled": True}}, {}, "no Python package comet_ml here"),
    ({"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel wants equal data"),
    (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        {},
        "it needs a GPU, and nvcc",
    ),
    ({"zero_optimization": {"stage": 1, "legacy_stage1": True}}, {}, "is gone from DeepSpeed"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": SUPER}}, {}, "super_offload has no"),
    # Values
    ({"zero_optimization": {"stage": 4}}, {}, "stage is 4: write 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "auto"}}, {}, 'stage is "auto": write 0, 1, 2 or 3'),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, {}, "reduce_bucket_size is 0"),
    ({**ZERO2, "steps_per_print": "auto"}, {}, 'steps_per_print is "auto", which nobody fills'),
    ({"gradient_clipping": "much"}, {}, 'gradient_clipping is "much": write a number'),
    ({"train_micro_batch_size_per_gpu": 0}, {}, "is 0: write a whole number above 0"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, {}, "both enabled"),
    # Without effect at this stage
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "at stage 2"),
    ({"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1e9}}, {}, '"stage": 3'),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {}, "at stage 0"),
    *(
        ({"zero_optimization": {"stage": 2, key: value}}, {}, f"{key} has no effect at stage 2")
        for key, value in STAGE_3.items()
    ),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": NVME}}, {}, "keeps in host memory"),
    # Optimizer and scheduler
    ({"optimizer": {"type": "AdmaW"}}, {}, "optimizer.type AdmaW: did you mean AdamW?"),
    ({"optimizer": {"params": {}}}, {}, 'no type: write "type": "AdamW"'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, {}, "must be a number above 0"),
    ({"optimizer": {"type": "AdamW", "params": {"beta": 1}}}, {}, "unexpected keyword"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [2, 0.9]}}}, {}, "beta parameter"),
    ({"scheduler": {"type": "Warmup"}}, {}, "choose one of LRRangeTest"),
    *(
        ({"optimizer": {"type": "AdamW", "params": params}}, {}, reason)
        for params, reason in PARAMS
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
        {},
        'no warmup_type "cosine"',
    ),
    ({"scheduler": {"type": "WarmupDecayLR"}}, {}, "total_num_steps"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": -10}}},
        {},
        "must be a positive integer, got -10",
    ),
    # Against the command line
    ({"train_batch_size": 7}, {}, "micro-batch 3 x accumulation 1 x 2 processes = 6"),
    (
        {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2},
        {"accumulate": 2},
        "2 processes = 8",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
        {"learning_rate": 1e-4},
        "warmup_max_lr is 0.001, the command line says 0.0001",
    ),
    (
        {"gradient_accumulation_steps": 4},
        {"accumulate": 2},
        "gradient_accumulation_steps is 4, the command line says 2",
    ),
]


TAKEN = [
    {"zero_optimization": {"stage": 2, "zero_quantized_weights": False}},
    {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": None}},
    {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"checkpoint": {"load_universal": True}, "steps_per_print": None, "_comment": "right"},
    {"data_types": {"grad_accum_dtype": "fp32"}, "timers": {"throughput": {"enabled": False}}},
]


@pytest.mark.parametrize("content", TAKEN)
def test_right_configurations_are_taken(judged, content):
    values = judged(content).values
    assert all(values[key] == content[key] for key in content)


@pytest.mark.parametrize("section", ["activation_checkpointing", "compile", "data_efficiency"])
def test_a_section_without_effect_is_noted(judged, capsys, section):
    judged({section: {}})
    assert f"note: {section} in DeepSpeed's file does nothing" in capsys.readouterr().out


@pytest.mark.parametrize("content, flags, reason", REFUSED)
def test_bad_configurations(judged, capsys, content, flags, reason):
    """One sentence that names the key and what would be right, exit code 2."""
    with pytest.raises(SystemExit) as refusal:
        judged(content, **flags)
    sentences = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert refusal.value.code == 2 and len(sentences) == 1 and reason in sentences[0]


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--steps", "0"], "must be positive"),
        (["--seq-len", "1"], "--seq-len at least 2"),
        (["--deepspeed", "none.json"], "there is no DeepSpeed configuration"),
        (["--deepspeed", "Makefile"], "not valid JSON at line 1"),
    ],
)
def test_bad_settings(flags, reason):
    """Said by each process before it meets the others; here by one of two, before torch."""
    assert reason in refused("python", TRAIN, *flags, WORLD_SIZE="2", RANK="0", **CPU)


def test_a_key_that_stands_there_twice(judged, capsys, tmp_path):
    import ds_config

    file = tmp_path / "twice.json"
    file.write_text('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}')
    with pytest.raises(SystemExit):
        ds_config.Config(file)
    assert "bf16 stands there twice" in capsys.readouterr().err


def test_what_the_engine_refuses_is_a_sentence(judged, capsys):
    import ds_check

    config = judged({})
    with pytest.raises(SystemExit) as refusal, ds_check.refusals_as_sentences(config):
        raise AssertionError("You are using an untested ZeRO Optimizer")
    assert refusal.value.code == 2
    assert "ds.json: DeepSpeed refuses it: You are using" in capsys.readouterr().err


def test_train_asks_the_check(tiny_model, tmp_path):
    """What only ds_check.py sees, said by the script itself."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimisation": {"stage": 3}}')
    command = ["python", TRAIN, "--deepspeed", file, "--model", tiny_model]
    assert "did you mean zero" in refused(*command, WORLD_SIZE="2", RANK="0", **CPU)


def test_bad_data(tiny_model):
    for flags, reason in (
        (["--data", "alpaca"], "launch_en_train"),
        (["--micro-batch", "9999"], "lower --micro-batch"),
    ):
        command = ["python", TRAIN, "--deepspeed", MODULE / "configs/z2.json", *flags]
        assert reason in refused(*command, "--model", tiny_model, WORLD_SIZE="2", RANK="0", **CPU)


def test_one_process_is_refused():
    """By the script alone; through make and the launcher, by the readme's block."""
    assert "at least 2, here is 1" in refused("python", TRAIN, **CPU)


def test_state_bytes_table():
    """112 / 70 / 63 / 56 GB for 7B on 2 GPUs; 4x and 8x only as limits."""
    gigabytes = result(python("modules/05_DeepSpeed/01_state_bytes.py"))
    assert [gigabytes[f"mixed_z{stage}_gb"] for stage in range(4)] == [112, 70, 63, 56]
    assert [gigabytes[f"fp32_z{stage}_gb"] for stage in range(4)] == [112, 84, 70, 56]
    assert gigabytes["estimate_stage2_gpu_gb"] == 7 * 2 + 7 * 18 / 2
    many = result(python("modules/05_DeepSpeed/01_state_bytes.py", "--processes", 4096))
    assert [round(many[f"mixed_z{stage}_saved_ratio"], 1) for stage in range(3)] == [1, 4, 8]
    for flag, value in itertools.product(("--parameters", "--processes", "--card-gb"), ("0", "-1")):
        refused("python", "modules/05_DeepSpeed/01_state_bytes.py", flag, value)
    refused("python", "modules/05_DeepSpeed/01_state_bytes.py", "--parameters", "nan")


def test_nothing_is_left_running():
    time.sleep(1)
    assert not ours() and not shared_memory()
    assert not [name for name in jobs.running() if name.startswith("train-")]
