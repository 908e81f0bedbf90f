"""The methods of module 06: a few steps of a tiny model by each of configs/methods/."""

import importlib
import json
import sys

import pytest
from conftest import ROOT, python, refused

MODULE = ROOT / "modules/06_LLaMA-Factory"
SAME = ("lora", "loraplus", "pissa", "qlora", "packing", "neat_packing", "train_on_prompt")
TRAINED = (*SAME, "rslora", "dora", "freeze", "full", "mask_history")
NEED_GPUS = {"liger", "fsdp"}
BETWEEN_PROCESSES = {"ddp", "zero3"}
ELSEWHERE = {"early_stopping"}  # tests/test_scoring.py


@pytest.fixture(scope="module")
def trainings(tiny_model, tmp_path_factory):
    """({method: what its training said}, the folder with a folder of each)."""
    folder = tmp_path_factory.mktemp("methods")
    short = {
        "model_name_or_path": str(tiny_model),
        "template": "chatml",
        "max_samples": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
        "learning_rate": 0.01,
        "warmup_steps": 0,
    }
    cases = {name: short for name in TRAINED}
    cases["mask_history"] = short | {"max_samples": 4}
    cases["freeze"] = short | {"freeze_trainable_layers": 1}
    # DeepSpeed lets go of everything in the first step, whatever it does in the later ones.
    recomputed = short | {"disable_gradient_checkpointing": False, "max_steps": 1}
    cases["zero3"] = recomputed | {"ddp_backend": "gloo"}
    cases["reentrant"] = cases["zero3"] | {"method": "zero3", "use_reentrant_gc": True}
    program = ROOT / "tests/programs/train_methods.py"
    done = python(program, folder, json.dumps(cases), check=0, CUDA_VISIBLE_DEVICES="")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {each["name"]: each for each in told}, folder


def test_every_method_is_trained_by_a_test():
    files = {file.stem for file in MODULE.glob("configs/methods/*.yaml")}
    tested = {*TRAINED, *NEED_GPUS, *BETWEEN_PROCESSES, *ELSEWHERE}
    assert files == tested - {"lora"}


def test_what_is_trained(trainings):
    told, folder = trainings
    count = {name: each["trained"] for name, each in told.items()}
    assert {count[name] for name in SAME} == {count["lora"]}
    assert count["rslora"] == 4 * count["lora"]  # its rank is 64
    assert count["lora"] < count["dora"] < 2 * count["lora"]
    assert count["lora"] < count["freeze"] < count["full"]
    for name in ("freeze", "full"):
        assert (folder / name / "model.safetensors").is_file()
        assert not (folder / name / "adapter_config.json").exists()
    assert json.loads((folder / "dora/adapter_config.json").read_text())["use_dora"]
    assert json.loads((folder / "rslora/adapter_config.json").read_text())["use_rslora"]


def test_zero3_lets_go_of_frozen_weights(trainings):
    """PyTorch's reentrant checkpointing would gather the whole model on every card."""
    told, _ = trainings
    assert told["zero3"]["gathered"] == 0
    assert told["reentrant"]["gathered"] == 1


def test_where_they_start_and_go(trainings):
    """Adapters whose B is 0 start as the model itself; 4 bits and the prompt's loss do not."""
    told, _ = trainings
    first = {name: each["losses"][0] for name, each in told.items()}
    for name in ("rslora", "loraplus", "dora", "freeze", "full"):
        assert first[name] == pytest.approx(first["lora"], rel=1e-6), name
    assert first["pissa"] == pytest.approx(first["lora"], rel=1e-3)
    assert first["qlora"] == pytest.approx(first["lora"], rel=0.05)
    assert first["qlora"] != first["lora"]
    assert first["train_on_prompt"] != first["lora"]
    last = {name: each["losses"][-1] for name, each in told.items()}
    assert len({last[name] for name in ("lora", "rslora", "loraplus", "dora", "pissa")}) == 5
    assert told["packing"]["steps"] < told["lora"]["steps"]


def test_pissa_becomes_a_plain_adapter(trainings, monkeypatch):
    """Its sum over W as it was is what it learnt over the W that it changed."""
    from safetensors.torch import load_file

    _, folder = trainings
    output = folder / "pissa"
    own = load_file(output / "adapter_model.safetensors")
    begun = load_file(output / "pissa_init/adapter_model.safetensors")
    monkeypatch.syspath_prepend(str(MODULE))
    importlib.import_module("methods").keep_plain_adapter(output)
    plain = load_file(output / "adapter_model.safetensors")
    assert not list(output.glob("pissa_*"))
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 32
    for name, a in plain.items():
        if "lora_A" not in name:
            continue
        b_name = name.replace("lora_A", "lora_B")
        learnt = own[b_name] @ own[name] - begun[b_name] @ begun[name]
        assert learnt.norm() > 1e-3 * (own[b_name] @ own[name]).norm()
        assert (plain[b_name] @ a - learnt).norm() < 1e-4 * learnt.norm()
    del sys.modules["methods"]


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--method nonsense", "there is no method nonsense: configs/methods/ has ddp, dora"),
        ("--method zero3", 'zero3 needs several processes: make lf-train-z2 METHOD="zero3"'),
        ("--method liger", "Liger's kernels are written in Triton and need a GPU"),
        ("--zero2 --method fsdp pure_bf16=false", "FSDP needs GPUs: on a CPU Accelerate leaves"),
    ],
)
def test_what_cannot_be(flags, reason):
    command = ["python", MODULE / "01_train.py", *flags.split()]
    assert reason in refused(*command, PROFILE="cpu")
