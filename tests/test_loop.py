"""Module 06's whole road: transformers with the adapter, the merged model, and vLLM with either
give the same tokens in float32; an adapter that vLLM refuses is served merged only.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

MODULE = ROOT / "modules/06_LLaMA-Factory"


def adapter_of(model: Path, folder: Path, **settings) -> Path:
    """What a training leaves, with random numbers in place of learnt ones."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    written = {"model_name_or_path": str(model), "template": "chatml", "default_system": system}
    (folder / "config.yaml").write_text(json.dumps(written))
    return folder


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dora", [False, True])
def test_the_four_ways_give_the_same_tokens(small_model, tmp_path, dora):
    """DoRA's adapter is not given to vLLM, and a sentence says why."""
    adapter = adapter_of(Path(small_model), tmp_path / "adapter", use_dora=dora, r=12)
    done = run("make", "lf-loop", f"ARGS=--adapter {adapter} --limit 6", check=0)
    score = json.loads(done.stdout.splitlines()[-1])
    assert score["base_same_count"] == 0
    for stage in ("tuned", "merged", "vllm_merged"):
        assert score[f"{stage}_same_count"] == 6, stage
    assert ("vllm_adapter_same_count" in score) != dora
    assert ("a DoRA adapter: vLLM does not serve these yet" in done.stdout) == dora
    if not dora:
        assert score["vllm_adapter_same_count"] == 6
    assert (Path(done.stdout.split("plot: ")[1].splitlines()[0])).name == "loop.png"


@pytest.fixture
def loop_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(MODULE))
    monkeypatch.delitem(sys.modules, "loop_parts", raising=False)
    import loop_parts

    yield loop_parts
    for name in ("loop_parts", "scoring", "entries", "rows", "fitting", "views"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"use_dora": True}, "a DoRA adapter"),
        ({"init_lora_weights": "pissa_niter_16"}, "a PiSSA adapter"),
        ({"init_lora_weights": True}, ""),
    ],
)
def test_adapters_that_vllm_cannot_put_on(loop_parts, tmp_path, settings, reason):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12, **settings}))
    sentence = loop_parts.not_for_vllm(SimpleNamespace(folder=tmp_path, is_adapter=True))
    assert sentence.startswith(reason) and bool(sentence) == bool(reason)
    assert loop_parts.rank_of(tmp_path) == 16


def test_a_call_that_a_server_has_taken_out_is_a_text_again(loop_parts):
    call = SimpleNamespace(function=SimpleNamespace(name="is_free", arguments='{"port": 8000}'))
    text = loop_parts.text_of(SimpleNamespace(content=None, tool_calls=[call]))
    assert json.loads(text) == [{"name": "is_free", "arguments": {"port": 8000}}]
    assert loop_parts.text_of(SimpleNamespace(content="8000", tool_calls=[])) == "8000"


def test_ranks_are_those_of_vllm(loop_parts):
    """The list in rank_of is vLLM's own."""
    import inspect
    import re

    source = next((ROOT / ".venv/lib").glob("python3*/site-packages/vllm/config/lora.py"))
    (known,) = re.findall(r"MaxLoRARanks = Literal\[([\d, ]+)\]", source.read_text())
    assert f"({known})" in inspect.getsource(loop_parts.rank_of)
