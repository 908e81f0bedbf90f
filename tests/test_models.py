"""configs/models.yaml and the way from a name to a folder."""

from conftest import ROOT

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
            if isinstance(values, dict) and "model" in values:
                assert values["model"] in models.catalogue(), f"{file.name}: {section}"


def test_embedded_model_is_the_published_one(small_model):
    """134.5 million parameters, SmolLM2's special tokens, and a chat template with its turn markers."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    with safe_open(small_model / "model.safetensors", "pt") as weights:
        sizes = [weights.get_slice(k).get_shape() for k in weights.keys()]
    assert sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
