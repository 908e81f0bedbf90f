"""Stage 04, the real loop: the same losses however its rows are divided, packed and recomputed; the
Trainer's losses; and each trap of Accelerate, seen in the installed one.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, RUNS, in_processes, python, recipe, refused

MODULE = ROOT / "modules/04_Accelerate"
LOOP = MODULE / "05_real_loop.py"
PROGRAMS = ROOT / "tests/programs"
RATE = 3e-3
# Two steps an epoch, four rows a step: of 8 conversations of 1 to 3 turns.
FLAGS = ["--rows", "8", "--steps", "4", "--learning-rate", str(RATE), "--warmup", "2"]
FLAGS += ["--seq-len", "160"]
WHOLE = ["--micro-batch", "4"]
MODULES = "transformers.models.llama.modeling_llama,transformers.trainer,accelerate,deepspeed"
TRAPS = ("ddp", "accelerate_traps")
BEFORE = ["02_train_accelerate", "05_real_loop"]


# -----------------------------------------------------------------------------
# The loop


def by_accelerate(config: str, program: str, *arguments) -> list:
    """The command that launches one of tests/programs in two processes."""
    file = MODULE / "configs" / f"{config}.yaml"
    script = PROGRAMS / f"{program}.py"
    return ["accelerate", "launch", "--config_file", file, script, *arguments]


@pytest.fixture(scope="module")
def loops(tiny_model) -> dict[str, dict]:
    """The loop in one process, in several ways that must not matter, and a few that show; on two
    processes; beside it all else that this file launches.
    """
    flags = ["--model", tiny_model, *FLAGS]
    ways = {
        "whole": WHOLE,
        "accumulated": ["--micro-batch", "1", "--accumulate", "4"],
        "packed": [*WHOLE, "--pack"],
        "checkpointing": [*WHOLE, "--checkpointing"],
        "hardly learning": [*WHOLE, "--learning-rate", "1e-12"],
        "clipped": [*WHOLE, "--clip", "1e-6", "--steps", "2"],
        "profile": [*WHOLE, "--profile", "--steps", "2"],
    }
    commands = {name: [LOOP, *flags, *more] for name, more in ways.items()}
    half = ["--micro-batch", "1", "--accumulate", "2"]
    equal_blocks = ["--model", tiny_model, "--steps", "4", "--seq-len", "64"]
    equal_blocks += ["--learning-rate", RATE]
    unequal_rows = ["--model", tiny_model, "--seq-len", "160", "--micro-batch", "1"]
    commands |= {
        "two": recipe("real-loop", *flags, *half),
        "weights": recipe("loss-weights", *unequal_rows),
        "ddp": [MODULE / "01_train_ddp.py", *equal_blocks, "--micro-batch", "4"],
        "trainer": recipe("train-trainer", *equal_blocks, *half),
        # With the variable that a DeepSpeed YAML sets: four micro-steps.
        "traps": ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", *by_accelerate(*TRAPS)],
    }
    for script in BEFORE:
        program = PROGRAMS / "before_prepare.py"
        commands[script] = [program, MODULE / f"{script}.py", "--model", tiny_model]
    return in_processes(MODULES, commands)


def same(one: dict, other: dict) -> bool:
    """Loss, gradient norm and validation loss of every step, to the rounding of float32."""
    return (
        other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        and other["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-3)
        and other["validation_losses"] == pytest.approx(one["validation_losses"], rel=1e-5)
    )


@pytest.mark.parametrize("how", ["accumulated", "packed", "checkpointing"])
def test_how_it_is_computed_does_not_matter(loops, how):
    assert same(loops["whole"], loops[how])
    assert (loops[how]["filled_up_ratio"] == 0) == (how in ("packed", "accumulated"))


def test_two_processes_compute_what_one_does(loops):
    """Also where both processes and micro-steps divide the rows, and validation's 9 do not fit."""
    two = loops["two"]
    assert two["world_size"] == 2 and two["wrapper"] == "DistributedDataParallel"
    assert same(loops["whole"], two)
    assert two["learning_rates"] == loops["whole"]["learning_rates"]


def test_the_schedule_and_what_it_learns(loops):
    """Up in two steps, down the cosine over the other two; the loss falls."""
    rates = loops["whole"]["learning_rates"]
    assert rates == pytest.approx([RATE / 2, RATE, RATE, RATE / 2])
    judged = loops["whole"]["validation_losses"]
    assert list(judged) == ["0", "2", "4"] and judged["4"] < judged["2"] < judged["0"]


def test_each_epoch_has_its_own_order(loops):
    """Where nothing is learnt, a second epoch in the same order would have the same losses."""
    losses = loops["hardly learning"]["losses"]
    assert losses[:2] != pytest.approx(losses[2:], rel=1e-6)


def test_clipping_shortens_the_gradient(loops):
    """The norm is the one before it is shortened; so short, AdamW's eps leaves little of a step."""
    assert loops["clipped"]["clipped_steps_count"] == 2
    assert loops["clipped"]["losses"][1] > loops["whole"]["losses"][1] + 0.01
    assert loops["clipped"]["gradient_norms"][0] == pytest.approx(
        loops["whole"]["gradient_norms"][0], rel=1e-3
    )


def test_where_the_time_goes(loops):
    parts = {name for name in loops["profile"] if name.endswith("_part_s")}
    assert parts == {f"{name}_part_s" for name in ("data", "forward", "backward", *ENDS)}
    together = sum(loops["profile"][name] for name in parts)
    assert together == pytest.approx(loops["profile"]["step_s"], rel=0.2, abs=0.05)
    trace = json.loads((RUNS / "04_Accelerate/real_loop/trace_0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"forward", "backward", "aten::mm"} <= names


ENDS = ("clip", "optimizer", "log")


def test_the_tracker_has_the_curves(loops):
    """What TensorBoard reads of the longest run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert loops["whole"]["trackers"] == "tensorboard"
    longest = []
    for folder in {file.parent for file in RUNS.glob("04_Accelerate/real_loop/**/events*")}:
        events = EventAccumulator(str(folder)).Reload()
        if {"loss", "validation_loss"} <= set(events.Tags()["scalars"]):
            longest = max(longest, [event.step for event in events.Scalars("loss")], key=len)
            assert events.Scalars("learning_rate")
    assert longest[:4] == [1, 2, 3, 4]


@pytest.mark.long
def test_compiled(loops, tiny_model):
    flags = ["--model", tiny_model, *FLAGS, *WHOLE]
    done = python(LOOP, *flags, "--compile", check=0)
    assert same(loops["whole"], json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--warmup", "-1"], "--warmup at least 0"),
        (["--clip", "0"], "--rows and --clip must be positive"),
        (["--profile", "--steps", "1"], "--steps must be at least 2"),
    ],
)
def test_impossible_flags(flags, reason):
    assert reason in refused("python", LOOP, *flags)


def test_too_few_rows(tiny_model):
    flags = ["--model", tiny_model, "--rows", "3", "--micro-batch", "4", "--accumulate", "1"]
    few = "one step needs 4 rows (1 processes x 1 micro-steps x 4), here are 3: raise --rows"
    assert few in refused("python", LOOP, *flags, PROFILE="cpu")


# -----------------------------------------------------------------------------
# Packing: the attention's blocks, in the installed transformers


@pytest.fixture(scope="module")
def packing(tiny_model):
    """(model, two rows of 5 and 7 tokens, their packed batch)."""
    import sys

    import torch
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str(MODULE))
    from chat_rows import packed

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert model.config._attn_implementation == "sdpa"
    rows = [torch.arange(10, 15), torch.arange(40, 47)]
    yield model, rows, packed(rows)
    sys.path.remove(str(MODULE))


def distance(packing, **settings) -> float:
    """How far the packed logits are from those of each row alone."""
    import torch

    model, rows, batch = packing
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0] for row in rows]
        together = model(**{**batch, **settings}).logits[0]
    return (torch.cat(alone) - together).abs().max().item()


def test_packed_rows_do_not_see_each_other(packing):
    assert distance(packing, use_cache=False) < 1e-5


def test_packed_rows_see_each_other_with_a_cache_or_a_mask(packing):
    """The two traps: use_cache is on by default, and many collators send a mask of ones."""
    import torch

    ones = torch.ones_like(packing[2]["input_ids"])
    assert distance(packing) > 1e-3
    assert distance(packing, use_cache=False, attention_mask=ones) > 1e-3


def test_no_row_is_predicted_from_the_row_before(packing):
    labels = packing[2]["labels"][0]
    assert [place for place, label in enumerate(labels) if label == -100] == [0, 5]


# -----------------------------------------------------------------------------
# The loss of unequal rows


def test_only_the_mean_over_all_tokens_is_right(loops):
    """Beside one process with one batch: the same but for rounding; the others are another loss."""
    weighted = loops["weights"]
    assert weighted["shortest_row_tok_count"] < 0.8 * weighted["longest_row_tok_count"]
    for kind in ("loss", "gradient"):
        assert weighted[f"tokens_{kind}_difference_ratio"] < 1e-5
    assert weighted["means_gradient_difference_ratio"] > 1e-3
    assert weighted["local_gradient_difference_ratio"] > 1e-3


# -----------------------------------------------------------------------------
# The Trainer


def test_the_trainer_computes_what_ddp_does(loops):
    """Two processes of two micro-steps: the losses of 01 in one process."""
    one = loops["ddp"]
    trained = loops["trainer"]
    assert trained["world_size"] == 2 and trained["wrapper"] == "DistributedDataParallel"
    assert trained["losses"] == pytest.approx(one["losses"], rel=5e-6)
    assert one["losses"][-1] < one["losses"][0] - 0.05


def test_the_trainer_counts_a_token_that_nothing_predicts():
    """16 labels, of which the loss is a sum over 14: why 06 marks the first of a row."""
    from types import SimpleNamespace

    import torch
    from transformers import Trainer

    settings = SimpleNamespace(average_tokens_across_devices=False, n_gpu=1)
    accelerator = SimpleNamespace(parallelism_config=None)
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True,
        compute_loss_func=None,
        args=settings,
        accelerator=accelerator,
    )
    labels = torch.ones(2, 8, dtype=torch.long)
    count = Trainer._get_num_items_in_batch
    assert count(trainer, [{"labels": labels}], "cpu") == 16
    labels[:, 0] = -100
    assert count(trainer, [{"labels": labels}], "cpu") == 14


# -----------------------------------------------------------------------------
# Accelerate's traps


@pytest.fixture
def traps(loops) -> dict:
    """What two processes see."""
    return loops["traps"]


def test_trap_the_launcher_overrides_the_code(traps, tmp_path):
    """Its YAML sets the variable under deepspeed_config only; on the first level it is refused."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    assert traps["accumulation"] == {"given as a number": 4, "given by the plugin": 1}
    content = yaml.safe_load((MODULE / "configs/deepspeed_zero2.yaml").read_text())
    config = tmp_path / "four.yaml"
    content["deepspeed_config"]["gradient_accumulation_steps"] = 4
    config.write_text(yaml.safe_dump(content))
    command = ["--config_file", str(config), "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, variables = prepare_deepspeed_cmd_env(args)
    assert variables["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"
    config.write_text(yaml.safe_dump(content | {"gradient_accumulation_steps": 4}))
    with pytest.raises(ValueError, match="unknown keys .*gradient_accumulation_steps"):
        ClusterConfig.from_yaml_file(str(config))


def test_trap_a_prepared_scheduler_is_as_many_times_as_fast(traps):
    """After three optimizer steps of two processes; accumulation changes nothing about it."""
    assert traps["scheduler prepared"] == 6
    assert traps["scheduler prepared, accumulated"] == 6
    assert traps["scheduler prepared, split batches"] == 3
    assert traps["scheduler outside"] == 3


def test_trap_before_the_last_micro_step_norms_are_each_process_s_own(traps):
    first = traps["clipped"]["first"]
    last = traps["clipped"]["last"]
    assert abs(first[0] - first[1]) > 0.1 and last[0] == pytest.approx(last[1], rel=1e-6)


def test_trap_gather_for_metrics_knows_only_rows(traps):
    """9 rows: 12 are read. Means lose one of six at the end; a data set without length whose
    batches are not dealt out by the first process keeps what was read again.
    """
    kept = traps["gathered"]
    assert (kept["gathered"], kept["rows"]) == (12, 9)
    assert kept["means"] == 5
    assert (kept["dispatched"], kept["without length"]) == (9, 12)


def test_trap_even_batches(traps):
    """Without them a process has a batch less, and the others would wait for it."""
    assert traps["uneven"] == [[2, 2, 1], [2, 2]]
    assert traps["split"] == [[2, 2], [2, 2]]


def test_trap_the_order_of_shuffled_rows(traps):
    """By default it hangs on every random number drawn before; with a seed of its own it does not.
    All processes share it: each row is read once.
    """
    plain, disturbed = traps["orders"]
    assert plain != disturbed
    seeded, seeded_too = traps["seeded orders"]
    assert seeded == seeded_too and seeded[0] != seeded[1]
    for epoch in (*plain, *seeded):
        assert sorted(epoch) == list(range(8))


def test_trap_a_loader_that_ends_ends_the_step(traps):
    """Four batches of a process, two a step, fetched a step ahead."""
    assert traps["early ends"] == [False, True, True, True]
    assert traps["no early ends"] == [False, True, False, True]


def test_trap_a_tracker_that_is_not_installed(traps):
    assert traps["trackers"] == []


# -----------------------------------------------------------------------------
# FSDP2: a model that one card cannot hold


@pytest.mark.parametrize("script", BEFORE)
def test_no_model_is_on_the_device_before_prepare(loops, script):
    """Under FSDP a card gets its part only: who moves the whole model there needs room for it."""
    assert loops[script] == ["cpu"]


@pytest.fixture(scope="module")
def fsdp(tiny_model) -> dict:
    """By the launcher itself, which above had its processes forked."""
    command = ["-m", "lab.launch", "fsdp_traps", *by_accelerate("fsdp", "fsdp_traps", tiny_model)]
    return json.loads(python(*command, check=0).stdout.splitlines()[-1])


def test_only_the_first_process_reads_the_weights(fsdp):
    """The second one's are zero until prepare, which gives each its half."""
    first, second = fsdp["loading"]["read"]
    assert first > 0 and second == 0
    held = fsdp["loading"]["held"]
    assert sum(held) == fsdp["loading"]["parameters"] and max(held) < 0.6 * sum(held)
    assert fsdp["loading"]["filled"] > 0.9 * min(held)


def test_trap_frozen_weights_become_float32(fsdp):
    """Under mixed precision; not where there is none."""
    assert fsdp["frozen"] == "torch.float32"
    assert fsdp["frozen in pure bf16"] == "torch.bfloat16"


def test_trap_while_accumulating_gradients_are_whole(fsdp):
    """In a micro-step that waits each of two processes has all of them, otherwise half."""
    assert fsdp["gradients"] == pytest.approx([1, 0.5], abs=0.02)
    assert fsdp["gradients reduced at once"] == pytest.approx([0.5, 0.5], abs=0.02)


# -----------------------------------------------------------------------------
# The page


def test_every_trap_of_the_page_has_its_test():
    """The table's last column names tests of this file."""
    page = (MODULE / "real_loop.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    ours = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(), re.M))
    assert named and named <= ours
    assert {name for name in ours if name.startswith("test_trap_")} <= named
