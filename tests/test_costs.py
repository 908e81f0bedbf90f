"""Costs: the alpha-beta model, gradients in bf16, Accelerate beside DDP, and their one table."""

import ast
import importlib
import json
import re

import pytest
from conftest import ROOT, RUNS, in_processes, recipe, refused, run

from lab import models
from lab.planner import speed, weights
from lab.planner.config import read

CPU = {"PROFILE": "cpu"}
ACCUMULATE = 2


def result(done) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def module(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "modules/05_DeepSpeed"))
        patch.syspath_prepend(str(ROOT / "scripts"))
        return __import__(name)


@pytest.fixture(scope="module")
def alpha_beta():
    return module("alpha_beta")


@pytest.fixture(scope="module")
def smollm(alpha_beta):
    """The Shape of the model that mini_zero's record was counted on, and its planner's model."""
    model = read(models.config("smollm2-135m"))
    shape = alpha_beta.Shape(
        parameters=weights.parameters(model),
        outside=weights.embeddings(model) + model.hidden,
        layers=model.layers,
        hidden=model.hidden,
        tokens=256,
        accumulate=ACCUMULATE,
        bucket=25 * 2**20 // 4,
    )
    return shape, model


# -----------------------------------------------------------------------------
# Formulas


@pytest.mark.parametrize("kind", ["all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("n", [2, 8])
def test_fit_finds_latency_and_bandwidth(alpha_beta, kind, n):
    """From times made of them, each off by 1 %: both within 3 %."""
    line = alpha_beta.Line(20e-6, 1 / 10e9)
    points = []
    for step, off in enumerate((1.01, 0.99, 1.01, 0.99, 1.01, 0.99, 1.01, 0.99, 1.01)):
        size = 4096 * 4**step
        took = off * alpha_beta.ring(kind, size, n, line)
        points.append(alpha_beta.Point(size, took))
    fitted = alpha_beta.fit(kind, points, n)
    assert fitted.alpha == pytest.approx(line.alpha, rel=0.03)
    assert fitted.beta == pytest.approx(line.beta, rel=0.03)
    bus = alpha_beta.bus_bandwidth(kind, points[-1], n)
    assert bus == pytest.approx(1 / line.beta, rel=0.03)


def test_no_latency_is_negative(alpha_beta):
    """Where short messages are quicker than any line, the bandwidth alone is fitted."""
    points = [alpha_beta.Point(1e3, 1e-7), alpha_beta.Point(1e6, 1e-3)]
    line = alpha_beta.fit("all_gather", points, 2)
    assert line.alpha == 0
    assert line.beta > 0


def test_messages_are_those_that_mini_zero_counted(alpha_beta, smollm):
    """Numbers a step and parameter, by standing in front of torch.distributed: its record."""
    shape, _ = smollm
    record = json.loads((ROOT / "results/cpu-2c/05_DeepSpeed/03_mini_zero.json").read_text())
    assert record["config"]["accumulate"] == ACCUMULATE
    ways = alpha_beta.ways(shape)
    for stage, way in enumerate(("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3, FSDP2")):
        counted = record["metrics"][f"z{stage}_sent_per_parameter_ratio"]
        assert alpha_beta.sent(ways[way]) / shape.parameters == pytest.approx(counted, rel=1e-3)


def test_planner_sends_the_same(alpha_beta, smollm):
    """DDP, ZeRO-2 and ZeRO-3 by the planner: bytes of whole tensors, an all-reduce twice.

    At stage 2 DeepSpeed sums whole buckets, which sends the gradients once more; at stage 3 it
    gathers twice what is outside of the layers too.
    """
    shape, model = smollm
    ways = alpha_beta.ways(shape)
    training = module("trainings").Training
    for way, zero, engine in (
        ("DDP", 0, "ddp"),
        ("ZeRO-2", 2, "deepspeed"),
        ("ZeRO-3, FSDP2", 3, "deepspeed"),
    ):
        setup = training(engine=engine, zero=zero, dtype="float32", accumulate=ACCUMULATE)
        planned = sum(
            (1 + (kind == "all_reduce")) * size * times
            for kind, size, times in speed.train_messages(model, setup)
        )
        once_more = {2: shape.parameters, 3: shape.outside}.get(zero, 0)
        expected = alpha_beta.sent(ways[way]) + ACCUMULATE * once_more
        assert planned == pytest.approx(4 * expected)


def test_many_processes_wait_in_a_ring(alpha_beta, smollm):
    """From 2 to 1,024 a ring sends twice the bytes and waits 1,023 times, a tree ten times."""
    shape, _ = smollm
    ddp = alpha_beta.ways(shape)["DDP"]
    only_beta = {"all_reduce": alpha_beta.Line(0, 1e-9)}
    only_alpha = {"all_reduce": alpha_beta.Line(1e-5, 0)}
    grown = {}
    for name, lines in (("beta", only_beta), ("alpha", only_alpha)):
        times = [alpha_beta.step_seconds(ddp, n, 4, lines) for n in (2, 1024)]
        grown[name] = times[1] / times[0]
    assert grown["beta"] == pytest.approx(2, rel=0.01)
    assert grown["alpha"] == pytest.approx(1023)
    line = only_alpha["all_reduce"]
    assert alpha_beta.tree(1e6, 1024, line) == pytest.approx(10 * alpha_beta.tree(1e6, 2, line))


# -----------------------------------------------------------------------------
# The scripts, on two processes

LOOPS = ("accelerate", "accelerate_only_loss", "accelerate_own_loader", "accelerate_bucket_view")


@pytest.fixture(scope="module")
def measured(tiny_model) -> dict[str, dict]:
    """What each script's make target prints."""
    short = ["--model", tiny_model, "--seq-len", 32]
    four_steps = [*short, "--steps", 4, "--rounds", 1]
    commands = {
        "costs": recipe("train-costs", *short, "--accumulate", ACCUMULATE),
        "bf16": recipe("train-compressed", *four_steps, "--learning-rate", "1e-3"),
        "overhead": recipe("accelerate-overhead", *four_steps, "--only", "native_ddp", *LOOPS),
    }
    modules = "transformers.models.llama.modeling_llama,accelerate,matplotlib.pyplot"
    return in_processes(modules, commands, **CPU)


def test_train_costs(measured):
    """Messages are really sent; the line of a ring lies near them; both pictures are drawn."""
    metrics = measured["costs"]
    assert metrics["ddp_sent_per_parameter_ratio"] == pytest.approx(2)
    assert metrics["zero_2_sent_per_parameter_ratio"] == pytest.approx(ACCUMULATE + 1)
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        assert metrics[f"{kind}_link_gb_per_s"] > 0
        assert metrics[f"{kind}_check_error_ratio"] < 3  # the machine may be busy
    assert 0.2 < metrics["ddp_predicted_over_measured_ratio"] < 5
    assert metrics["pipeline_step_at_1024_ms"] == metrics["pipeline_step_at_2_ms"]
    for picture in ("costs", "collectives"):
        assert (RUNS / f"05_DeepSpeed/{picture}.png").stat().st_size < 150_000


def test_train_costs_refuses():
    assert "here is 1" in refused("make", "train-costs", "PROCESSES=1", **CPU)
    flags = "ARGS=--accumulate 0"
    assert "must be at least 1" in refused("make", "train-costs", flags, **CPU)


def test_gradients_in_bf16(measured, tiny_model):
    """Half the bytes, all of them counted; the float32 hook changes nothing, bf16 a little."""
    metrics = measured["bf16"]
    parameters = weights.parameters(read(models.config(str(tiny_model))))
    assert metrics["bf16_bytes_ratio"] == 0.5
    assert metrics["float32_all_reduced_gb"] == pytest.approx(4e-9 * parameters)
    assert metrics["float32_loss_difference_ratio"] < 1e-6
    assert 0 < metrics["bf16_loss_difference_ratio"] < 1e-3


def test_accelerate_overhead(measured):
    """Whatever is taken out of Accelerate's loop, it computes what the native one does."""
    metrics = measured["overhead"]
    for name in LOOPS:
        assert metrics[f"{name}_loss_difference_ratio"] < 1e-6
        assert metrics[f"{name}_over_native_ratio"] > 0
    assert metrics["native_ddp_over_native_ratio"] == 1
    first, *_, last = metrics["losses"]["native_ddp"]
    assert first != last  # it trains


def test_the_script_names_the_loops_that_there_are():
    """It names them itself, since overhead_loops imports torch and a refusal must not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "modules/04_Accelerate"))
        script = importlib.import_module("10_accelerate_overhead")
        loops = importlib.import_module("overhead_loops")
    assert list(script.NAMES) == list(loops.LOOPS)


def test_accelerate_overhead_refuses():
    flags = "ARGS=--only accelerate"
    assert "must name native_ddp" in refused("make", "accelerate-overhead", flags, **CPU)
    flags = "ARGS=--steps 3"
    assert "--steps must be above 3" in refused("make", "accelerate-overhead", flags, **CPU)


@pytest.mark.long
def test_deepspeed_0_computes_what_ddp_does(tiny_model):
    flags = f"--model {tiny_model} --seq-len 32 --steps 4 --rounds 1 "
    flags += "--only native_ddp deepspeed_0 deepspeed_0_autocast"
    metrics = result(run("make", "-s", "accelerate-overhead", f"ARGS={flags}", check=0, **CPU))
    for name in ("deepspeed_0", "deepspeed_0_autocast"):
        assert metrics[f"{name}_loss_difference_ratio"] < 5e-6


COUNT = """
import sys
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from transformers import AutoModelForCausalLM

deepspeed.init_distributed(dist_backend="gloo")
stage, accumulate = int(sys.argv[2]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
psi = sum(weight.numel() for weight in model.parameters())
adam = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
config = {"zero_optimization": {"stage": stage}, "optimizer": adam, "gradient_clipping": 0.0}
config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
sent = {}


def counting(name, times):
    original = getattr(TorchBackend, name)

    def call(self, tensor=None, *others, **options):
        whole = options.get("output_tensor", tensor)
        sent[name] = sent.get(name, 0) + times * whole.numel()
        given = () if tensor is None else (tensor,)
        return original(self, *given, *others, **options)

    setattr(TorchBackend, name, call)


counting("all_reduce", 2)
counting("reduce", 1)
counting("all_gather_into_tensor", 1)
counting("reduce_scatter_tensor", 1)
batch = torch.arange(32)[None]
for _ in range(accumulate):
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    engine.step()
if dist.get_rank() == 0:
    print({name: round(numbers / psi, 3) for name, numbers in sent.items()}, flush=True)
dist.barrier()
"""


@pytest.mark.long
@pytest.mark.parametrize("stage, reduced", [(1, 2), (2, 2 * ACCUMULATE)])
def test_deepspeed_sums_whole_buckets(tiny_model, tmp_path, stage, reduced):
    """Stages 1 and 2 of DeepSpeed all-reduce their gradients, and then gather: not 2 psi."""
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", script, tiny_model]
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = run(*command, stage, ACCUMULATE, check=0, **cpu)
    counted = ast.literal_eval(re.findall(r"(?m)^\{.*\}$", done.stdout)[-1])
    assert counted["all_reduce"] == pytest.approx(reduced, rel=0.01)
    assert "reduce_scatter_tensor" not in counted


# -----------------------------------------------------------------------------
# The table


def test_the_table_of_costs():
    """A row for each record, with its numbers; a dash where a script measured no states."""
    tables = module("tables")
    text = tables.filled("<!-- costs -->\nold\n<!-- /costs -->\n", "zh")
    assert "old" not in text
    machines = re.split(r"(?m)^`([\w-]+)` \(.*\):$", text)[1:]
    for machine, table in zip(machines[::2], machines[1::2], strict=True):
        rows = re.findall(r"(?m)^\| `make .*\|$", table)
        names = [name for name in tables.MADE if machine in tables.records(name)]
        assert len(rows) == len(names) > 0
        for name, row in zip(names, rows, strict=True):
            metrics = tables.records(name)[machine]["metrics"]
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert cells[0].startswith(f"`{tables.MADE[name].command}")
            state = metrics.get("state_gib")
            assert cells[6] == (tables.number(state) if state else tables.ABSENT)
            assert cells[10] == tables.number(metrics["throughput_tok_per_s"])
            assert (cells[11] == tables.ABSENT) == (machine == "cpu-2c")


def test_share_of_the_peak():
    """6 FLOP for a weight and token of a 0.5B, and its attention, over one card's 792 TFLOP/s."""
    tables = module("tables")
    record = tables.records("04_Accelerate/01_train_ddp")["h100x2-cap24"]
    speed = record["metrics"]["throughput_tok_per_s"]
    peak = tables.records("scripts/calibrate-roofline")["h100x2-cap24"]["metrics"]
    flop = 6 * 494e6 * speed / 2
    share = flop / peak["matmul_tflop_per_s"] / 1e12
    assert tables.of_peak(record) == pytest.approx(share, rel=0.05)


def test_costs_of_a_7b_lora_are_its_adapters(alpha_beta):
    """A record of LoRA under ZeRO-3 sends gradients of the adapter only, and gathers the model."""
    trainings = module("trainings")
    record = {
        "script": "05_DeepSpeed/train-z3-lora",
        "config": {
            "model": "runs/models/random-qwen2.5-7b-shape",
            "micro_batch": 1,
            "seq_len": 512,
            "accumulate": 1,
            "lora_rank": 8,
        },
        "metrics": {"world_size": 2, "dtype": "bfloat16", "parameters_count": 7_635_801_600},
    }
    model = trainings.model_of(record)
    assert model.name == "qwen2.5-7b-instruct"
    gathers = 2 * weights.parameters(model) * 2 / 2  # twice, in 2 bytes, half of it sent
    assert gathers < trainings.sent_bytes(record) < 1.01 * gathers
