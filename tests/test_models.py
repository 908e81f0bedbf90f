"""configs/models.yaml and the way from a name to a folder."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from conftest import ROOT, python, run

from lab import models
from lab.profile import read_yaml


def test_catalogue():
    seen = set()
    for name, entry in models.catalogue().items():
        assert {"hub", "modelscope", "template", "licence", "download_gb"} <= entry.keys(), name
        assert entry["hub"].count("/") == 1 and entry["hub"] not in seen, name
        seen.add(entry["hub"])
        assert models.entry(entry["hub"])[0] == models.entry(name.upper())[0] == name


def test_profiles_name_models_of_the_catalogue():
    for file in (ROOT / "configs/profiles").glob("*.yaml"):
        for section, values in read_yaml(file).items():
            if isinstance(values, dict) and values.get("model"):
                assert values["model"] in models.catalogue(), f"{file.name}: {section}"


def test_embedded_model_is_the_published_one(small_model):
    """134.5 million parameters, SmolLM2's special tokens, and a chat template with its turn
    markers.
    """
    from safetensors import safe_open
    from transformers import AutoTokenizer

    with safe_open(small_model / "model.safetensors", "pt") as weights:
        sizes = [weights.get_slice(k).get_shape() for k in weights.keys()]
    assert sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_download_list_names_every_model_of_the_profile():
    for profile in (ROOT / "configs/profiles").glob("*.yaml"):
        out = python("scripts/download.py", "--list", PROFILE=profile.stem, check=0).stdout
        named = {
            values["model"]
            for values in read_yaml(profile).values()
            if isinstance(values, dict) and values.get("model")
        }
        assert named == set(re.findall(r"^  (\S+) +(?:[\d.]+ GB|in a package)", out, re.M))


def test_download():
    """`make download` ends with the folder of every model of this profile."""
    assert "smollm2-135m: " in run("make", "download", "PROFILE=cpu", check=0).stdout


def test_a_folder_of_the_hubs_cache_is_served_under_its_hub_id():
    cached = "/home/x/.cache/huggingface/hub/models--{}/snapshots/a09a35458c70"
    assert models.served_names(cached.format("Qwen--Qwen2.5-7B-Instruct")) == [
        "qwen2.5-7b-instruct",
        "Qwen/Qwen2.5-7B-Instruct",
    ]
    assert models.served_names(cached.format("someone--tuned")) == ["someone/tuned"]


# -----------------------------------------------------------------------------
# Parsers of tool calls and of thinking

SERVE = "modules/03_vllm/01_serve.py"

# Published ids: what their cards, or vLLM's documentation of tool calling, say of their parsers.
CARDS = {
    "Qwen/Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ": ("hermes", None),
    "Qwen/Qwen2.5-VL-7B-Instruct": (None, None),
    "Qwen/QwQ-32B-AWQ": ("hermes", "deepseek_r1"),
    "Qwen/Qwen3-8B": ("hermes", "qwen3"),
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": ("hermes", "qwen3"),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": ("hermes", None),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": ("hermes", "qwen3"),
    "Qwen/Qwen3-VL-8B-Instruct": ("hermes", None),
    "Qwen/Qwen3-Next-80B-A3B-Thinking": ("hermes", "qwen3"),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": ("qwen3_coder", None),
    "Qwen/Qwen3-Coder-Next-FP8": ("qwen3_coder", None),
    "Qwen/Qwen3.5-27B-FP8": ("qwen3_coder", "qwen3"),
    "Qwen/Qwen3.8-27B": ("qwen3_coder", "qwen3"),
    "Qwen/Qwen3-Embedding-0.6B": (None, None),
    "openai/gpt-oss-20b": ("openai", "openai_gptoss"),
    "google/gemma-3-12b-it": (None, None),
    "google/gemma-4-31B-it": ("gemma4", "gemma4"),
    "zai-org/GLM-4.7-Flash": ("glm47", "glm45"),
    "zai-org/GLM-4.5-Air": ("glm45", "glm45"),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": (None, None),
    "deepseek-ai/DeepSeek-V3.1": ("deepseek_v31", "deepseek_v3"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": (None, "deepseek_r1"),
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": (None, "deepseek_r1"),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3_json", None),
    "RedHatAI/Llama-3.3-70B-Instruct-quantized.w4a16": ("llama3_json", None),
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": (None, None),
    "mistralai/Mistral-Nemo-Instruct-2407": ("mistral", None),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": ("seed_oss", "seed_oss"),
    "someone/model-of-mine": (None, None),
}


def test_each_model_brings_its_own_parsers():
    for hub, (tool, reasoning) in CARDS.items():
        settings = models.parsers(hub)
        assert settings.get("tool-call-parser") == tool, hub
        assert settings.get("reasoning-parser") == reasoning, hub
        assert ("enable-auto-tool-choice" in settings) == bool(tool), hub


def registered(file: str, table: str) -> set[str]:
    """The names in a table of the installed vLLM's parsers, read without importing it."""
    source = (Path(find_spec("vllm").origin).parent / file).read_text()
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {key.value for key in tables[table].keys}


def test_vllm_has_every_parser_by_that_name():
    families = read_yaml(ROOT / "configs/models.yaml")["families"]
    of_tools = {family["tool_parser"] for family in families if "tool_parser" in family}
    of_thinking = {
        family["reasoning_parser"] for family in families if "reasoning_parser" in family
    }
    assert len(of_tools) > 10 and len(of_thinking) > 5
    assert of_tools <= registered("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER")
    assert of_thinking <= registered("reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER")


def test_serving_a_model_takes_its_parser():
    """Qwen2.5's for no other model, none for an unknown one, and the user's flag before all."""
    coder = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
    done = python(SERVE, "--dry-run", "--model", coder, check=0, PROFILE="4090x2")
    assert "--enable-auto-tool-choice --tool-call-parser qwen3_coder" in done.stdout
    assert "hermes" not in done.stdout and "note:" not in done.stderr

    unknown = [SERVE, "--dry-run", "--model", "someone/model-of-mine"]
    done = python(*unknown, check=0, PROFILE="4090x2")
    assert "parser" not in done.stdout
    assert "no tool-call parser is known for someone/model-of-mine" in done.stderr
    assert 'ARGS="--enable-auto-tool-choice --tool-call-parser NAME"' in done.stderr

    done = python(*unknown, "--tool-call-parser=xlam", check=0, PROFILE="4090x2")
    assert done.stdout.rstrip().endswith("--tool-call-parser=xlam") and "note:" not in done.stderr
