"""The methods of module 06: a few steps of a tiny model by each of configs/methods/."""

import importlib
import json
import math
import sys
import threading

import pytest
from conftest import ROOT, python, refused

MODULE = ROOT / "modules/06_LLaMA-Factory"
SAME = ("lora", "loraplus", "pissa", "qlora", "packing", "neat_packing", "train_on_prompt")
PREFERENCES = ("dpo", "simpo", "orpo", "kto")
TRAINED = (*SAME, *PREFERENCES, "rslora", "dora", "freeze", "full", "mask_history")
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
    for name in PREFERENCES:
        cases[name] = short | {"max_samples": 8}
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


def test_preferences_start_at_their_reference(trainings):
    """DPO guesses at ln 2, KTO at 1/2; without a reference the loss is that of the answers."""
    told, _ = trainings
    first = {name: told[name]["losses"][0] for name in PREFERENCES}
    assert first["dpo"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["kto"] == pytest.approx(0.5, rel=1e-5)
    assert 5 < first["orpo"] < 15  # of a random model, ln 49152 a token and the odds
    assert 0.1 < first["simpo"] < 2
    assert len({told[name]["trained"] for name in (*PREFERENCES, "lora")}) == 1


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


@pytest.mark.parametrize(
    "together, first, second",
    [
        ("dora full", "full", "dora"),
        ("qlora pissa", "pissa", "qlora"),
        ("packing zero3 ddp", "ddp", "zero3"),
    ],
)
def test_methods_that_exclude_each_other(together, first, second):
    command = ["python", MODULE / "01_train.py", "--zero2", "--method", together]
    reason = refused(*command, PROFILE="cpu")
    assert f"{first} and {second} exclude each other: take one of them" in reason


TRAINS = """
import json, os, sys, time
folder = sys.argv[-1].removeprefix("output_dir=")
os.makedirs(folder)
with open(os.environ["SEEN"], "a") as seen:
    seen.write(f"begins {os.environ['OMP_NUM_THREADS']}\\n")
time.sleep(1 if "fails" not in folder else 0)
with open(os.environ["SEEN"], "a") as seen:
    seen.write("ends\\n")
assert "fails" not in folder
print(json.dumps({"step_count": 4}))
"""


def test_trials_of_a_sweep(module06, tmp_path, monkeypatch):
    """Two at a time, each is kept, and one that fails ends the others; what trains is a stand-in.

    The trainings themselves: the readme's own block, a grid of one point.
    """
    trials = module06.trials
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(trials, "HERE", tmp_path)
    monkeypatch.setattr(trials, "POINTS", tmp_path / "points")
    monkeypatch.setattr(trials.factory, "FOLDER", tmp_path)
    monkeypatch.setattr(trials, "shown", str)
    (tmp_path / "01_train.py").write_text(TRAINS)
    (tmp_path / "02_score.py").write_text("print('{\"tuned_exact_pct\": 50.0}')")
    monkeypatch.setattr(trials.os, "sched_getaffinity", lambda _: range(4))
    spaces = trials.environments("cpu", 2)
    own = {name: [f"lora_rank={name}"] for name in ("1", "2", "3", "4")}
    rows = trials.run_all(own, {}, spaces)
    assert rows == dict.fromkeys(own, {"step_count": 4, "tuned_exact_pct": 50.0})
    lines = seen.read_text().split("\n")[:-1]
    assert lines[:2] == ["begins 2"] * 2  # two of four cores each
    assert "ends" in lines[2:4]
    assert len(lines) == 8
    assert not list(tmp_path.glob("sweep-*"))
    # The same again is not trained again; with other settings it is.
    assert trials.run_all(own, {}, spaces) == rows
    assert len(seen.read_text().split()) == 12
    with pytest.raises(SystemExit) as end:
        trials.run_all({"fails": [], "5": []}, {}, spaces[:1])
    assert end.value.code == 1
    assert len(list((tmp_path / "points").iterdir())) == 4
    assert not trials.factory.children
    workers = [each for each in threading.enumerate() if "ThreadPool" in each.name]
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)  # else this process never ends
