"""Trainings that go on: the losses of a resumed run are those of one that was never ended.

All engines' processes are forked from one that has imported them; the faults are test_faults.py's.
"""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, in_processes, recipe

ZERO = ROOT / "modules/05_DeepSpeed"
MODULES = "transformers.models.llama.modeling_llama,accelerate,deepspeed"
CPU = {"PROFILE": "cpu", "DS_ACCELERATOR": "cpu"}
STEPS = 5
HALF = 2
# Twelve blocks a step, on 1, 2 or 3 processes.
BATCH = {1: (4, 3), 2: (3, 2), 3: (2, 2)}
# {name: (make target, its variables, the numbers of processes that go on with a state of two)}
ENGINES = {
    "ddp": ("train-ddp", {}, (2, 3)),
    "accelerate": ("train-accelerate", {}, (2, 1)),
    "fsdp": ("train-accelerate", {"CONFIG": "fsdp"}, (2, 1, 3)),
    "z2": ("train-z2", {}, (2, 3)),
    "z3": ("train-z3", {}, (2, 1, 3)),
}
MORE_ENGINES = {
    "zero2 by accelerate": ("train-accelerate", {"CONFIG": "deepspeed_zero2"}, (2,)),
    "z0": ("train-z0", {}, (2,)),
    "z1": ("train-z1", {}, (2, 1)),
    "z2 offloaded": ("train-z2-offload", {}, (2,)),
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
    flags = ["--model", model, "--seq-len", 16, "--learning-rate", "1e-3", "--steps"]
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
