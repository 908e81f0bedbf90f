"""lab/planner against what it predicts: real models' parameters, the tensors of a running graph,
records of engines.
"""

import doctest
import importlib
import pkgutil

import pytest

from lab import models, planner
from lab.planner import weights as counted
from lab.planner.config import ARCHITECTURES, QWEN_7B, read
from lab.planner.training import saved_bytes_per_token

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 512,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHAPES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-bias-tied": ("LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 96, "mlp_only_layers": [0]},
    ),
    "qwen2_moe-sparse-step": (
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 96, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16, "mlp_only_layers": [1]}),
}


def build(name, **more):
    """A model of these shapes by transformers, and how the planner reads its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, values = SHAPES[name]
    values = BASE | {"architectures": [architecture]} | values | more
    config = AutoConfig.for_model(name.split("-")[0], **values)
    return AutoModelForCausalLM.from_config(config), read(
        config.to_dict() | {"architectures": [architecture]}
    )


PLANNER = [file.name for file in pkgutil.iter_modules(planner.__path__)]


@pytest.mark.parametrize("name", PLANNER)
def test_worked_numbers(name):
    """The examples in the docstrings of lab/planner, all for Qwen2.5-7B."""
    assert QWEN_7B == read(models.config("qwen2.5-7b-instruct"))
    module = importlib.import_module(f"lab.planner.{name}")
    done = doctest.testmod(module, extraglobs={"QWEN_7B": QWEN_7B})
    assert done.attempted and not done.failed


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers(name):
    """Every weight counted once, and every one that quantisation packs, for each architecture that
    the planner claims to know.
    """
    real, model = build(name)
    assert counted.parameters(model) == sum(p.numel() for p in real.parameters())
    packed = sum(
        p.numel()
        for n, p in real.model.layers.named_parameters()
        if p.dim() > 1
        and "norm" not in n
        and not n.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
    )
    assert counted.linear(model) == packed


def test_every_known_architecture_is_compared():
    assert {architecture for architecture, _ in SHAPES.values()} == ARCHITECTURES.keys()


def test_catalogue_has_the_published_sizes():
    """Parameters as the model cards say them (HF, safetensors)."""
    published = {
        "smollm2-135m": 134_515_008,
        "qwen2.5-0.5b-instruct": 494_032_768,
        "qwen2.5-1.5b-instruct": 1_543_714_304,
    }
    published |= {
        "qwen2.5-7b-instruct": 7_615_616_512,
        "qwen2.5-14b-instruct": 14_770_033_664,
        "qwen2.5-32b-instruct": 32_763_876_352,
    }
    published["qwen2.5-32b-instruct-awq"] = published[
        "qwen2.5-32b-instruct"
    ]  # the same ones, packed
    assert {
        name: counted.parameters(read(models.config(name)))
        for name, entry in models.catalogue().items()
        if "config" in entry
    } == published


@pytest.mark.parametrize(
    "method, precision",
    [
        ("full", "fp32"),
        ("full", "bf16"),
        ("full", "autocast"),
        ("lora", "autocast"),
        ("lora", "bf16"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "llama-wide-heads", "qwen3"])
def test_activations_are_what_autograd_keeps(name, method, precision):
    """saved_bytes_per_token, against the tensors that the graph of one more layer holds."""
    import torch

    tokens = 96

    def kept(layers: int) -> float:
        real, _ = build(name, num_hidden_layers=layers)
        real = real.to(
            torch.bfloat16 if precision == "bf16" or method == "lora" else torch.float32
        ).train()
        if method == "lora":
            from peft import LoraConfig, get_peft_model

            real = get_peft_model(
                real, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            )
            for p in real.parameters():
                if p.requires_grad:
                    p.data = p.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        weights = {p.untyped_storage().data_ptr() for p in [*real.parameters(), *real.buffers()]}
        sizes = {tuple(sorted(p.shape)) for p in real.parameters() if p.dim() == 2}
        kept = {}

        def pack(tensor):
            place = tensor.untyped_storage().data_ptr()
            if (
                place not in weights and tuple(sorted(tensor.shape)) not in sizes
            ):  # autocast's copies of weights are no activations
                kept[place] = tensor
            return tensor

        ids = torch.randint(0, 512, (2, tokens))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
        ):
            loss = real(input_ids=ids, labels=ids, use_cache=False).loss
        assert loss.requires_grad
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    model = build(name)[1]
    assert saved_bytes_per_token(model, method, precision, rank=4) == pytest.approx(
        (kept(3) - kept(1)) / 2 / (2 * tokens), rel=1e-3
    )
