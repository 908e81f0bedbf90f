"""Latency against throughput: the points, the knee, refusals, and what counts as failed.

The run against the real server is the readme's; test_claims.py looks at its record.
"""

import argparse
import json
import runpy

import pytest
from conftest import ROOT, python, refused
from test_load import pretender

BENCH = "modules/03_vllm/13_bench.py"
POINTS = str(ROOT / "modules/03_vllm/bench_points.py")


@pytest.mark.parametrize(
    "shares, at",
    [
        ([1, 0.95, 0.9, 0.89, 0.2], 2),
        ([0.5, 0.1], None),
        ([1, 1, 0.9], 2),
        ([0.8, 1, 0.3], 1),
        ([0.89], None),
    ],
)
def test_knee(shares, at):
    """The last load with 90 % good requests, also after a lighter one that was disturbed."""
    assert runpy.run_path(POINTS)["knee"](shares) == at


def answers(*rows) -> dict:
    """What vLLM's benchmark saves: (sent at, TTFT, seconds between its pieces, tokens)."""
    columns = ("start_times", "ttfts", "itls", "output_lens")
    return dict(zip(columns, zip(*rows, strict=True), strict=True)) | {"errors": [""] * len(rows)}


def steady(*arguments):
    """bench_points.steady; the last two arguments are the objectives in ms."""
    *first, ttft_ms, tpot_ms = arguments
    points = runpy.run_path(POINTS)
    return points["steady"](*first, points["Objectives"](ttft_ms, tpot_ms))


def test_objectives_of_the_run_itself():
    """Five times what a lone client sees, where no milliseconds are given."""
    points = runpy.run_path(POINTS)
    alone = points["answers"](
        answers((0, 3, [0.02] * 4, 5), *[(i, 0.1, [0.04] * 4, 5) for i in (5, 6)])
    )
    flags = argparse.Namespace(slack=5, slo_ttft_ms=None, slo_tpot_ms=None)
    wanted = points["objectives"](alone, flags)
    assert (wanted.ttft_ms, wanted.tpot_ms) == (500, 200)
    flags.slo_ttft_ms = 1000
    assert points["objectives"](alone, flags).ttft_ms == 1000


def test_a_closed_loop_without_its_burst():
    """Two clients; the burst is late, every later answer of 11 tokens takes 0.1 s and ten times
    0.09 s: two a second.
    """
    burst = [(0, 1.0, [0.1] * 10, 11), (0.001, 2.0, [0.05] * 10, 11)]
    later = [(start, 0.1, [0.09] * 10, 11) for start in (2, 2.5, 3, 3.5, 4, 4.5, 5)]
    point = steady(answers(*burst, *later), 2, 500, 100)
    assert (point["good_ratio"], point["sent_count"], point["window_s"]) == (1, 9, 3)
    # Between 2 and 5 s end the second of the burst and five of the others, the one of 2.0 s at 3.0
    # s and so on.
    assert point["req_per_s"] == pytest.approx(6 / 3, abs=0.34) and point[
        "tok_per_s"
    ] == pytest.approx(22, rel=0.1)
    assert point["ttft_p99_ms"] == 100 and point["itl_p50_ms"] == 90 and point["e2e_p50_ms"] == 1000
    with_burst = steady(answers(*burst, *later), 0, 500, 100)
    assert with_burst["good_ratio"] == pytest.approx(7 / 9, abs=1e-3), (
        "judged with its burst, it would look worse"
    )


def test_an_open_loop_that_is_overloaded():
    """Four a second are sent, one a second is served: that is its rate, though all are answered in
    the end.
    """
    rows = [(i / 4, 0.2 + i * 0.75, [0.1] * 4, 5) for i in range(40)]
    point = steady(answers(*rows), 4, 1000, 100)
    assert point["window_s"] == 8.75 and point["req_per_s"] == pytest.approx(1, abs=0.12)
    assert point["good_ratio"] == 0 and point["goodput_req_per_s"] == 0


def test_both_objectives():
    """A token late on average is not good, one late gap in a fast answer is; the slow piece of
    several tokens counts them all.
    """
    rows = [
        (0, 0.1, [0.05] * 9, 10),
        (1, 0.1, [0.2] * 9, 10),
        (2, 0.1, [0.5, *[0.02] * 8], 10),
        (3, 2.0, [0.05] * 9, 10),
    ]
    assert steady(answers(*rows), 0, 1000, 100)["good_ratio"] == 0.5
    pieces = [(i, 0.5, [0.25], 8) for i in range(5)]
    assert steady(answers(*pieces), 0, 1000, 100)["tok_per_s"] == 8


def test_what_failed_is_left_out():
    answered = answers((0, 0.1, [0.1], 2), (1, 0.1, [0.1], 2), (2, 0, [], 0))
    answered["errors"][2] = "refused"
    assert (
        steady(answered, 0, 1000, 100)["window_s"] == 1 and steady(answered, 1, 1000, 100) is None
    )


def test_refusals():
    assert "make vllm-serve" in refused("python", BENCH, "--address", "http://127.0.0.1:9")
    assert "must be positive" in refused("python", BENCH, "--slo-ttft-ms", "0")
    assert "must be positive" in refused("python", BENCH, "--rates", "2", "-1")
    assert "finite" in refused("python", BENCH, "--rates", "inf")
    assert "at least 1" in refused("python", BENCH, "--concurrencies", "4", "0")
    assert "must be positive" in refused("python", BENCH, "--answers", "0")
    assert "at least 2" in refused("python", BENCH, "--prompts", "1")


@pytest.mark.long
def test_what_counts_as_failed(small_model):
    """An answer that lacks a token is a failure, though vLLM's benchmark calls it completed."""
    flags = ["--concurrencies", "1", "--rates", "0.5", "--prompts", "3", "--output-tokens", "8"]
    with pretender(root=str(small_model), missing=1) as address:
        done = python(BENCH, "--address", address, *flags, check=1)
    counts = json.loads(done.stdout.splitlines()[-1])
    sent = (
        5 + counts["concurrency_1_sent_count"] + counts["rate_0.5_sent_count"]
    )  # 5 of a lone client first
    assert counts["failed_count"] == sent > 10 and "failed: " in done.stdout
    assert f"{sent} requests failed" in done.stderr
