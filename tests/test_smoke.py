"""`pytest -m smoke`: does the installation work? Within a minute of set-up."""

import json
import re

import pytest
from conftest import ROOT, python, refused

from lab import machine

PACKAGES = ["torch", "vllm", "transformers", "accelerate", "deepspeed", "llamafactory", "nvitop", "gpustat", "pytest"]


@pytest.mark.smoke
@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports(package):
    python("-c", f"import {package}", check=0, timeout=120)


@pytest.mark.smoke
def test_versions_are_the_locks():
    lock = "gpu" if machine.versions().get("vllm") else "cpu"
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", (ROOT / "locks" / f"{lock}.txt").read_text(), re.M))
    for package, version in machine.versions().items():
        assert locked[package] == version


@pytest.mark.smoke
def test_module_01_passes(small_model):
    done = python("modules/01_single_gpu_smoke/01_smoke.py", "--matmul-size", "256", "--copy-mib", "16", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong_count"] == 0 and result["decode_tok_per_s"] > 0 and result["device_count"] >= 1


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
    done = python("modules/01_single_gpu_smoke/01_smoke.py", "--matmul-size", "128", "--copy-mib", "1", check=1, PYTHONPATH=str(tmp_path))
    assert "WRONG" in done.stdout and json.loads(done.stdout.splitlines()[-1])["wrong_count"] == 2


def test_roofline(small_model):
    """Invariants inside one run: a batch makes tokens cheaper, work is bound where its intensity says, nothing is far above the roof."""
    done = python("modules/01_single_gpu_smoke/03_roofline.py", "--batches", "1", "8", "--prompt", "64", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["batching_speedup_ratio"] > 1.2 and result["ridge_ratio"] > 0
    assert all(0 < value < 1.5 for name, value in result.items() if name.endswith("of_roof_ratio"))
    bound = dict(re.findall(r"^  (decode, batch 1|prefill, 64 tokens|training, 64 tokens) .* (memory|arithmetic)$", done.stdout, re.M))
    assert bound.keys() == {"decode, batch 1", "prefill, 64 tokens", "training, 64 tokens"} and bound["decode, batch 1"] == "memory"
    assert (ROOT / "runs/01_single_gpu_smoke/roofline.png").stat().st_size > 10_000
    assert "at least 1" in refused("python", "modules/01_single_gpu_smoke/03_roofline.py", "--batches", "0")
