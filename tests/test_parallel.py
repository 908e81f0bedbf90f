"""mini_parallel: each way to divide a training computes what one process does, step by step, and
sends what the arithmetic says. By SGD too, which sees a gradient of the wrong length.
"""

import runpy
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, in_processes, refused

MODULE = ROOT / "modules/05_DeepSpeed"
SCRIPT = MODULE / "04_mini_parallel.py"
# By its path: the package imports torch, which the schedules do not need.
schedule = SimpleNamespace(**runpy.run_path(str(MODULE / "mini_parallel/schedule.py")))
CPU = {"PROFILE": "cpu"}
QWEN3 = "transformers.models.qwen3.modeling_qwen3,transformers.models.qwen3_moe.modeling_qwen3_moe"
TOLERANCE = 5e-6  # relative, float32
STEPS = 4
BATCH, SEQ, MICRO_BATCHES = 16, 32, 8
SIZES = f"--steps {STEPS} --batch {BATCH} --seq-len {SEQ} --micro-batches {MICRO_BATCHES}"
# The models' sizes, written out.
HIDDEN, LAYERS, VOCABULARY, HEAD_DIM, KV_HEADS, EXPERTS, TOP_K = 128, 4, 512, 16, 4, 8, 2
TOKENS = BATCH * SEQ
PIPELINES = {2: ["2x1"], 4: ["2x2", "4x1"]}  # stages x replicas
WAYS = {
    world: [
        *(f"pipeline_{order}_{shape}" for shape in shapes for order in ("afab", "1f1b")),
        *("tensor", "ring", "experts"),
    ]
    for world, shapes in PIPELINES.items()
}
EVERY = [(world, way) for world in WAYS for way in WAYS[world]]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    """All ways by AdamW in two processes and by SGD in four; mini_zero's stages by SGD in two."""
    sizes = SIZES.split()
    by_sgd = ["--optimizer", "sgd", "--learning-rate", "0.3"]
    two = ["torchrun", "--nproc-per-node", 2]
    four = ["torchrun", "--nproc-per-node", 4]
    commands = {
        "2": [*two, SCRIPT, *sizes],
        "4": [*four, SCRIPT, *sizes, *by_sgd],
        "zero": [*two, ROOT / "tests/programs/zero_by_sgd.py"],
    }
    return list(in_processes(QWEN3, commands, **CPU).values())


@pytest.fixture
def trained(runs) -> dict[int, dict]:
    return {2: runs[0], 4: runs[1]}


# -----------------------------------------------------------------------------
# The same losses


@pytest.mark.parametrize("world, way", EVERY)
def test_losses_are_those_of_one_process(trained, world, way):
    losses = trained[world]["losses"]
    alone = losses["qwen3_moe" if way == "experts" else "qwen3"]
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] - 0.05, "the losses must fall, or equality proves little"
    assert losses[way] == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.parametrize("stage", range(4))
def test_mini_zero_takes_means_not_sums(runs, stage):
    """With two processes and two micro-steps, under an optimizer that sees a wrong length."""
    losses = runs[2]
    alone = losses["one process"]
    assert alone[-1] < alone[0] - 0.1
    assert losses[f"stage {stage}"] == pytest.approx(alone, rel=TOLERANCE)


# -----------------------------------------------------------------------------
# What is sent, and held


def of_pipeline(world: int, way: str) -> dict[str, int]:
    stages, replicas = map(int, way.split("_")[2].split("x"))
    return {"isend": 2 * (stages - 1) * TOKENS * HIDDEN}


def of_tensor(world: int, way: str) -> dict[str, int]:
    four_a_layer = 4 * 2 * TOKENS * HIDDEN  # an all-reduce counts twice
    norms_of_q_and_k = 2 * 2 * HEAD_DIM
    return {"all_reduce": world * LAYERS * (four_a_layer + norms_of_q_and_k)}


def of_ring(world: int, way: str) -> dict[str, int]:
    keys_and_values = 2 * TOKENS // world * KV_HEADS * HEAD_DIM
    return {"isend": world * LAYERS * keys_and_values * (3 * world - 2)}


def of_experts(world: int, way: str) -> dict[str, int]:
    rows = TOKENS // world * TOP_K * HIDDEN
    return {"all_to_all_single": world * LAYERS * (4 * rows + EXPERTS)}


@pytest.mark.parametrize("world, way", EVERY)
def test_traffic_is_the_arithmetic(trained, world, way):
    """Of the messages that a way is about by sums written out here; of everything by the script's,
    which know the gradients of what several processes have.
    """
    metrics = trained[world]
    by_hand = globals()[f"of_{way.split('_')[0]}"](world, way)
    for collective, numbers in by_hand.items():
        assert metrics[f"{way}_{collective}_count"] == numbers
    counted = {
        name: metrics[name.replace("_theory_count", "_count")]
        for name in metrics
        if name.startswith(f"{way}_") and name.endswith("_theory_count")
    }
    assert counted and counted == {name: metrics[name] for name in counted}


@pytest.mark.parametrize("world", WAYS)
def test_gradients_of_shared_weights_are_all_that_is_reduced(trained, world):
    """A pipeline of one replica reduces nothing but the tied embedding, twice; expert parallelism
    everything but the experts.
    """
    metrics = trained[world]
    tied = VOCABULARY * HIDDEN
    assert metrics[f"pipeline_1f1b_{world}x1_all_reduce_count"] == 2 * 2 * tied
    experts = metrics["qwen3_moe_parameters_bytes"] - metrics["experts_parameters_bytes"]
    of_all_experts = experts // 4 * world // (world - 1)
    whole = metrics["qwen3_moe_parameters_bytes"] // 4 - of_all_experts
    assert metrics["experts_all_reduce_count"] == 2 * world * whole


@pytest.mark.parametrize("world", WAYS)
def test_each_process_holds_its_part(trained, world):
    """Bytes of parameters: what is not divided is whole in each process."""
    metrics = trained[world]
    whole = metrics["qwen3_parameters_bytes"]
    ends = 4 * (VOCABULARY * HIDDEN + HIDDEN)
    norms = 4 * LAYERS * (2 * HIDDEN + 2 * HEAD_DIM)
    assert metrics["tensor_parameters_bytes"] == (whole - ends - norms) // world + ends + norms
    assert metrics["ring_parameters_bytes"] == whole
    last_stage = (whole - ends) // world + ends
    assert metrics[f"pipeline_1f1b_{world}x1_parameters_bytes"] == last_stage


def test_contiguous_shards_burden_the_last_process(trained):
    """Of world shards it attends to all, the first to one: (2 world - 1) / world of the mean, but
    for half of the diagonal.
    """
    for world, metrics in trained.items():
        shard = SEQ // world
        pairs = [rank * shard**2 + shard * (shard + 1) / 2 for rank in range(world)]
        expected = max(pairs) * world / sum(pairs)
        assert metrics["ring_busiest_to_mean_ratio"] == pytest.approx(expected, abs=1e-4)


# -----------------------------------------------------------------------------
# The schedules


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_schedules(stages, micro_batches, backward):
    """Every micro-batch once forward and then once backward; the bubble is the same for both, the
    activations kept are not.
    """
    for name, order_of in schedule.SCHEDULES.items():
        orders = [list(order_of(stage, stages, micro_batches)) for stage in range(stages)]
        for stage, order in enumerate(orders):
            for kind in "FB":
                numbers = [i for each, i in order if each == kind]
                assert numbers == list(range(micro_batches))
            assert all(order.index(("F", i)) < order.index(("B", i)) for i in numbers)
            in_flight = micro_batches if name == "afab" else min(stages - stage, micro_batches)
            assert schedule.most_kept(order) == in_flight
        idle = schedule.bubble(schedule.timeline(orders, backward))
        assert idle == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_an_order_that_never_ends():
    with pytest.raises(ValueError, match="never ends"):
        schedule.timeline([[("B", 0), ("F", 0)], [("F", 0), ("B", 0)]])


@pytest.mark.parametrize("world", WAYS)
def test_stages_keep_what_the_schedule_says(trained, world):
    metrics = trained[world]
    for shape in PIPELINES[world]:
        stages = int(shape[0])
        all_of_them = [MICRO_BATCHES] * stages
        assert metrics[f"pipeline_afab_{shape}_kept_by_stage_count"] == all_of_them
        kept = [stages - stage for stage in range(stages)]
        assert metrics[f"pipeline_1f1b_{shape}_kept_by_stage_count"] == kept
        for order in ("afab", "1f1b"):
            idle = metrics[f"pipeline_{order}_{shape}_bubble_ratio"]
            assert idle == pytest.approx((stages - 1) / (MICRO_BATCHES + stages - 1), abs=1e-4)


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["sideways"], "there is no way sideways"),
        (["--batch", "6"], "--batch must be a multiple of 8"),
        (["--seq-len", "33"], "--seq-len of 2"),
        (["--micro-batches", "0"], "must be positive"),
    ],
)
def test_refuses(flags, sentence):
    processes = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert sentence in refused(sys.executable, SCRIPT, *flags, **processes, **CPU)


def test_refuses_another_number_of_processes():
    assert "use 'make mini-parallel'" in refused(sys.executable, SCRIPT, **CPU)
    three = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    assert "PROCESSES=2 or 4" in refused(sys.executable, SCRIPT, **three, **CPU)
