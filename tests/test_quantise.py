"""Module 06's quantising: the packages beside the lock, GPTQ from scratch, the folders, vLLM."""

import importlib
import json
import os
import shutil
import sys

import pytest
import small_models
from conftest import RECORDS, ROOT, python, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "14_quantise.py"
PACKAGES = ROOT / ".venv/quantise"
BESIDE = {"PYTHONPATH": str(PACKAGES)}


@pytest.fixture(scope="module")
def packages() -> None:
    run(str(ROOT / "scripts/quantise_packages.sh"), check=0)


@pytest.fixture(scope="module")
def servable(small_model, tmp_path_factory):
    """Random weights with heads of 64 dimensions: vLLM has no attention for 16 on a CPU."""
    folder = tmp_path_factory.mktemp("servable") / "merged"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    llama = heads | {"intermediate_size": 192, "tie_word_embeddings": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_models.MODELS, "llama", llama)
        small_models.random_model("llama", folder, small_model)
    (folder / "config.yaml").write_text("template: chatml\n")
    return folder


@pytest.fixture(scope="module")
def quantised(packages, servable, tmp_path_factory):
    """The folder with one for each type."""
    folder = tmp_path_factory.mktemp("quantised")
    flags = f"--model {servable} --output {folder} --rows 4"
    answer = run("make", "lf-quantise", f"ARGS={flags}", check=0)
    assert "4 rows of launch_en_varied" in answer.stdout
    assert "peak" in answer.stdout
    return folder


def test_gptq_is_the_librarys(packages, tmp_path, monkeypatch):
    """The same numbers for every weight, and answers that are nearer than those of rounding."""
    import safetensors.torch
    import torch

    monkeypatch.syspath_prepend(str(MODULE))
    gptq = importlib.import_module("gptq")
    torch.manual_seed(0)
    weight = torch.randn(96, 128)
    inputs = torch.randn(500, 128) @ torch.randn(128, 128) * torch.rand(128)
    given, written = tmp_path / "given.safetensors", tmp_path / "written.safetensors"
    safetensors.torch.save_file({"weight": weight, "inputs": inputs}, given)
    program = ROOT / "tests/programs/gptq_of_the_library.py"
    python(str(program), str(given), str(written), check=0, **BESIDE)
    theirs = safetensors.torch.load_file(written)
    assert torch.equal(gptq.scales_of(weight, 32), theirs["scales"])
    ours = gptq.gptq(weight, inputs, 32)
    assert torch.equal(ours, theirs["rounded"])

    def error(rounded) -> float:
        return (inputs @ (weight - rounded).T).square().sum().item()

    nearest = gptq.round_to_nearest(weight, 32)
    assert error(ours) < error(nearest) / 2
    # Each weight for itself, GPTQ is further away: it is the answers that count.
    assert (weight - ours).square().sum() > (weight - nearest).square().sum()


def test_folders(quantised, servable):
    """What transformers of the environment, not of the packages beside it, reads from them."""
    import torch
    from transformers import AutoModelForCausalLM

    assert sorted(os.listdir(quantised)) == ["fp8", "w4a16", "w4a16-rtn"]
    original = AutoModelForCausalLM.from_pretrained(servable)
    linear = "model.layers.0.mlp.up_proj.weight"
    kept = {}
    for kind in ("fp8", "w4a16", "w4a16-rtn"):
        described = json.loads((quantised / kind / "config.json").read_text())
        settings = described["quantization_config"]
        assert settings["quant_method"] == "compressed-tensors"
        weights = settings["config_groups"].popitem()[1]["weights"]
        assert weights["num_bits"] == (8 if kind == "fp8" else 4)
        assert weights["group_size"] == (None if kind == "fp8" else 64)  # 192 is no multiple of 128
        assert (quantised / kind / "config.yaml").read_text() == "template: chatml\n"
        model = AutoModelForCausalLM.from_pretrained(quantised / kind, dtype=torch.float32)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))  # widened at the first use
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        embeddings = "model.embed_tokens.weight"
        assert torch.equal(tensors[embeddings], original.state_dict()[embeddings])
        kept[kind] = model.get_parameter(linear).detach().float()
    weight = original.state_dict()[linear]
    step = weight.unflatten(1, (-1, 64)).abs().amax(dim=2) * 2 / 15
    off = (kept["w4a16-rtn"] - weight).unflatten(1, (-1, 64)).abs().amax(dim=2)
    assert (off <= step / 2 * 1.001).all()
    assert not torch.equal(kept["w4a16"], kept["w4a16-rtn"])
    assert (kept["fp8"] - weight).abs().max() < (kept["w4a16-rtn"] - weight).abs().max()


def test_score_and_speed(quantised, servable):
    """vLLM answers; by 4 bits only where this CPU has AVX-512, else transformers does."""
    from lab import machine

    script = str(MODULE / "18_quantised.py")
    models = [str(servable), str(quantised / "w4a16")]
    answer = python(script, "--limit", "2", "--models", *models, "--max-num-seqs", "8", check=0)
    metrics = json.loads(answer.stdout.splitlines()[-1])
    assert metrics["row_count"] == 2
    assert metrics["merged_exact_pct"] == metrics["w4a16_exact_pct"] == 0  # random weights
    assert metrics["merged_gb"] > metrics["w4a16_gb"]
    assert metrics["merged_tokens_per_s"] > 0 and metrics["merged_alone_tokens_per_s"] > 0
    assert ("w4a16_tokens_per_s" in metrics) == machine.fast_bfloat16()
    assert ("needs AVX-512" in answer.stdout) != machine.fast_bfloat16()
    record = json.loads((RECORDS / MODULE.name / "18_quantised-merged.json").read_text())
    assert record["config"]["models"] == [".../merged", ".../w4a16"]


def test_refusals(packages, servable, tmp_path):
    make = ("make", "lf-quantise")
    none = refused(*make, f"ARGS=--model {tmp_path}/none")
    assert "there is no model in" in none and "make lf-merge" in none
    assert "--rows must be at least 1" in refused(*make, f"ARGS=--model {servable} --rows 0")
    alone = refused(sys.executable, SCRIPT, "--model", servable)
    assert "llm-compressor stands beside the environment: run this by 'make lf-quantise'" in alone
    scored = refused(sys.executable, MODULE / "18_quantised.py", "--models", tmp_path / "none")
    assert "there is no model in" in scored


def test_packages_that_do_not_arrive(tmp_path):
    """One sentence, and what was there half is fetched again."""
    copy = tmp_path / "copy"
    for part in ("scripts", "locks"):
        shutil.copytree(ROOT / part, copy / part)
    (copy / ".venv/bin").mkdir(parents=True)
    stand_in = copy / ".venv/bin/python"
    stand_in.write_text("#!/bin/sh\necho no route to the index >&2\nexit 1\n")
    stand_in.chmod(0o755)
    assert "did not arrive" in refused(copy / "scripts/quantise_packages.sh")
    assert not (copy / ".venv/quantise/lock.txt").exists()
