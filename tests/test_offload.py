"""DeepSpeed as people use it: offload to the host and to files, checkpointing, LoRA, the sizes.

One launch of two processes trains in all ways, one after another.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, python, refused, run

from lab import models
from lab.planner import training, weights
from lab.planner.config import read

MODULE = ROOT / "modules/05_DeepSpeed"
TRAIN = MODULE / "train.py"
CPU = {"PROFILE": "cpu"}  # on GPUs too: what is compared is computed in fp32
STEPS = 4
RANK = 4
KINDS = ("parameter", "gradient", "optimizer")
# Bytes per parameter of (parameters, gradients, optimizer states) in each of 2 processes in fp32.
DIVIDED = (2, 2, 6)


def result(done) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"script"')]
    return json.loads(lines[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("offload")


def trainings(folder: Path) -> dict[str, list]:
    """{name: configuration and flags}; the last one saves the adapter a step earlier."""
    adapter = ["--lora-rank", RANK, "--learning-rate", "1e-2"]
    return {
        "z3": ["z3"],
        "offload": ["z3-offload", "--checkpointing"],
        "64gb": ["z3-offload-64gb"],
        "lora z2": ["z2", *adapter],
        "lora z3": ["z3", *adapter, "--checkpointing", "--save", folder / "adapter"],
    }


def in_turn(tiny_model, runs: dict[str, list]) -> dict[str, dict]:
    """Each run in the same two processes: its result."""
    commands = []
    for config, *flags in runs.values():
        steps = STEPS - 1 if "--save" in flags else STEPS
        settings = ["--model", tiny_model, "--steps", steps, "--micro-batch", 2]
        settings += ["--learning-rate", "1e-3", "--seq-len", 64]
        file = MODULE / f"configs/{config}.json"
        commands.append([TRAIN, "--deepspeed", file, *settings, *flags])
    text = json.dumps([[str(word) for word in command] for command in commands])
    program = ROOT / "tests/programs/in_turn.py"
    done = run("deepspeed", "--num_gpus=2", program, text, check=0, **CPU)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"script"')]
    return dict(zip(runs, map(json.loads, lines), strict=True))


@pytest.fixture(scope="module")
def trained(tiny_model, folder) -> dict[str, dict]:
    return in_turn(tiny_model, trainings(folder))


def same_losses(one: dict, other: dict, rel: float) -> None:
    assert one["losses"][-1] < one["losses"][0] - 0.01, "they must fall, or equality proves little"
    pairs = zip(one["losses"], other["losses"], strict=False)
    assert all(loss == pytest.approx(theirs, rel=rel) for loss, theirs in pairs)


def states(metrics: dict) -> list[float]:
    """Bytes of each kind of state."""
    return [metrics[f"{kind}_state_gib"] * 2**30 for kind in KINDS]


def theory(metrics: dict) -> list[float]:
    return [metrics[f"{kind}_state_theory_gib"] * 2**30 for kind in KINDS]


# -----------------------------------------------------------------------------
# Offload


@pytest.mark.parametrize("name", ["offload", "64gb"])
def test_offload_computes_the_same(trained, name):
    """Where states lie changes no loss, nor does computing activations again; the bytes are those
    of stage 3.
    """
    offloaded = trained[name]
    assert offloaded["zero_stage"] == 3 and offloaded["optimizer"] == "DeepSpeedCPUAdam"
    same_losses(offloaded, trained["z3"], rel=2e-5)
    expected = [width * offloaded["parameters_count"] for width in DIVIDED]
    assert theory(offloaded) == pytest.approx(expected, rel=1e-9)
    assert states(offloaded) == pytest.approx(expected, rel=0.02)
    assert offloaded["state_on_disk_gib"] == 0


@pytest.mark.long  # compiles async_io
@pytest.mark.needs("libaio.h")
def test_nvme_swaps_to_files(tiny_model, tmp_path):
    """Nearly all of it lies in files after a step: what a process holds in memory and in files
    together is stage 3's part. Nothing of it stays.
    """
    in_files = ["z3-nvme", "--checkpointing", "--nvme", tmp_path]
    results = in_turn(tiny_model, {"z3": ["z3"], "nvme": in_files})
    swapped = results["nvme"]
    same_losses(swapped, results["z3"], rel=2e-5)
    expected = [width * swapped["parameters_count"] for width in DIVIDED]
    assert states(swapped) == pytest.approx(expected, rel=0.02)
    assert 0.9 < swapped["state_on_disk_gib"] / swapped["state_gib"] <= 1
    assert not list(tmp_path.rglob("*.swp"))


@pytest.fixture
def module(monkeypatch):
    """module(name): a file of module 05, imported."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.syspath_prepend(str(MODULE))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, MODULE / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


def test_nvme_without_libaio(module, monkeypatch, capsys):
    """By DeepSpeed's own test of it; the sentence names the package."""
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: False)
    with pytest.raises(SystemExit) as refusal:
        module("swap").refuse_without_libaio()
    assert refusal.value.code == 2
    assert "apt-get install -y libaio-dev" in capsys.readouterr().err


def test_nvme_where_little_memory_may_be_locked(module, monkeypatch, capsys):
    swap = module("swap")
    monkeypatch.setattr(swap.resource, "getrlimit", lambda _: (2**13, 2**13))
    monkeypatch.setattr(swap.ctypes, "CDLL", lambda _: SimpleNamespace(mlock=lambda *_: -1))
    swap.refuse_locked(2**13)
    with pytest.raises(SystemExit):
        swap.refuse_locked(2**30)
    assert "locks 1,024 MiB" in capsys.readouterr().err


@pytest.fixture
def settled(module, monkeypatch, tmp_path):
    """settled(**other): swap.settle on z3-nvme.json, with other keys of its sections."""
    swap = module("swap")
    config = module("ds_config")
    monkeypatch.setattr(swap, "refuse_without_libaio", lambda: None)
    monkeypatch.setattr(swap, "refuse_full", lambda *_: None)

    def settled(flag=None, **changed):
        content = json.loads((MODULE / "configs/z3-nvme.json").read_text())
        for key, value in changed.items():
            content["zero_optimization"][key] |= value
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(content))
        shape = SimpleNamespace(vocab_size=1000, hidden_size=64)
        args = SimpleNamespace(nvme=flag, lora_rank=None)
        return swap.settle(config.Config(file), args, shape, rank=0, world=2)

    return settled


def test_nvme_in_the_file_and_on_the_command_line(settled, tmp_path, capsys):
    """The same folder twice is no contradiction, and what a killed training left there goes; what
    is no folder is refused.
    """
    folder = str(tmp_path / "files")
    left = Path(folder, "zero_stage_3/optimizer/rank0/1.tensor.swp")
    left.parent.mkdir(parents=True)
    left.touch()
    both = {"offload_optimizer": {"nvme_path": folder}, "offload_param": {"nvme_path": folder}}
    assert settled(folder, **both) == Path(folder) and not left.exists()
    both["offload_param"] = {"nvme_path": folder + "2"}
    for flag, changed, reason in (
        (None, both, "write one folder for both"),
        (None, {"offload_param": {"nvme_path": 5}}, "nvme_path is 5: write the name of a folder"),
        (folder, {"offload_optimizer": {"nvme_path": "elsewhere"}}, "change one of them"),
    ):
        with pytest.raises(SystemExit):
            settled(flag, **changed)
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        settled("/proc")  # there, and not to be written to
    assert "cannot offload to /proc" in capsys.readouterr().err


def test_nvme_on_a_full_disk(module, monkeypatch, tiny_model, tmp_path, capsys):
    """18 bytes for each of the 3 million parameters, in bf16."""
    from transformers import AutoConfig

    swap = module("swap")
    config = SimpleNamespace(zero={"offload_param": {"device": "nvme"}}, dtype="bfloat16")
    shape = AutoConfig.from_pretrained(tiny_model)
    disk = SimpleNamespace(free=2**20)
    monkeypatch.setattr(swap.shutil, "disk_usage", lambda _: disk)
    with pytest.raises(SystemExit):
        swap.refuse_full(config, tmp_path, shape, lora=False)
    assert "where 0.0 are free: give --nvme a folder" in capsys.readouterr().err
    swap.refuse_full(SimpleNamespace(zero={}, dtype="bfloat16"), tmp_path, shape, lora=True)
    disk.free = 2**30
    swap.refuse_full(config, tmp_path, shape, lora=False)


def two(*flags) -> str:
    """What one of two processes says, before it meets the other."""
    return refused("python", TRAIN, *flags, WORLD_SIZE="2", RANK="0", **CPU)


def test_refusals(tiny_model, tmp_path):
    z3 = ["--deepspeed", MODULE / "configs/z3.json", "--model", tiny_model]
    assert "--lora-rank is 0: give a whole number above 0" in two(*z3, "--lora-rank", "0")
    assert "--nvme moves nothing" in two(*z3, "--nvme", "somewhere")
    content = json.loads((MODULE / "configs/z3-nvme.json").read_text())
    del content["zero_optimization"]["stage3_max_reuse_distance"]
    keeping = tmp_path / "keeping.json"
    keeping.write_text(json.dumps(content))
    words = two("--deepspeed", keeping, "--model", tiny_model)
    assert 'needs "stage3_max_reuse_distance": 0' in words
    assert "choose z3-offload or z3-offload-64gb" in refused("make", "train-z3-offload", "CONFIG=x")


# -----------------------------------------------------------------------------
# LoRA


def test_lora_divides_what_its_stage_divides(trained, tiny_model):
    """Frozen weights whole at stage 2 and divided at stage 3; gradients and optimizer states are
    the adapter's alone, divided at both.
    """
    config = read(models.config(str(tiny_model)))
    lora = training.Training(engine="deepspeed", zero=3, method="lora", lora_rank=RANK)
    adapter = training.trained_parameters(config, lora)
    base = weights.parameters(config)
    for name, width in (("lora z2", 4), ("lora z3", 2)):
        metrics = trained[name]
        assert (metrics["trained_count"], metrics["parameters_count"]) == (adapter, base + adapter)
        expected = [width * (base + adapter), 2 * adapter, 6 * adapter]
        assert theory(metrics) == pytest.approx(expected, rel=1e-9)
        assert states(metrics) == pytest.approx(expected, rel=0.05)
    pairs = zip(trained["lora z2"]["losses"], trained["lora z3"]["losses"], strict=False)
    assert all(loss == pytest.approx(other, rel=5e-6) for loss, other in pairs)


def test_only_the_adapter_is_saved(trained, tiny_model, folder):
    """The base and this folder give stage 2's loss on the next step's blocks."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lab import data

    saved = folder / "adapter"
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert size < 4 * trained["lora z3"]["trained_count"] * 1.5
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, saved).eval()
    blocks = data.blocks(AutoTokenizer.from_pretrained(tiny_model), "launch_en_train", 64)
    batch = blocks[(STEPS - 1) * 4 : STEPS * 4]
    with torch.no_grad():
        loss = adapted(input_ids=batch, labels=batch).loss.item()
        with adapted.disable_adapter():
            untrained = adapted(input_ids=batch, labels=batch).loss.item()
    assert abs(untrained / loss - 1) > 1e-3, "the adapter must matter, or equality proves little"
    assert loss == pytest.approx(trained["lora z2"]["losses"][STEPS - 1], rel=5e-6)


# -----------------------------------------------------------------------------
# The sizes, and which way


def test_every_case_of_the_buckets_is_read_by_deepspeed(module):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    buckets = module("06_buckets")
    for name, case in buckets.CASES.items():
        zero = buckets.settings(case)["zero_optimization"]
        read_by_deepspeed = DeepSpeedZeroConfig(**zero)
        assert read_by_deepspeed.stage == int(name[1]) == case.stage
        for key, value in case.keys.items():
            assert getattr(read_by_deepspeed, key.removeprefix("stage3_")) == value, name
            same_stage = buckets.settings(buckets.Case(case.stage))["zero_optimization"]
            assert value != same_stage.get(key), name


@pytest.mark.long
def test_buckets(tiny_model):
    """Two cases in one run: their losses are the same, the records of a reader's own stay."""
    flags = f"--cases z3 z3-live-reuse-0 --model {tiny_model} --steps 2 --seq-len 16"
    measured = result(run("make", "-s", "zero-buckets", f"ARGS={flags}", check=0, **CPU))
    assert measured["z3_live_reuse_0_difference_ratio"] < 5e-6
    assert min(measured["z3_peak_gib"], measured["z3_step_s"]) > 0


def way(*flags) -> dict:
    return result(python("modules/05_DeepSpeed/07_which_way.py", *flags))


def test_the_page_shows_what_which_way_prints():
    printed = run("make", "-s", "which-way", check=0).stdout
    block = re.search(r"```text\n(qwen2.5-7b.*?)```", (MODULE / "offload.md").read_text(), re.S)[1]
    assert block in printed and "this one" in block


def test_which_way_takes_the_first_that_fits():
    """Judged anew by what the planner's own command says of that way and of the one before."""
    seven = way()
    assert seven["chosen"] == "LoRA, one card"
    plan = ["scripts/plan.py", "train", "--model", "qwen2.5-7b-instruct", "--checkpointing"]
    lora = json.loads(python(*plan, "--gpus", "1", "--method", "lora", "--json", check=0).stdout)
    assert lora["fits"]
    assert seven["lora_one_card_card_gib"] == pytest.approx(lora["per_gpu_gib"]["total"], abs=0.01)
    firsts = [seven[f"qwen2.5-{size}b_first_way_count"] for size in ("0.5", "1.5", 3, 7, 14, 32)]
    assert firsts == sorted(set(firsts)), "a larger model goes further"


def test_which_way_goes_by_the_machine():
    large_host = way("--host-gib", "256")
    assert large_host["chosen"].startswith("ZeRO-3 offload")
    assert way("--gpu-memory-gib", "180")["chosen"] == "one card"
    assert way("--model", "qwen2.5-32b-instruct", "--gpu-memory-gib", "8")["chosen"] == ""
    assert "must be above 0" in refused("python", MODULE / "07_which_way.py", "--gpus", "0")
