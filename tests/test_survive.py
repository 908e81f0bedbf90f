"""Trainings that go on: the losses of a resumed run are those of one that was never ended.

All engines' processes are forked from one that has imported them; the faults are test_faults.py's.
"""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, in_processes, python, recipe

ZERO = ROOT / "modules/05_DeepSpeed"
MODULES = "transformers.models.llama.modeling_llama,accelerate,deepspeed"
CPU = {"PROFILE": "cpu", "DS_ACCELERATOR": "cpu"}
STEPS = 5
HALF = 2
SEQ_LEN = 16
# Twelve blocks a step, on 1, 2 or 3 processes.
BATCH = {1: (4, 3), 2: (3, 2), 3: (2, 2)}
# {name: (make target, its variables, the numbers of processes that go on with a state of two)}
ENGINES = {
    "ddp": ("train-ddp", {}, (2,)),
    "accelerate": ("train-accelerate", {}, (2, 1)),
    "fsdp": ("train-accelerate", {"CONFIG": "fsdp"}, (2, 1, 3)),
    "z2": ("train-z2", {}, (2, 3)),
    "z3": ("train-z3", {}, (2, 1, 3)),
}
MORE_ENGINES = {
    "zero2 by accelerate": ("train-accelerate", {"CONFIG": "deepspeed_zero2"}, (2,)),
    "z0": ("train-z0", {}, (2,)),
    "z1": ("train-z1", {}, (2, 1)),
    "z3 offloaded": ("train-z3-offload", {}, (2,)),
}


def command(name: str, processes: int, *flags) -> list[str]:
    """The launcher's command of this engine; deepspeed's launcher is replaced by torchrun."""
    target, variables, _ = (ENGINES | MORE_ENGINES)[name]
    micro_batch, accumulate = BATCH[processes]
    batch = ["--micro-batch", micro_batch, "--accumulate", accumulate]
    words = recipe(target, *flags, *batch, PROCESSES=processes, **variables)
    if words[0] == "deepspeed":
        words = ["torchrun", "--nproc-per-node", *words[2:]]
    if "--min-world" in words:
        words[words.index("--min-world") + 1] = "1"
    return words


def trained(engines: dict, model: Path, states: Path) -> dict[str, dict]:
    """Of every engine: a whole training, its first steps, and the rest on some processes."""
    flags = ["--model", model, "--seq-len", SEQ_LEN, "--learning-rate", "1e-3", "--steps"]
    commands = {}
    for name, (_, _, worlds) in engines.items():
        at = ["--checkpoints", states / name.replace(" ", "_")]
        commands[f"{name} whole"] = command(name, 2, *flags, STEPS)
        commands[f"{name} begun"] = command(name, 2, *flags, HALF, "--save-every", HALF, *at)
        for world in worlds:
            resumed = command(name, world, *flags, STEPS, "--resume", *at)
            commands[f"{name} on {world}"] = resumed
    return in_processes(MODULES, commands, **CPU)


def goes_on_as_if_never_ended(runs: dict[str, dict], name: str, worlds: tuple) -> None:
    whole = runs[f"{name} whole"]["losses"]
    assert whole[-1] < whole[0] - 0.1
    assert runs[f"{name} begun"]["losses"] == whole[:HALF]
    if "offload" in name:  # CPUAdam: within rounding
        assert runs[f"{name} on 2"]["losses"] == pytest.approx(whole, rel=1e-6)
    else:
        assert runs[f"{name} on 2"]["losses"] == whole
    for world in worlds:
        other = runs[f"{name} on {world}"]
        assert other["world_size"] == world
        assert other["losses"] == pytest.approx(whole, rel=2e-6)


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def runs(tiny_model, states) -> dict[str, dict]:
    return trained(ENGINES, tiny_model, states)


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_run_computes_what_an_uninterrupted_one_does(runs, name):
    goes_on_as_if_never_ended(runs, name, ENGINES[name][2])


@pytest.mark.long
def test_the_other_engines_go_on_too(tiny_model, states):
    runs = trained(MORE_ENGINES, tiny_model, states)
    for name, (_, _, worlds) in MORE_ENGINES.items():
        goes_on_as_if_never_ended(runs, name, worlds)


def test_the_twin_goes_on_with_any_number_of_processes(states):
    """mini_zero's four stages, saved by two: the losses on one, two and three."""
    program = ROOT / "tests/programs/zero_resume.py"
    torchrun = ["torchrun", "--nproc-per-node"]
    state = states / "mini_zero"
    commands = {"whole": [*torchrun, 2, program, "save", state]}
    commands |= {world: [*torchrun, world, program, "load", state] for world in (1, 2, 3)}
    runs = in_processes("transformers.models.qwen3.modeling_qwen3", commands, **CPU)
    assert runs[2] == runs["whole"]
    for world in (1, 3):
        for stage, losses in runs["whole"].items():
            assert losses[1] != pytest.approx(losses[0], rel=1e-3)
            assert runs[world][stage] == pytest.approx(losses, rel=1e-5)


def test_a_stage_3_state_becomes_a_plain_model(runs, states, tiny_model):
    """zero_to_fp32, DeepSpeed's own: no tensor is empty, and the loss is the next step's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lab import data

    state = states / "z3" / f"step-{HALF}"
    folder = states / "plain"
    AutoConfig.from_pretrained(tiny_model).save_pretrained(folder)
    # Not --safe_serialization: it refuses weights that are tied.
    python(state / "zero_to_fp32.py", state, folder, "--tag", "states", check=0, **CPU)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert all(weight.numel() for weight in model.parameters())
    blocks = data.blocks(AutoTokenizer.from_pretrained(tiny_model), "launch_en_train", SEQ_LEN)
    batch = blocks[HALF * 12 : (HALF + 1) * 12]
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert loss == pytest.approx(runs["z3 whole"]["losses"][HALF], rel=2e-6)


def test_the_loop_to_carry_away_goes_on(tiny_model, states):
    """Its schedule and the order in which an epoch shuffles its rows, from the middle of one."""
    state = states / "real_loop"
    flags = ["--model", tiny_model, "--steps", 5, "--seq-len", 32, "--rows", 12, "--warmup", 2]
    flags += ["--learning-rate", "1e-3", "--save-every", 2, "--keep", 3, "--checkpoints", state]
    whole = in_processes(MODULES, {"whole": recipe("real-loop", *flags)}, **CPU)["whole"]
    assert whole["epoch_steps_count"] == 3
    shutil.rmtree(state / "step-5")
    shutil.rmtree(state / "step-4")
    resumed = in_processes(MODULES, {"on": recipe("real-loop", *flags, "--resume")}, **CPU)["on"]
    for name in ("losses", "learning_rates", "gradient_norms", "validation_losses"):
        assert resumed[name] == whole[name]
