"""The same greedy tokens from transformers, vLLM and mini_vllm: in float32, where rounding cannot
decide between two tokens.
"""

import json
import runpy
import sys

import pytest
from conftest import ROOT, python
from small_models import MODELS, random_model

sys.path.insert(0, str(ROOT / "modules/03_vllm"))  # as it is for a script that is run from there

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about two graphics cards.",
    "def fibonacci(n):",
    "你好，请用一句话介绍你自己。",
    "The three primary colours are",
    "Explain why the sky is blue. " * 12,
]
TOKENS = 20

# In one process: importing takes longest.
VLLM = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folders, prompts, tokens = json.loads(sys.argv[1])
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for folder in folders:
        llm = LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True)
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
        llm.llm_engine.engine_core.shutdown()
"""


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory) -> dict[str, str]:
    """The small model, and random ones of what else mini_vllm runs."""
    return {"smollm2-135m": str(small_model)} | {
        name: str(random_model(name, tmp_path_factory.mktemp(name), small_model))
        for name in MODELS
        if name != "qwen2"  # in test_mini_vllm.py, against transformers
    }


def transformers_tokens(folder) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    answers = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def test_greedy_tokens_of_the_three_engines(folders, tmp_path):
    from mini_vllm import LLM, SamplingParams

    expected = {name: transformers_tokens(folder) for name, folder in folders.items()}
    greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    for name, folder in folders.items():
        mini = LLM(folder, dtype="float32", kv_cache_gib=0.1)
        outputs = mini.generate(PROMPTS, [greedy] * len(PROMPTS))
        assert [output["token_ids"] for output in outputs] == expected[name], name

    script = tmp_path / "generate.py"
    script.write_text(VLLM)
    asked = json.dumps([list(folders.values()), PROMPTS, TOKENS])
    done = python("-m", "lab.profile", "python", script, asked, check=0)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    by_vllm = [json.loads(line.removeprefix("TOKENS ")) for line in lines]
    assert dict(zip(folders, by_vllm, strict=True)) == expected
    for name, answers in expected.items():
        different = {tuple(tokens) for tokens in answers}
        assert len(different) == len(PROMPTS), f"{name}: the prompts must lead to different texts"


@pytest.mark.long
def test_transformers_at_its_best(tiny_model, monkeypatch):
    """05_throughput.py --compile: as many places as without, also in a last batch that is smaller,
    by a decode step that was compiled.
    """
    import torch
    from torch._dynamo.utils import counters

    script = runpy.run_path(str(ROOT / "modules/03_vllm/05_throughput.py"), run_name="imported")
    graphs = []
    monkeypatch.setattr(
        torch.compiler, "reset", lambda: graphs.append(counters["stats"]["unique_graphs"])
    )
    tokenizer, model = script["load_transformers"](tiny_model, "cpu", "float32")
    requests = [("a lighthouse", 4), ("two graphics cards and the first frost", 6), ("a river", 3)]
    plain, compiled = (
        script["run_transformers"](tokenizer, model, requests, 2, way)[1] for way in (False, True)
    )
    assert plain == compiled == 2 * 6 + 3 and len(graphs) == 1 and graphs[0] > 0
