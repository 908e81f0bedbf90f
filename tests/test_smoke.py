"""`pytest -m smoke`: does the installation work? Within a minute of set-up."""

import json

import pytest
from conftest import python

from lab import machine

PACKAGES = ["torch", "vllm", "transformers", "accelerate", "deepspeed", "llamafactory", "nvitop", "gpustat", "pytest"]


@pytest.mark.smoke
@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports(package):
    python("-c", f"import {package}", check=0, timeout=120)


@pytest.mark.smoke
def test_versions_are_the_locks():
    import re

    from conftest import ROOT

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
