"""lab/planner against what it predicts: real models' parameters, the tensors of a running graph.

What it predicts of engines is compared where these run: test_deepspeed, test_server, test_plan.
"""

import copy
import doctest
import importlib
import itertools
import json
import math
import pkgutil
import re

import pytest
from conftest import ROOT

from lab import models, planner
from lab.planner import weights as counted
from lab.planner.config import QWEN_7B, read
from lab.planner.families import FAMILIES
from lab.planner.images import QWEN_IMAGE_EDIT
from lab.planner.states import COMPARED, Training, reference_bytes
from lab.planner.training import begin_of_backward, moments, saved_bytes_per_token

# -----------------------------------------------------------------------------
# The worked numbers

TABLES = {"families"}  # has no formulas
PLANNER = [file.name for file in pkgutil.iter_modules(planner.__path__) if file.name not in TABLES]


@pytest.mark.parametrize("name", PLANNER)
def test_worked_numbers(name):
    """The examples in the docstrings of lab/planner."""
    module = importlib.import_module(f"lab.planner.{name}")
    done = doctest.testmod(module, extraglobs={"QWEN_7B": QWEN_7B})
    assert done.attempted and not done.failed


def test_the_models_of_the_worked_numbers_are_the_published_ones():
    assert read(models.config("qwen2.5-7b-instruct"), "qwen2.5-7b-instruct") == QWEN_7B
    shapes = json.loads((ROOT / "modules/02_qwen_image_edit/shapes.json").read_text())
    assert QWEN_IMAGE_EDIT.keys() == shapes.keys()
    for component, lines in shapes.items():
        for dimensions in ({2}, {1, 3, 4, 5}):  # matrices, which nf4 packs, and the rest
            published = sum(
                count * math.prod(shape) for _, count, shape in lines if len(shape) in dimensions
            )
            ours = [s for s in QWEN_IMAGE_EDIT[component].values() if len(s) in dimensions]
            assert sum(map(math.prod, ours)) == published, component


def page_rows() -> dict[str, list[tuple[str, str]]]:
    """{file of lab/planner: [(function, the number shown for it)]} of module 01's planner page."""
    text = (ROOT / "modules/01_single_gpu_smoke/planner.md").read_text(encoding="utf-8")
    sections = re.split(r"^### \d+\. .*\[(\w+)\.py\].*$", text, flags=re.M)
    walk = dict(zip(sections[1::2], sections[2::2], strict=True))
    row = re.compile(r"^\| `([\w.]+)` \|.*\| ([^|]+) \|$", re.M)
    return {name: row.findall(section) for name, section in walk.items()}


def shown_by(examples: list[doctest.Example], number: str) -> bool:
    """Whether an example gives this number, to as many digits as the page shows."""
    digits = len(number.partition(".")[2])
    half_a_digit = 0.501 * 10**-digits
    results = [float(text) for e in examples for text in re.findall(r"\d+\.?\d*", e.want)]
    return any(abs(result - float(number)) <= half_a_digit for result in results)


def test_the_page_shows_the_worked_numbers():
    """Module 01's page walks through the files in this order; its numbers are the docstrings'."""
    walk = page_rows()
    training = ["states", "training", "host"]
    serving = ["config", "tensors", "quantization", "weights", "cache", "serving"]
    assert list(walk) == [*serving, *training, "images", "speed"]
    for name, rows in walk.items():
        assert rows, name
        module = importlib.import_module(f"lab.planner.{name}")
        for function, cell in rows:
            formula = module
            for part in function.split("."):
                formula = getattr(formula, part)
            examples = doctest.DocTestParser().get_examples(formula.__doc__)
            number = re.match(r"[\d,.]+", cell)[0].replace(",", "")
            assert shown_by(examples, number), f"{name}.{function} gives no {cell}"


# -----------------------------------------------------------------------------
# Parameters

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 512,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = MOE | {"shared_expert_intermediate_size": 96}
SHAPES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-bias-tied": ("LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", SHARED | {"mlp_only_layers": [0]}),
    "qwen2_moe-sparse-step": ("Qwen2MoeForCausalLM", SHARED | {"decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16, "mlp_only_layers": [1]}),
}


def build(name: str, **more):
    """A model of these shapes by transformers, and how the planner reads its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, values = SHAPES[name]
    architectures = {"architectures": [architecture]}
    config = AutoConfig.for_model(name.split("-")[0], **BASE | architectures | values | more)
    real = AutoModelForCausalLM.from_config(config)
    return real, read(config.to_dict() | architectures)


def names_and_shapes(model) -> dict[str, tuple[int, ...]]:
    """{name of a weight: its shape}, a name for each layer."""
    expanded = {}
    for weight in model.weights:
        for layer in weight.layers or range(weight.times):
            expanded[weight.name.replace("*", str(layer))] = weight.shape
    return expanded


def shapes_of(real) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in real.named_parameters()}


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_transformers(name):
    """Every weight by name and shape, of the shapes that a family's options make."""
    real, model = build(name)
    assert names_and_shapes(model) == shapes_of(real)
    assert counted.parameters(model) == sum(weight.numel() for weight in real.parameters())


TEXT_ONLY = {"Qwen3_5ForCausalLM": "qwen3_5_text", "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text"}
# What a published config.json says and the class has no value for.
SAID = {
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Gemma4ForConditionalGeneration": {
        "text_config": {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
        | {"num_global_key_value_heads": 2},
        "vision_config": {},
    },
}


def model_types() -> dict[str, str]:
    """{architecture: its model_type in transformers}."""
    from transformers.models.auto import modeling_auto

    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    types = {}
    for mapping in (pictures, text):
        for model_type, architecture in mapping.items():
            types.setdefault(architecture, model_type)
    return types | TEXT_ONLY


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_is_transformers_own(architecture):
    """Built without memory from the class's own sizes: the same names and shapes."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(
        model_types()[architecture], **SAID.get(architecture, {})
    )
    with torch.device("meta"):
        real = getattr(transformers, architecture)(config)
    model = read(config.to_dict() | {"architectures": [architecture]})
    assert names_and_shapes(model) == shapes_of(real)


def test_an_architecture_outside_the_table_is_built():
    """OLMo 2 and StarCoder 2 are not in the table; the second has other names for its sizes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type in ("olmo2", "starcoder2"):
        config = AutoConfig.for_model(model_type, num_hidden_layers=3)
        with torch.device("meta"):
            real = AutoModelForCausalLM.from_config(config)
        architecture = {"architectures": [type(real).__name__]}
        model = read(config.to_dict() | architecture)
        assert counted.parameters(model) == sum(weight.numel() for weight in real.parameters())
        assert counted.embedding(model) == config.vocab_size * config.hidden_size
        layers = [w for n, w in real.named_parameters() if "layers." in n and w.dim() == 2]
        assert counted.linear(model) == sum(weight.numel() for weight in layers)


def test_catalogue_has_the_published_sizes():
    """Parameters as the model cards say them (HF, safetensors)."""
    published = {  # by safetensors; of Qwen3.5 and GLM without their layer for drafts
        "smollm2-135m": 134_515_008,
        "qwen2.5-0.5b-instruct": 494_032_768,
        "qwen2.5-1.5b-instruct": 1_543_714_304,
        "qwen2.5-7b-instruct": 7_615_616_512,
        "qwen2.5-14b-instruct": 14_770_033_664,
        "qwen2.5-32b-instruct": 32_763_876_352,
        "qwen2.5-32b-instruct-awq": 32_763_876_352,  # the same ones, packed
        "qwen3-8b": 8_190_735_360,
        "qwen3-30b-a3b": 30_532_122_624,
        "gpt-oss-20b": 20_914_757_184,
        "gemma-3-12b-it": 12_187_325_040,
        "qwen2.5-vl-7b-instruct": 8_292_166_656,
        "qwen3-vl-8b-instruct": 8_767_123_696,
        "deepseek-v2-lite-chat": 15_706_484_224,
        "mistral-nemo-instruct-2407": 12_247_782_400,
        "llama-3.1-8b-instruct": 8_030_261_248,
        "qwen3-embedding-0.6b": 595_776_512,
        "qwen3-reranker-0.6b": 595_776_512,
    }
    listed = {name: counted.parameters(read(models.config(name))) for name in published}
    assert listed == published


def test_catalogue_has_the_published_bytes():
    """A download is the weights as they are stored, and little else.

    Qwen3.5 and GLM carry one more layer, for drafts; Gemma 4 its embedding twice.
    """
    for name, entry in models.catalogue().items():
        if "config" in entry and entry["download_gb"]:
            stored_gb = counted.stored_bytes(read(models.config(name))) / 1e9
            beside = 0.13 if "gemma-4" in name else 0.045
            assert (1 - beside) * entry["download_gb"] - 0.05 <= stored_gb, name
            assert stored_gb <= 1.01 * entry["download_gb"] + 0.05, name


# -----------------------------------------------------------------------------
# Activations

TOKENS = 96
RANK = 4


def trained(name: str, layers: int, method: str, precision: str):
    """A model of so many layers as it is trained, and how the planner reads its config."""
    import torch

    real, model = build(name, num_hidden_layers=layers)
    bf16 = precision == "bf16"
    real.to(torch.bfloat16 if bf16 or method == "lora" else torch.float32)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        real = get_peft_model(real, adapter)
        for weight in real.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16 if bf16 else torch.float32)
    return real.train(), model


def kept_bytes(real, precision: str) -> int:
    """Bytes of the tensors that the graph of a forward pass over 2 x TOKENS holds."""
    import torch

    weights = [*real.parameters(), *real.buffers()]
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    matrices = {tuple(sorted(w.shape)) for w in real.parameters() if w.dim() == 2}
    sizes = {}  # of what is kept, by where it lies

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in places
        is_cast_weight = tuple(sorted(tensor.shape)) in matrices  # autocast's copy of one
        if not is_weight and not is_cast_weight:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other takes its place in memory
        return tensor

    held = []
    ids = torch.randint(0, 512, (2, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        loss = real(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(sizes.values())


TRAININGS = [
    ("full", "fp32"),
    ("full", "bf16"),
    ("full", "autocast"),
    ("lora", "autocast"),
    ("lora", "bf16"),
]


@pytest.mark.parametrize("method, precision", TRAININGS)
@pytest.mark.parametrize("name", ["qwen2", "llama-wide-heads", "qwen3"])
def test_activations_are_what_autograd_keeps(name, method, precision):
    """saved_bytes_per_token, against the tensors that the graph of two more layers holds."""
    small, _ = trained(name, 1, method, precision)
    large, model = trained(name, 3, method, precision)
    two_layers = kept_bytes(large, precision) - kept_bytes(small, precision)
    predicted = saved_bytes_per_token(model, method, precision, RANK)
    assert predicted == pytest.approx(two_layers / 2 / (2 * TOKENS), rel=1e-3)


# -----------------------------------------------------------------------------
# Preferences: weights that are held, and logits that are alive at once

VOCAB = 8_000  # so many that nothing but logits counts


def trainer_of(loss: str, policy, reference):
    """LLaMA-Factory's trainer with just what its forward pass reads."""
    from types import SimpleNamespace

    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    kind = CustomKTOTrainer if loss == "kto" else CustomDPOTrainer
    trainer = object.__new__(kind)
    accelerator = SimpleNamespace(
        device="cpu", unwrap_model=lambda model: model, gather_for_metrics=lambda kl: kl
    )
    vars(trainer).update(
        finetuning_args=SimpleNamespace(use_ref_model=loss in COMPARED),
        loss_type="sigmoid" if loss == "dpo" else loss,
        ref_model=reference,
        accelerator=accelerator,
        **{"beta": 0.1, "ftx_gamma": 0, "ld_alpha": None, "bco_gemma": 0, "simpo_gamma": 0.5},
        **{"label_smoothing": 0, "f_divergence_type": "reverse_kl", "reference_free": False},
        **{"desirable_weight": 1.0, "undesirable_weight": 1.0, "calculate_KL": True},
    )
    return trainer


def peak_bytes(call) -> int:
    """Bytes that were alive at once of those that `call` allocated."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("loss", ["dpo", "kto", "simpo", "orpo"])
def test_logits_of_preferences_are_those_of_llamafactory(trl, loss, method):
    """The fullest moment before the backward pass, and that of the backward pass."""
    import torch
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    real, model = build("llama", **sizes)
    setup = Training(gpus=1, method=method, loss=loss, micro_batch=2, seq_len=128)
    reference = copy.deepcopy(real).requires_grad_(False) if setup.copies_reference else None
    policy = get_peft_model(real, LoraConfig(r=2)) if method == "lora" else real
    trainer = trainer_of(loss, policy.to(torch.bfloat16), reference and reference.bfloat16())
    ids = torch.randint(0, VOCAB, (setup.tokens // setup.seq_len, setup.seq_len))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if loss == "kto":
        batch |= {f"kl_{name}": tensor for name, tensor in batch.items()}
        batch["kto_tags"] = torch.tensor([True, False])
    held = []

    def forward():
        held[:] = [trainer.get_batch_loss_metrics(policy, dict(batch))[0]]

    forward()  # once, so that what is made once is there
    held.clear()
    before = [*moments(model, setup)][: 2 if loss in COMPARED else 1]
    predicted = max(moment.parts["logits"] for moment in before)
    assert peak_bytes(forward) == pytest.approx(predicted, rel=0.03)
    waits = 4 * VOCAB * setup.tokens  # the log-softmax
    predicted = begin_of_backward(model, setup).parts["logits"] - waits
    assert peak_bytes(lambda: held.pop().backward()) == pytest.approx(predicted, rel=0.03)


def test_only_full_training_has_a_second_model(monkeypatch):
    """By LLaMA-Factory's own create_ref_model."""
    from types import SimpleNamespace

    from llamafactory.hparams import FinetuningArguments
    from llamafactory.train import trainer_utils

    loaded = SimpleNamespace(tokenizer=None)
    monkeypatch.setattr(trainer_utils, "load_tokenizer", lambda args: {"tokenizer": None})
    monkeypatch.setattr(trainer_utils, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(trainer_utils.ModelArguments, "copyfrom", lambda args: args)
    for loss in ("dpo", "kto", "simpo", "orpo"):
        for method in ("full", "lora"):
            stage = "kto" if loss == "kto" else "dpo"
            name = loss if loss in ("simpo", "orpo") else "sigmoid"
            finetuning = FinetuningArguments(finetuning_type=method, stage=stage, pref_loss=name)
            finetuning.__post_init__()
            compared = stage == "kto" or finetuning.use_ref_model
            theirs = trainer_utils.create_ref_model(None, finetuning) if compared else None
            setup = Training(method=method, loss=loss)
            assert setup.copies_reference == (theirs is loaded), (loss, method)
            assert (reference_bytes(QWEN_7B, setup) > 0) == setup.copies_reference
