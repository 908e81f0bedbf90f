"""Stage 04: one process = native DDP = Accelerate = FSDP2 = ZeRO-2, step by step; what the
launcher's YAML says is really used.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, in_processes, recipe, refused, run

from lab import jobs

MODULE = ROOT / "modules/04_Accelerate"
DDP = MODULE / "01_train_ddp.py"
ACCELERATE = MODULE / "02_train_accelerate.py"
MIXED = MODULE / "03_mixed_precision.py"
TWIN = MODULE / "04_mini_accelerate.py"
MODULES = "transformers.models.llama.modeling_llama,accelerate,deepspeed"
CONFIGS = sorted((MODULE / "configs").glob("*.yaml"))
# A learning rate at which a step that forgot the other process's gradients would be seen in the
# losses.
FLAGS = ["--steps", "4", "--seq-len", "32", "--learning-rate", "0.003"]


def make(target: str, *flags) -> dict:
    arguments = " ".join(map(str, flags))
    done = run("make", "-s", target, f"ARGS={arguments}", check=0)
    (line,) = done.stdout.splitlines()  # the launchers' chatter belongs to stderr
    return json.loads(line)


def weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


# Four blocks a step; {name: (make target, its variables, (micro-batch, micro-steps), wrapper)}
SAME = {
    "accelerate": ("train-accelerate", {}, (2, 1), "DistributedDataParallel"),
    "fsdp": ("train-accelerate", {"CONFIG": "fsdp"}, (1, 2), "FSDPLlamaForCausalLM"),
    "zero2": ("train-accelerate", {"CONFIG": "deepspeed_zero2"}, (1, 2), "DeepSpeedEngine"),
}
ACCUMULATED = {
    "ddp accumulated": ("train-ddp", {}, (1, 2), "DistributedDataParallel"),
    "accelerate accumulated": ("train-accelerate", {}, (1, 2), "DistributedDataParallel"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of folders in which trainings leave their models."""
    return tmp_path_factory.mktemp("saved")


def on_two(trainings: dict, saved, flags: list) -> dict[str, list]:
    """The commands of their make targets."""
    commands = {}
    for name, (target, variables, (micro_batch, accumulate), _) in trainings.items():
        batch = ["--micro-batch", micro_batch, "--accumulate", accumulate]
        save = ["--save", saved / name.split()[0]]
        commands[name] = recipe(target, *flags, *batch, *save, **variables)
    return commands


@pytest.fixture(scope="module")
def trained(tiny_model, saved) -> dict[str, dict]:
    """All trainings: of one process with four blocks a step, on two, the twin's, mixed."""
    flags = ["--model", tiny_model, *FLAGS]
    whole = [*flags, "--micro-batch", "4"]
    accumulated = [*flags, "--micro-batch", "1", "--accumulate", "4"]
    bf16 = ["--mixed-precision", "bf16", "--steps", "2"]
    nine_rows = ["--micro-batch", "3", "--steps", "1", "--learning-rate", "1e-9"]
    nine_rows += ["--model", tiny_model, "--seq-len", "64"]
    commands = {
        "one": [DDP, *whole, "--save", saved / "one"],
        "01_train_ddp accumulated": [DDP, *accumulated],
        "01_train_ddp bf16": [DDP, *whole, *bf16],
        "02_train_accelerate accumulated": [ACCELERATE, *accumulated],
        "02_train_accelerate bf16": [ACCELERATE, *whole, *bf16],
        **on_two(SAME, saved, flags),
        "twin": recipe("mini-accelerate", *flags, "--micro-batch", 1, "--accumulate", 2),
        "nine rows": [TWIN, *nine_rows],
        "nine rows on two": recipe("mini-accelerate", *nine_rows),
        "mixed": ["PROFILE=cpu", "python", MIXED, "--model", tiny_model, "--seq-len", 32],
    }
    return in_processes(MODULES, commands)


@pytest.fixture
def one(trained) -> dict:
    """What the others must equal."""
    alone = trained["one"]
    assert alone["world_size"] == 1
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    return alone


def same_training(ours: dict, folder: Path, one: dict, saved: Path) -> None:
    """The losses of one process, and at the end its weights."""
    assert ours["world_size"] == 2
    assert ours["losses"] == pytest.approx(one["losses"], rel=5e-6)
    left = weights(folder)
    theirs = weights(saved / "one")
    if "lm_head.weight" in left:  # FSDP's gathered weights hold the tied embedding twice
        assert left.pop("lm_head.weight").equal(left["model.embed_tokens.weight"])
    assert left.keys() == theirs.keys()
    assert all((left[name] - theirs[name]).abs().mean() < 1e-4 for name in theirs)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_compute_what_one_does(trained, one, saved, name):
    """Four blocks a step on two processes, at once or accumulated."""
    assert trained[name]["wrapper"] == SAME[name][-1]
    same_training(trained[name], saved / name, one, saved)


@pytest.mark.long
def test_two_processes_accumulate(one, saved, tiny_model):
    commands = on_two(ACCUMULATED, saved, ["--model", tiny_model, *FLAGS])
    for name, ours in in_processes(MODULES, commands).items():
        assert ours["wrapper"] == ACCUMULATED[name][-1]
        same_training(ours, saved / name.split()[0], one, saved)


def test_torchrun_computes_what_one_process_does(one, saved, tiny_model):
    """By make and the launcher itself, which above had its processes forked."""
    flags = ["--model", tiny_model, *FLAGS, "--micro-batch", "2", "--save", saved / "two"]
    two = make("train-ddp", *flags)
    assert two["wrapper"] == "DistributedDataParallel"
    same_training(two, saved / "two", one, saved)


# -----------------------------------------------------------------------------
# The twin: mini_accelerate


def test_the_twin_computes_what_accelerate_does(trained, one):
    """On two processes, two micro-steps each: the losses of one process, which are Accelerate's
    too (above).
    """
    assert trained["twin"]["world_size"] == 2
    assert trained["twin"]["losses"] == pytest.approx(one["losses"], rel=5e-6)


def test_the_twin_is_taken_up_again(trained):
    """What is trained after load_state is what was trained after save_state."""
    assert trained["twin"]["again_difference_ratio"] == 0


def test_the_twin_counts_no_row_twice(trained):
    """Two processes read 12 rows to see 9; the mean is that of one process, which reads 9."""
    alone = trained["nine rows"]
    two = trained["nine rows on two"]
    assert (alone["read_row_count"], alone["validation_row_count"]) == (9, 9)
    assert (two["read_row_count"], two["validation_row_count"]) == (12, 9)
    assert two["validation_loss"] == pytest.approx(alone["validation_loss"], rel=5e-6)


def test_the_twin_deals_out_the_batches_of_accelerate(monkeypatch):
    """Every process the same rows as by accelerate.data_loader.BatchSamplerShard."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    monkeypatch.syspath_prepend(MODULE)
    from mini_accelerate.shares import ShareOfBatches

    for rows in range(1, 20):
        for size in (1, 2, 3):
            for processes in (1, 2, 3, 4):
                for process in range(processes):
                    batches = BatchSampler(range(rows), size, drop_last=False)
                    ours = list(ShareOfBatches(batches, process, processes))
                    theirs = list(BatchSamplerShard(batches, processes, process))
                    assert ours == theirs, (rows, size, processes, process)


SCRIPTS = [DDP.stem, ACCELERATE.stem]


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_accumulates(one, trained, script):
    assert trained[f"{script} accumulated"]["losses"] == pytest.approx(one["losses"], rel=5e-6)


@pytest.mark.long
def test_gradients_are_means_not_sums(tree, tiny_model):
    """Adam does not see a gradient that is twice too long, SGD does: both scripts with their
    optimizer exchanged.
    """
    for script in (DDP, ACCELERATE):
        text = script.read_text()
        assert text.count("torch.optim.AdamW(") == 1
        copy = tree / script.relative_to(ROOT)
        copy.write_text(text.replace("torch.optim.AdamW(", "torch.optim.SGD("))
    flags = ["--model", tiny_model, "--steps", "4", "--seq-len", "64", "--learning-rate", "0.5"]
    whole = [*flags, "--micro-batch", "4"]
    accumulated = [*flags, "--micro-batch", "1", "--accumulate", "4"]
    ddp, accelerate = (tree / script.relative_to(ROOT) for script in (DDP, ACCELERATE))
    runs = {
        "ddp": [ddp, *whole],
        "ddp accumulated": [ddp, *accumulated],
        "accelerate accumulated": [accelerate, *accumulated],
    }
    by_sgd = in_processes(MODULES, runs, cwd=tree, PYTHONPATH=str(tree))
    whole_losses = by_sgd["ddp"]["losses"]
    assert whole_losses[-1] < whole_losses[0] - 0.01
    assert by_sgd["ddp accumulated"]["losses"] == pytest.approx(whole_losses, rel=5e-6)
    assert by_sgd["accelerate accumulated"]["losses"] == pytest.approx(whole_losses, rel=5e-6)


@pytest.mark.long
def test_the_data_begins_anew(tiny_model):
    """More steps than the data set has: it is read again from its first block."""
    rows = json.loads((ROOT / "modules/06_LLaMA-Factory/data/launch_en_test.json").read_text())
    small = Path(tiny_model) / "four.json"
    small.write_text(json.dumps(rows[:4]))
    flags = ["--model", tiny_model, "--data", small, "--steps", "5", "--seq-len", "64"]
    flags += ["--learning-rate", "1e-9", "--micro-batch", "1", "--accumulate", "2"]
    runs = {"ddp": [DDP, *flags], "accelerate": [ACCELERATE, *flags]}
    for anew in in_processes(MODULES, runs).values():
        losses = anew["losses"]
        period = next(n for n in (2, 3, 4) if losses[n] == pytest.approx(losses[0], abs=1e-5))
        assert losses[period:] == pytest.approx(losses[: 5 - period], abs=1e-5)


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("script", [DDP, ACCELERATE], ids=lambda f: f.stem)
@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--steps", "0"], "must be positive"),
        (["--accumulate", "-1"], "must be positive"),
        (["--learning-rate", "0"], "must be positive"),
        (["--seq-len", "1"], "--seq-len at least 2"),
        (["--save", str(ROOT / "Makefile")], "cannot save to"),
    ],
)
def test_impossible_flags(script, flags, reason):
    assert reason in refused("python", script, *flags)


def test_too_few_blocks(tiny_model):
    few = "one step needs 1000 blocks (1 processes x 2 micro-steps x 500), launch_en_train has"
    flags = ["--model", tiny_model, "--seq-len", "64", "--micro-batch", "500", "--accumulate", "2"]
    assert few in refused("python", ACCELERATE, *flags)
    fewer = "lower --steps or --micro-batch"
    assert fewer in refused("python", MIXED, "--model", tiny_model, "--steps", "9999")


@pytest.mark.long  # the readme's block is refused so, by its exit code, in `make test`
def test_too_few_blocks_for_two(tiny_model):
    flags = f"--model {tiny_model} --micro-batch 500 --seq-len 64"
    few = "one step needs 1000 blocks (2 processes x 1 micro-steps x 500), launch_en_train has"
    assert few in refused("make", "-s", "train-ddp", f"ARGS={flags}")


def test_one_process_shares_nothing():
    """By Accelerate's launcher, and the script alone; torchrun's exit code is in the readme."""
    one = "1 process is running, where at least 2 were to share the work"
    assert one in refused("make", "-s", "train-accelerate", "PROCESSES=1")
    assert one in refused("python", DDP, "--min-world", "2")


def test_unknown_config():
    assert "choose ddp, fsdp or deepspeed_zero2" in refused(
        "make", "-s", "train-accelerate", "CONFIG=tpu"
    )
    assert [f.stem for f in CONFIGS] == ["ddp", "deepspeed_zero2", "fsdp"]


def test_fp16_wants_a_gpu(tiny_model):
    """Accelerate would compute in float32 and not say so."""
    assert "Accelerate leaves fp16 out on a cpu" in refused(
        "python", MIXED, "--model", tiny_model, "--precisions", "fp16", PROFILE="cpu"
    )


def test_multi_cpu_starts_one_process(tmp_path):
    """Why configs/ddp.yaml does not say MULTI_CPU: without mpirun it starts one process, which
    --min-world finds.
    """
    config = tmp_path / "multi_cpu.yaml"
    config.write_text(
        (MODULE / "configs/ddp.yaml").read_text().replace("MULTI_GPU", "MULTI_CPU")
        + "use_cpu: true\n"
    )
    launch = ["python", "-m", "lab.launch", "train-multi-cpu", "accelerate", "launch"]
    script = ["--config_file", config, ACCELERATE, "--min-world", "2"]
    assert "1 process is running" in refused(*launch, *script, PROFILE="cpu")


# -----------------------------------------------------------------------------
# The launcher's YAML


def unused(config) -> set[str]:
    """Settings of a launcher YAML that `accelerate launch` does not know or does not take over."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    ClusterConfig.from_yaml_file(
        str(config)
    )  # raises on an unknown key of the first level, and only there
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    )
    known = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load(Path(config).read_text())
    nested = {
        key: value
        for section, values in content.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return {key for key, value in nested.items() if key not in known or getattr(args, key) != value}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: f.stem)
def test_launcher_yaml(config):
    """Accelerate's own parser takes over every setting; the numbers of processes agree with the
    profiles.
    """
    assert not unused(config)
    content = yaml.safe_load(config.read_text())
    assert (
        content["num_processes"] == 2
        and content["mixed_precision"] == "no"
        and "use_cpu" not in content
    )


@pytest.mark.parametrize(
    "config, old, new",
    [
        ("fsdp", "fsdp_reshard_after_forward", "fsdp_reshard"),
        ("deepspeed_zero2", "zero_stage", "zero_level"),
    ],
)
def test_a_setting_that_would_be_ignored_is_found(tmp_path, config, old, new):
    text = (MODULE / "configs" / f"{config}.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace(old, new))
    assert unused(tmp_path / "wrong.yaml") == {new}
    (tmp_path / "wrong.yaml").write_text(text.replace("num_machines", "number_of_machines"))
    with pytest.raises(ValueError, match="number_of_machines"):
        unused(tmp_path / "wrong.yaml")


# -----------------------------------------------------------------------------
# The pair, mixed precision, and what is left behind


def test_the_pair_differs_in_few_lines():
    """Outside of the docstrings, the scripts differ in the lines that the lesson is about."""
    import difflib

    codes = [
        re.sub(r'^""".*?"""', "", f.read_text(), flags=re.S).splitlines() for f in (DDP, ACCELERATE)
    ]
    changed = [
        line
        for line in difflib.unified_diff(*codes, lineterm="", n=0)
        if re.match(r"[+-](?![+-])", line)
    ]
    removed = [line for line in changed if line.startswith("-")]
    assert 10 < len(removed) < 42 and len(changed) - len(removed) < 48, "\n".join(changed)
    kept = "\n".join(codes[1])
    assert not re.search(
        r"DistributedSampler|DistributedDataParallel|no_sync|all_reduce"
        r"|init_process_group|\.autocast",
        kept,
    )
    assert "".join(changed).count("accelerator") > 5


def test_readme_shows_the_lines_of_the_pair():
    """Every line of the readme's diff is a line of the script it is said to be of."""
    block = re.search(r"```diff\n(.*?)```", (MODULE / "readme.md").read_text(), re.S)[1]
    sources = {"-": DDP.read_text().splitlines(), "+": ACCELERATE.read_text().splitlines()}
    lines = [line for line in block.splitlines() if line[:1] in sources]
    assert len(lines) > 20
    for line in lines:
        assert line[1:].strip() in [source.strip() for source in sources[line[0]]], line


def test_mixed_precision(trained):
    mixed = trained["mixed"]
    assert (mixed["fp32_product"], mixed["bf16_product"]) == ("float32", "bfloat16")
    for name in ("fp32_parameters", "fp32_gradients", "bf16_parameters", "bf16_gradients"):
        assert mixed[name] == "float32", name
    assert 0 < mixed["bf16_loss_difference_ratio"] < 0.01
    assert mixed["fp32_loss_difference_ratio"] == 0
    assert mixed["bf16_judged_difference_ratio"] < 0.01
    assert 0.01 < mixed["update_lost_ratio"] < 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_is_used(one, trained, script):
    """--mixed-precision bf16 changes the losses, a little."""
    losses = trained[f"{script} bf16"]["losses"]
    expected = one["losses"][:2]
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "target, how",
    [
        pytest.param("train-ddp", "ctrl-c", marks=pytest.mark.long),
        ("train-accelerate", "ctrl-c"),
        ("train-ddp", "launcher killed"),
    ],
)
def test_interrupted_training_leaves_nothing(target, how, tiny_model):
    command = ["make", "-s", target, f"ARGS=--model {tiny_model} --steps 100000 --seq-len 64"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step   3"):
            break
    launcher = psutil.Process(jobs.running()[target]["pid"])
    members = [launcher, *launcher.children(recursive=True)]
    assert len(members) >= 3  # the launcher and two processes
    sessions = {os.getsid(member.pid) for member in members}
    assert len(sessions) >= 3, "torchrun's processes each have a session of their own"
    if how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        launcher.kill()
    process.communicate(timeout=300)
    assert process.returncode != 0 and target not in jobs.running()
    time.sleep(0.5)
    assert not [p for p in members if p.is_running() and p.status() != "zombie"]


def test_a_job_file_that_vanishes(tmp_path, monkeypatch):
    """Two may look after one job, as lab.launch and `make stop` do: a file that one has just
    removed is no job to the other.
    """
    monkeypatch.setattr(jobs, "FOLDER", tmp_path)
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")  # listed, but not there to be read
    assert jobs.running() == {}
