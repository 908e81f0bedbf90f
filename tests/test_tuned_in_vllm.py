"""The model that module 06 tuned answers alike in transformers, merged in vLLM, and as an adapter
that vLLM puts on the base model.
"""

import json
from pathlib import Path

import made
import pytest
from conftest import ROOT, RUNS, run
from test_llamafactory import greedy, prompts

REQUESTS = prompts(6)
MODULE = RUNS / "06_LLaMA-Factory"

pytestmark = [pytest.mark.long, pytest.mark.timeout(2000)]


@pytest.fixture(scope="module")
def adapter() -> Path:
    """The adapter that `make lf-train` of the readme, or of this test, has trained."""
    train = "make lf-train ARGS=max_samples=32"
    return made.folder(MODULE / "lora", "adapter_model.safetensors", train)


@pytest.fixture(scope="module")
def merged(adapter) -> Path:
    return made.folder(MODULE / "merged", "model.safetensors", "make lf-merge")


def by_transformers(folder: Path) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(tokens) for tokens in greedy(model, tokenizer, REQUESTS)]


def by_vllm(folder: Path, adapter: Path | str = "") -> list[str]:
    program = ROOT / "tests/programs/vllm_chat.py"
    asked = json.dumps([str(folder), str(adapter), REQUESTS])
    command = ["python", "-m", "lab.profile", "python", program, asked]
    lines = run(*command, check=0).stdout.splitlines()
    (answers,) = [line.removeprefix("TEXTS ") for line in lines if line.startswith("TEXTS ")]
    return json.loads(answers)


def test_vllm_answers_like_the_merged_model_and_serves_the_adapter_alike(
    merged, adapter, small_model
):
    expected = by_transformers(merged)
    assert expected != by_transformers(small_model), "the training changed nothing"
    assert by_vllm(merged) == expected
    assert by_vllm(small_model, adapter) == expected
