"""Merging an adapter that was trained on 4 bits: into the weights that it has learnt on."""

import importlib
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from safetensors.torch import save_file

MODULE = ROOT / "modules/06_LLaMA-Factory"
TRAINING = {"finetuning_type": "lora", "template": "chatml", "bf16": False}
ON_4_BITS = {"quantization_bit": 4, "quantization_method": "bnb"}


def loaded(model, **settings):
    """LLaMA-Factory's own model, with its adapter where the settings name one, in float32."""
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    asked = {"model_name_or_path": str(model), "finetuning_type": "lora", "template": "chatml"}
    model_args, _, finetuning_args, _ = get_infer_args(
        asked | {"infer_dtype": "float32"} | settings
    )
    return load_model(load_tokenizer(model_args)["tokenizer"], model_args, finetuning_args).eval()


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Folder of an adapter with random weights, on the tiny model that LLaMA-Factory rounded."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("trained") / "qlora"
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(loaded(tiny_model, **ON_4_BITS), lora).save_pretrained(folder)
    settings = {"model_name_or_path": str(tiny_model)} | TRAINING | ON_4_BITS
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def merge(module06, monkeypatch):
    """merge(adapter, output, *flags): 03_merge.py in this process; the engine's own export."""
    from llamafactory.train.tuner import export_model

    def export(*_):
        export_model(yaml.safe_load((module06.factory.FOLDER / "merge.yaml").read_text()))

    monkeypatch.setattr(module06.factory, "run", export)
    main = runpy.run_path(str(MODULE / "03_merge.py"), run_name="imported")["main"]
    monkeypatch.setitem(main.__globals__, "results", SimpleNamespace(finish=lambda *_: None))

    def run(adapter, output, *flags):
        words = ["", "--adapter", str(adapter), "--output", str(output), *flags]
        monkeypatch.setattr(sys, "argv", words)
        main()
        return output

    return run


def test_merged_as_trained_it_is_the_trained_model(merge, trained, tiny_model, tmp_path, capsys):
    """To float32's rounding; merged into the original weights it is another model."""
    import torch

    rows = torch.arange(32).view(2, 16) * 97
    models = {"trained": loaded(tiny_model, adapter_name_or_path=str(trained), **ON_4_BITS)}
    assert models["trained"].get_base_model().is_loaded_in_4bit
    models["merged"] = loaded(merge(trained, tmp_path / "merged"))
    assert "W is rounded" in capsys.readouterr().out
    models["original"] = loaded(merge(trained, tmp_path / "original", "--into", "original"))
    assert "W is rounded" not in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merged", "original"]
    with torch.inference_mode():
        logits = {name: model(rows).logits for name, model in models.items()}
    off = {name: (each - logits["trained"]).norm().item() for name, each in logits.items()}
    scale = logits["trained"].norm().item()
    assert off["merged"] < 1e-5 * scale
    assert off["original"] > 1e-2 * scale
    described = (tmp_path / "merged/config.json").read_text()
    assert "quantization_config" not in described and "rounded" not in described


def test_rounded_to_4_bits_again_the_change_is_gone(trained, tiny_model):
    """PEFT's own merging into a layer of 4 bits, of a change of 1 % of W, as a training makes it.

    The rounding that comes after is larger than the change, and takes most of it back.
    """
    import torch
    from peft.utils.integrations import dequantize_bnb_weight

    model = loaded(tiny_model, adapter_name_or_path=str(trained), **ON_4_BITS)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    before = dequantize_bnb_weight(layer.get_base_layer().weight)
    layer.scaling["default"] *= 0.01 * before.norm() / layer.get_delta_weight("default").norm()
    change = layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="rounding errors"):
        layer.merge()
    after = dequantize_bnb_weight(layer.get_base_layer().weight)
    assert torch.sum((after - before) * change) < 0.2 * change.square().sum()
    assert torch.norm(after - before - change) > 0.9 * change.norm()


@pytest.mark.parametrize("bits", [None, 8])
def test_other_trainings_are_merged_into_the_original(merge, trained, tiny_model, tmp_path, bits):
    """On whole weights, or on bits that are not rounded here: W is the model's own."""
    from safetensors.torch import load_file

    other = tmp_path / "other"
    shutil.copytree(trained, other)
    settings = {"model_name_or_path": str(tiny_model)} | TRAINING | {"quantization_bit": bits}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    # B is 0: what is merged is W itself
    weights = load_file(other / "adapter_model.safetensors")
    zeros = {name: each * ("lora_A" in name) for name, each in weights.items()}
    save_file(zeros, other / "adapter_model.safetensors")
    merged = load_file(merge(other, tmp_path / "merged") / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    assert merged.keys() == before.keys()
    assert all(merged[name].equal(before[name]) for name in before)


def test_what_fails_leaves_nothing(merge, trained, module06, tiny_model, tmp_path, monkeypatch):
    """The rounded base goes when the engine stops, and when a weight is not where it must be."""
    seen = []

    def stops(*_):
        seen.extend(file.name for file in tmp_path.iterdir())
        raise SystemExit(2)

    monkeypatch.setattr(module06.factory, "run", stops)
    with pytest.raises(SystemExit):
        merge(trained, tmp_path / "merged")
    assert seen == ["merged.rounded"]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("safetensors.torch.load_file", lambda _: {})
    with pytest.raises(SystemExit) as end:
        merge(trained, tmp_path / "merged")
    assert end.value.code == 2
    assert seen == ["merged.rounded"]  # the engine was not called again
    assert not list(tmp_path.iterdir())


def test_the_type_that_is_rounded(module06, monkeypatch):
    """bf16 before it is rounded is not bf16 after."""
    import torch

    monkeypatch.syspath_prepend(str(MODULE))
    dequantise = importlib.import_module("dequantise")
    assert dequantise.dtype_of({"bf16": True}) == torch.bfloat16
    assert dequantise.dtype_of({"bf16": False, "pure_bf16": True}) == torch.bfloat16
    assert dequantise.dtype_of({"fp16": True}) == torch.float16
    assert dequantise.dtype_of({"bf16": False}) == torch.float32
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    half = dequantise.rounded(weight.bfloat16(), {})
    assert half.dtype == torch.bfloat16 and half.shape == weight.shape
    off = (dequantise.rounded(weight, {}) - weight).norm() / weight.norm()
    assert 0.08 < off < 0.11  # methods.md
    blocks = dequantise.rounded(weight, {"double_quantization": False}).view(-1, 64)
    assert max(len(block.unique()) for block in blocks) <= 16
