"""`pytest -m smoke`: does the installation work? Within a minute of set-up."""

import json
import re

import pytest
from conftest import ROOT, RUNS, python, refused

from lab import machine

MODULE = ROOT / "modules/01_single_gpu_smoke"
PACKAGES = [  # of the original design
    "torch",
    "vllm",
    "transformers",
    "accelerate",
    "deepspeed",
    "llamafactory",
    "nvitop",
    "gpustat",
    "pytest",
]


@pytest.fixture(scope="module")
def imported() -> dict[str, str]:
    """{package: "", or the traceback of its import}: all in one process, as torch takes longest."""
    done = python("tests/programs/import_each.py", *PACKAGES, check=0)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.smoke
@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports(imported, package):
    assert imported[package] == ""


@pytest.mark.smoke
def test_versions_are_the_locks():
    lock = "gpu" if machine.versions().get("vllm") else "cpu"
    locked = dict(
        re.findall(r"^([a-z0-9-]+)==(\S+) \\$", (ROOT / "locks" / f"{lock}.txt").read_text(), re.M)
    )
    for package, version in machine.versions().items():
        assert locked[package] == version


@pytest.mark.smoke
def test_module_01_passes(small_model):
    done = python(MODULE / "01_smoke.py", "--matmul-size", "256", "--copy-mib", "16", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong_count"] == 0
    assert result["decode_tok_per_s"] > 0 and result["device_count"] >= 1


def test_a_wrong_product_is_found(tmp_path):
    """Break torch.mm on purpose: the smoke test must fail and say so."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hook:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch.utils.benchmark':\n"
        "            sys.meta_path.remove(self); import torch; right = torch.mm\n"
        "            def wrong(a, b, out):\n"
        "                right(a, b, out=out); out[0, 0] += 1000; return out\n"
        "            torch.mm = wrong\n"
        "sys.meta_path.insert(0, Hook())\n"
    )
    small = ("--matmul-size", "128", "--copy-mib", "1")
    done = python(MODULE / "01_smoke.py", *small, check=1, PYTHONPATH=str(tmp_path))
    assert "WRONG" in done.stdout and json.loads(done.stdout.splitlines()[-1])["wrong_count"] == 2


def test_roofline(small_model):
    """Invariants inside one run: a batch makes tokens cheaper, work is bound where its intensity
    says, nothing is far above the roof.
    """
    done = python(MODULE / "03_roofline.py", "--batches", "1", "8", "--prompt", "64", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["batching_speedup_ratio"] > 1.2 and result["ridge_ratio"] > 0
    assert all(0 < value < 1.5 for name, value in result.items() if name.endswith("of_roof_ratio"))
    kinds = ("decode, batch 1", "prefill, 64 tokens", "training, 64 tokens")
    shown = rf"^  ({'|'.join(kinds)}) .* (memory|arithmetic)$"
    bound = dict(re.findall(shown, done.stdout, re.M))
    assert bound.keys() == set(kinds) and bound["decode, batch 1"] == "memory"
    assert (RUNS / "01_single_gpu_smoke/roofline.png").stat().st_size > 10_000
    assert "at least 1" in refused("python", MODULE / "03_roofline.py", "--batches", "0")


def test_memory_goes_where_arithmetic_says(small_model):
    """Every step adds what its formula says, gives back what it should, and a fragmented allocator
    keeps more than tensors hold.
    """
    script = MODULE / "04_where_memory_goes.py"
    done = python(script, "--batch", "2", "--tokens", "128", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    steps = [
        name.removesuffix("_predicted_gib") for name in result if name.endswith("_predicted_gib")
    ]
    assert steps == [
        "weights",
        "prefill",
        "decode",
        "requests_end",
        "forward",
        "backward",
        "optimizer_step",
        "zero_grad",
        "deleted",
    ]
    for step in steps:
        added, predicted = result[f"{step}_added_gib"], result[f"{step}_predicted_gib"]
        assert added == pytest.approx(predicted, rel=0.1, abs=0.05), step
        assert result[f"{step}_peak_gib"] >= result[f"{step}_holds_gib"] - 0.05, step
    on_gpu = machine.gpus() and result["machine"] != f"cpu-{machine.cores()}c"
    allocator = "segments" if on_gpu else "c_library"
    lost = "half of the first blocks' room is lost"
    assert result[f"{allocator}_every_second_one_freed_ratio"] > 1.2, lost
    assert "at least 1" in refused("python", script, "--batch", "0")


def test_gauges(small_model):
    """Each load moves the gauge that it should move; the amounts are the machine's own affair."""
    for _ in range(3):  # the gauge is the machine's: what others free meanwhile is in it, too
        done = python(MODULE / "05_gauges.py", "--seconds", "2", check=0)
        result = json.loads(done.stdout.splitlines()[-1])
        held = result["memory_held_memory_gib"] - result["idle_memory_gib"]
        if held > 0.5:
            break
    assert result["product_over_number_ratio"] > 1000
    assert held > 0.5
    assert result["memory_held_tflop_per_s"] == 0
    half_the_time = result["product_half_the_time_tflop_per_s"]
    assert 0.2 < half_the_time / result["matrix_product_tflop_per_s"] < 0.9
    assert 0 <= result["idle_util_pct"] <= 100 and result["copy_gb_per_s"] > 1
    assert (RUNS / "01_single_gpu_smoke/gauges.png").stat().st_size > 10_000
    assert "at least 2" in refused("python", MODULE / "05_gauges.py", "--seconds", "1")
