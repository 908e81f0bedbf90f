"""Latency against throughput: the knee, what is refused, and, in test-long, what counts as failed (on a made-up server).

The run against the real server is the readme's; test_readmes.py looks at its record.
"""

import json
import runpy

import pytest
from conftest import ROOT, python, refused
from test_load import pretender

BENCH = "modules/03_vllm/13_bench.py"


@pytest.mark.parametrize("shares, at", [([1, 0.95, 0.9, 0.89, 0.2], 2), ([0.5, 0.1], None), ([1, 1, 0.9], 2), ([0.8, 1, 0.3], 1), ([0.89], None)])
def test_knee(shares, at):
    """The last load with 90 % good requests: in the middle, nowhere, at the end, after a disturbed lighter one."""
    assert runpy.run_path(str(ROOT / BENCH), run_name="imported")["knee"](shares) == at


def test_refusals():
    assert "make vllm-serve" in refused("python", BENCH, "--address", "http://127.0.0.1:9")
    assert "must be positive" in refused("python", BENCH, "--slo-ttft-ms", "0")
    assert "must be positive" in refused("python", BENCH, "--rates", "2", "-1")
    assert "finite" in refused("python", BENCH, "--rates", "inf")
    assert "at least 1" in refused("python", BENCH, "--concurrencies", "4", "0")


@pytest.mark.long
def test_what_counts_as_failed(small_model):
    """An answer that lacks a token is a failure, though vLLM's benchmark calls it completed: two points of 3 requests."""
    with pretender(root=str(small_model), missing=1) as address:
        done = python(BENCH, "--address", address, "--concurrencies", "1", "--rates", "0.5", "--prompts", "3", "--output-tokens", "8", check=1)
    assert json.loads(done.stdout.splitlines()[-1])["failed_count"] == 6 and "failed: " in done.stdout and "6 requests failed" in done.stderr
