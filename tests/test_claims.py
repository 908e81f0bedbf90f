"""The claims of modules 03, 05 and 06 hold in the records that their commands have just stored.

Each test is one claim, by ratios inside one run; made.py sees to it that the run is of this
session.
"""

import json
import re

import made
import pytest
from conftest import ROOT, run

from lab import machine

pytestmark = [pytest.mark.long, pytest.mark.timeout(2000)]


def test_a_paged_cache_wastes_little_and_serves_more_at_once():
    paging = made.record("03_vllm/06_paging", "make paging")
    assert paging["contiguous_waste_ratio"] > 0.5
    assert 0 < paging["paged_waste_ratio"] < 0.2
    assert paging["paged_mean_requests_count"] > 1.5 * paging["contiguous_mean_requests_count"]
    assert paging["paged_over_contiguous_ratio"] > 1.1


def test_a_shared_beginning_is_computed_once():
    prefix = made.record("03_vllm/07_prefix_caching", "make prefix-caching")
    assert prefix["apart_hit_ratio"] == 0
    assert prefix["shared_hit_ratio"] > 0.8
    assert prefix["ttft_ratio"] > 1.5


def test_a_batch_reads_the_weights_once():
    batch = made.record("03_vllm/08_batch_one", "make batch-one")
    assert 0 < batch["batch_1_of_bandwidth_ratio"] < 1.5
    assert batch["batch_32_tok_per_s"] > 2 * batch["batch_1_tok_per_s"]


def test_two_devices_have_room_for_twice_the_cache():
    two = made.record("03_vllm/10_tensor_parallel_speed", "make vllm-tp")
    assert two["kv_cache_gain_ratio"] > 1.9
    assert two["prefill_gain_ratio"] > 0


def test_guesses_change_the_speed_and_not_the_answer():
    """Guesses that come from the prompt are taken, those about a sampled story are not.

    Greedy answers stay (bf16: one may differ).
    """
    guesses = made.record("03_vllm/09_speculative", "make speculative")
    assert guesses["copies_accepted_ratio"] > 0.5
    assert guesses["tells_sampled_accepted_ratio"] < 0.3
    assert guesses["copies_speedup_ratio"] > 1.2
    assert guesses["copies_speedup_ratio"] > guesses["tells_sampled_speedup_ratio"]
    assert guesses["copies_same_count"] >= 2
    assert guesses["tells_greedy_same_count"] >= 2


# -----------------------------------------------------------------------------
# Load on the server: `make vllm-bench`

LOADS = (1, 4, 16, 64)  # clients of the closed loop


@pytest.fixture
def sweep() -> dict:
    return made.record("03_vllm/13_bench", "make vllm-serve", "make vllm-bench", "make stop")


def test_every_point_of_the_sweeps_is_whole(sweep):
    """Nothing failed; percentiles are in order; what is good is part of what is served."""
    assert sweep["failed_count"] == 0
    throughput = re.compile(r"((?:concurrency|rate)_\d+)_tok_per_s")
    points = [match[1] for match in map(throughput.fullmatch, sweep) if match]
    assert len(points) >= 7
    window_s = min(60, 5 * sweep["answer_alone_s"])
    for point in points:
        # Two answers at least, though the rate was a guess.
        assert sweep[f"{point}_window_s"] > window_s / 5
        assert 0 <= sweep[f"{point}_goodput_req_per_s"] <= sweep[f"{point}_req_per_s"]
        for name in ("ttft", "itl", "e2e"):
            assert 0 < sweep[f"{point}_{name}_p50_ms"] <= sweep[f"{point}_{name}_p99_ms"]
        assert sweep[f"{point}_ttft_p50_ms"] < sweep[f"{point}_e2e_p50_ms"]


def test_more_load_more_throughput_and_less_goodput(sweep):
    """The objectives are five times what a lone client saw: the run is held against itself."""
    assert sweep["concurrency_16_tok_per_s"] > 1.5 * sweep["concurrency_1_tok_per_s"]
    # An open loop serves what is sent, by chance a little more within a window.
    assert sweep["rate_2_req_per_s"] < 4
    # Half of 64 clients wait for a place, longer than one of them alone waits for any of its parts.
    assert sweep["concurrency_64_ttft_p50_ms"] > 5 * sweep["concurrency_1_ttft_p50_ms"]
    assert sweep["concurrency_64_itl_p50_ms"] > sweep["concurrency_1_itl_p50_ms"]
    assert sweep["concurrency_64_good_ratio"] <= sweep["concurrency_1_good_ratio"]


def test_the_knee_is_the_last_load_that_is_still_good(sweep):
    good = [load for load in LOADS if sweep[f"concurrency_{load}_good_ratio"] >= 0.9]
    assert sweep["knee_concurrency_count"] == max(good, default=0)


# -----------------------------------------------------------------------------
# Two machines, and an optimizer on the host


@pytest.mark.needs("ip")
def test_two_nodes_compute_what_one_does(two_machines):
    """Every token that of one process; the cable carried what the arithmetic says; nothing stayed.

    Around the arithmetic's bytes are those of the messages.
    """
    pipeline = made.record("03_vllm/14_two_nodes-pp", "make two-nodes")
    tensor = made.record("03_vllm/14_two_nodes-tp", 'make two-nodes ARGS="--parallel tp"')
    for kind in (pipeline, tensor):
        assert kind["same_tokens_ratio"] == 1
        assert kind["left_count"] == 0
        assert 1 < kind["sent_per_token_bytes"] / kind["payload_per_token_bytes"] < 2.5
    assert tensor["sent_per_token_bytes"] > 20 * pipeline["sent_per_token_bytes"]


@pytest.mark.skipif(
    not machine.fast_bfloat16(),
    reason="it trains in bfloat16, for which this CPU has no instructions",
)
def test_the_offloaded_optimizer():
    """Stage 2, the optimizer on the host, bf16, two processes: the bytes of each parameter.

    2 of bf16; half of its fp32 gradient's 4; half of the 12 of master weight and two moments.
    """
    training = made.record(
        "05_DeepSpeed/train-z2-offload", 'make train-z2-offload ARGS="--steps 2"'
    )
    assert training["zero_stage"] == 2
    assert training["optimizer"] == "DeepSpeedCPUAdam"
    assert training["dtype"] == "bfloat16"
    per_parameter = {
        kind: training[f"{kind}_state_gib"] * 2**30 / training["parameters_count"]
        for kind in ("parameter", "gradient", "optimizer")
    }
    assert per_parameter == pytest.approx({"parameter": 2, "gradient": 2, "optimizer": 6}, rel=0.02)


# -----------------------------------------------------------------------------
# A fine-tuning of the whole length, which `make quickstart` has


@pytest.fixture
def score(monkeypatch) -> dict:
    """Its score before and after, as measured with the code as it is, else measured now."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import quickstart

    stage = "06_LLaMA-Factory"

    def measured() -> dict:
        if not quickstart.SUMMARY.is_file():
            return {}
        outcome = json.loads(quickstart.SUMMARY.read_text())["stages"].get(stage, {})
        current = outcome.get("ok") and outcome["state"] == quickstart.state(stage)
        return outcome["result"] if current else {}

    if not measured():
        run("make", "quickstart", f"ARGS=--only {stage}", check=0)
    return measured()


def test_a_fine_tuning_teaches_what_the_model_did_not_know(score):
    """Held-out requests: none answered to the letter before, three of four or more after."""
    assert score["row_count"] == 24
    assert score["base_exact_pct"] == 0
    assert score["tuned_exact_pct"] >= 75
    right = 24 - score["wrong_count"]
    assert score["tuned_exact_pct"] == pytest.approx(100 * right / 24, abs=0.1)
