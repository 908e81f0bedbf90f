"""The planner's trainings: frozen weights, offloading, loading, quantised checkpoints, pictures.

Held against public reports and the engines' own tensors. What scripts/calibrate.py has measured is
compared in test_plan.
"""

import importlib
import json
import sys
from collections import Counter

import pytest
from conftest import ROOT, python

from lab import models
from lab.planner import speed, states, tower, weights
from lab.planner.config import read
from lab.planner.constants import GIB


@pytest.fixture(scope="module")
def answer():
    """The answer to a command line of scripts/plan.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    plan = importlib.import_module("plan")
    arguments = importlib.import_module("plan_parts.arguments")
    yield lambda line: plan.plan(arguments.read_line(line))
    sys.path.remove(str(ROOT / "scripts"))


# -----------------------------------------------------------------------------
# Trainings: what public reports say of models and engines that nobody has measured here

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
LLAMA_70B = LLAMA_7B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
QWEN15_32B = QWEN_7B | {
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "num_hidden_layers": 64,
}
QWEN3_30B_A3B = QWEN_7B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
}
MODELS = {
    "llama-7b": LLAMA_7B,
    "llama-70b": LLAMA_70B,
    "qwen1.5-32b": QWEN15_32B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "7b-fp8": QWEN_7B | {"quantization_config": {"quant_method": "fp8"}},
}


@pytest.fixture
def train_answer(answer, tmp_path):
    """The answer for a training of one of MODELS."""

    def train_answer(name: str, flags: str) -> dict:
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(MODELS[name]))
        return answer(f"train --model {file} {flags}")

    return train_answer


def test_frozen_weights_under_offload_lie_on_the_host(train_answer):
    """LoRA of a 32B on four cards under ZeRO-3 with both offloads.

    About 180 GB, in which the cache of the 65 GB checkpoint is, were seen (LlamaFactory#3188).
    """
    flags = "--method lora --zero 3 --offload optimizer+param --checkpointing"
    two_cards = train_answer("qwen1.5-32b", flags)
    assert two_cards["fits"] and two_cards["per_gpu_gib"]["weights"] == 0
    assert two_cards["host_parts_gib"]["frozen"] == pytest.approx(110.0, abs=0.1)
    assert not train_answer("qwen1.5-32b", f"{flags} --host-memory-gib 64")["fits"]

    four_cards = train_answer("qwen1.5-32b", f"{flags} --gpus 4")
    with_cache_gb = four_cards["host_gib"] * 1.074 + 65
    assert with_cache_gb == pytest.approx(180, rel=0.12)

    on_nvme = train_answer("qwen1.5-32b", f"{flags} --offload-device nvme")
    assert on_nvme["nvme_gib"] == pytest.approx(two_cards["parameters"] * 2 / GIB, rel=0.05)
    assert on_nvme["host_gib"] < 16


def test_offload_to_files_as_measured(answer):
    """A 1.5B on two H100s: the bytes of its files, and the host's peak."""
    record = ROOT / "results/h100x2-cap24/05_DeepSpeed/train-z3-nvme.json"
    measured = json.loads(record.read_text())["metrics"]
    flags = "--gpus 2 --zero 3 --offload optimizer+param --offload-device nvme --checkpointing"
    shape = "--micro-batch 2 --seq-len 512"
    planned = answer(f"train --model qwen2.5-1.5b-instruct {flags} {shape}")
    assert planned["nvme_gib"] == pytest.approx(2 * measured["state_on_disk_gib"], rel=0.01)
    assert planned["host_gib"] == pytest.approx(measured["host_peak_gib"], rel=0.15)


def allocated(verdict: dict) -> float:
    """GiB on a card that PyTorch's tensors take."""
    parts = verdict["per_gpu_gib"]
    return parts["total"] - parts["cuda_context"]


FSDP_LORA = "--engine fsdp --checkpointing --lora-rank 64 --load divided"


@pytest.mark.parametrize(("tokens", "measured_gib"), [(512, 8.28), (2048, 9.16)])
def test_fsdp_lora_as_published(train_answer, tokens, measured_gib):
    """Allocated peaks of Llama-2-7B on two cards (AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md).

    Its adapters are bf16 with all their states: 8 bytes a number, where ours have 16.
    """
    verdict = train_answer("llama-7b", f"{FSDP_LORA} --method lora --seq-len {tokens}")
    wider = verdict["trained_parameters"] * 8 / 2 / GIB
    assert allocated(verdict) - wider == pytest.approx(measured_gib, rel=0.02)


def test_fsdp_offloads_a_70b(train_answer):
    """QLoRA of Llama-2-70B, batch 2 x 2048, on two 24 GB cards: the same report.

    14.92 GiB were reserved there; allocated is less (of the 7B's LoRA 9.16 of 10.22). Its README
    says 55 GB of host memory, and 128 GB were full when it began.
    """
    flags = "--method qlora --engine fsdp --checkpointing --lora-rank 64"
    flags += " --seq-len 2048 --micro-batch 2"
    offloaded = train_answer("llama-70b", f"{flags} --offload optimizer+param --load divided")
    assert offloaded["fits"] and 0.65 < allocated(offloaded) / 14.92 < 1
    assert 55 < offloaded["host_gib"] * 1.074 < 128
    # Divided in two, and the scales whole: too much without offload.
    kept = train_answer("llama-70b", f"{flags} --load divided")
    scales = offloaded["per_gpu_gib"]["weights"]
    assert kept["per_gpu_gib"]["weights"] == pytest.approx(scales + (36.95 - scales) / 2, rel=0.05)
    assert not kept["fits"]
    # The locked transformers packs all of it on each card first.
    packed_there = train_answer("llama-70b", f"{flags} --offload optimizer+param")
    assert not packed_there["fits"] and packed_there["moment"] == "loading"
    assert "--load divided" in packed_there["notes"][-1]


def test_experts_are_not_packed(train_answer):
    """Qwen3-30B-A3B under QLoRA: 71,152 MiB of a card were in use (unsloth#4687), not 16 GiB."""
    verdict = train_answer("qwen3-30b-a3b", "--method qlora --gpus 1 --checkpointing")
    assert not verdict["fits"]
    # 128 experts x 3 x 2048 x 768 in each of 48 layers, 2 bytes each, are 54 GiB.
    assert 54 < verdict["per_gpu_gib"]["weights"] < 71152 / 1024
    assert "stay in 16 bits (54.0 GiB)" in verdict["notes"][0]
    assert verdict["trained_parameters"] < 30e6


def test_a_quantised_checkpoint_is_trained_as_it_is(answer, train_answer):
    """LoRA over AWQ counts what is stored, 19.3 GB; FP8 is trained in 16 bits, as LLaMA-Factory."""
    awq = answer("train --model qwen2.5-32b-instruct-awq --method lora --gpus 1 --checkpointing")
    assert awq["per_gpu_gib"]["weights"] == pytest.approx(18.5, abs=0.1)
    fp8 = train_answer("7b-fp8", "--method lora --gpus 1 --checkpointing")
    assert fp8["per_gpu_gib"]["weights"] == pytest.approx(14.3, abs=0.1)
    assert "trained in 16 bits" in fp8["notes"][0]


def test_a_14b_whole_on_each_card(answer):
    """Accelerate's zero3_init_flag: false (LlamaFactory#3035)."""
    flags = "train --model qwen2.5-14b-instruct --zero 3 --method lora --checkpointing"
    assert answer(flags)["fits"]
    whole = answer(f"{flags} --load whole")
    assert whole["moment"] == "loading" and whole["suggestion"] == "--load divided"
    assert whole["per_gpu_gib"]["weights"] == pytest.approx(27.6, abs=0.1)
    assert "zero3_init_flag" in whole["notes"][0]


def test_a_launchers_yaml_says_where_things_go(answer):
    """Accelerate's own names, as fields of Training."""
    from plan_parts import recipes

    zero3 = {"zero_stage": 3, "zero3_init_flag": False, "offload_param_device": "cpu"}
    launcher = {"distributed_type": "DEEPSPEED", "deepspeed_config": zero3}
    launcher["deepspeed_config"]["offload_optimizer_device"] = "cpu"
    expected = {"engine": "deepspeed", "zero": 3, "offload": "optimizer+param", "load": "whole"}
    assert recipes.launched(launcher) == expected
    fsdp = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}
    expected = {"engine": "fsdp", "zero": 0, "offload": "optimizer+param", "load": None}
    assert recipes.launched(fsdp) == expected


def test_what_is_left_over_has_limits(answer):
    """No longer sequences than the model was made for, no more than a million of them."""
    huge = "train --model smollm2-135m --gpus 1 --gpu-memory-gib 10000000"
    verdict = answer(huge)
    assert verdict["max_micro_batch"] == 1_000_000
    assert verdict["max_seq_len"] == read(models.config("smollm2-135m")).max_len
    small = answer("train --model smollm2-135m --gpus 1")
    batch = small["max_micro_batch"]
    assert 1 < batch < 1000
    fitting = answer(f"train --model smollm2-135m --gpus 1 --micro-batch {batch}")
    too_many = answer(f"train --model smollm2-135m --gpus 1 --micro-batch {int(batch * 1.02) + 1}")
    assert fitting["fits"] and not too_many["fits"]


def test_fsdp_gathers_its_parameters():
    """Twice a micro-step, as ZeRO-3: with the gradients 1.5 x ZeRO-0's bytes (arXiv 1910.02054).

    DDP sends gradients of 4 bytes, the others of 2.
    """
    model = read(models.config("qwen2.5-7b-instruct"))
    seconds = {}
    for name, engine, zero in (
        ("ddp", "ddp", 0),
        ("fsdp", "fsdp", 0),
        ("z0", "deepspeed", 0),
        ("z3", "deepspeed", 3),
    ):
        setup = states.Training(engine=engine, zero=zero)
        seconds[name] = speed.message_seconds(model, setup, speed.Machine())
    assert seconds["fsdp"] == pytest.approx(seconds["z3"], rel=0.01)
    assert seconds["fsdp"] == pytest.approx(1.5 * seconds["z0"], rel=0.01)
    assert seconds["ddp"] == pytest.approx(2 * seconds["z0"], rel=0.01)


# -----------------------------------------------------------------------------
# What bitsandbytes packs and LoRA adapts, in the models of transformers

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 512,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2}
REAL = {  # {model_type: (architecture, what its config.json has more)}
    "qwen2": ("Qwen2ForCausalLM", {}),
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16, "mlp_only_layers": [1]}),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"vision_config": TOWER | {"out_hidden_size": 64}},
    ),
}


@pytest.fixture(scope="module", params=REAL)
def small_model(request):
    """A model of transformers without memory, and how the planner reads its config.json."""
    import torch
    import transformers

    architecture, values = REAL[request.param]
    config = SMALL | values | {"architectures": [architecture]}
    made = transformers.AutoConfig.for_model(request.param, **config)
    with torch.device("meta"):
        real = getattr(transformers, architecture)(made)
    return real, read(config)


def test_what_bitsandbytes_packs(small_model):
    """It replaces every nn.Linear but the output layer (transformers, replace_with_bnb_linear)."""
    from torch.nn import Linear

    real, model = small_model
    gates = ("lm_head", "shared_expert_gate")  # a gate is one row: not counted as packed
    replaced = Counter(
        module.weight.numel()
        for name, module in real.named_modules()
        if type(module) is Linear and not name.endswith(gates)
    )
    predicted = Counter()
    for weight in model.weights:
        if states.packs(weight):
            predicted[weight.each] += weight.count // weight.each
    assert predicted == replaced and replaced.total() >= 16
    in_3d = [weight.numel() for weight in real.model.parameters() if weight.dim() == 3]
    assert weights.experts(model) == sum(in_3d)


def test_what_lora_adapts(small_model):
    """LLaMA-Factory's lora_target: all, with its frozen vision tower; 3-d experts get nothing."""
    from llamafactory.hparams import FinetuningArguments
    from llamafactory.model.model_utils.misc import find_all_linear_modules
    from llamafactory.model.model_utils.visual import patch_target_modules
    from peft import LoraConfig, get_peft_model

    real, model = small_model
    names = find_all_linear_modules(real, freeze_vision_tower=True)
    targets = patch_target_modules(real, FinetuningArguments(), names)
    adapted = get_peft_model(real, LoraConfig(r=4, target_modules=targets))
    trained = {
        name: weight.numel() for name, weight in adapted.named_parameters() if weight.requires_grad
    }
    assert not any("visual" in name or "experts." in name for name in trained)
    gates = sum(count for name, count in trained.items() if "shared_expert_gate" in name)
    assert sum(trained.values()) - gates == weights.lora(model, 4)


FSDP2 = """
import tempfile
from types import SimpleNamespace
import torch, torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model

store = f"file://{tempfile.mkdtemp()}/store"
dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to(torch.bfloat16)
model[0].requires_grad_(False)
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, cpu_ram_efficient_loading=False, mixed_precision_policy="bf16"
)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=True,
    device=torch.device("cpu"), torch_device_mesh=None,
)
prepared = fsdp2_prepare_model(accelerator, model)
print("frozen in", prepared[0].weight.dtype, flush=True)
import os; os._exit(0)
"""


def test_accelerate_widens_what_fsdp2_divides(train_answer):
    """The note that says so is true of the Accelerate that is installed."""
    assert "frozen in torch.float32" in python("-c", FSDP2, check=0).stdout
    verdict = train_answer("llama-7b", f"{FSDP_LORA} --method lora")
    assert (
        "fsdp_version: 2 casts frozen weights to fp32: 6.3 GiB more on each card"
        in verdict["notes"][0]
    )


# -----------------------------------------------------------------------------
# What pictures cost

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SMALL_TEXT = SMALL | {"num_hidden_layers": 1, "rope_parameters": MROPE}
QWEN_TOWER = {"num_heads": 16, "fullatt_block_indexes": [0, 1]}
TOWERS = {  # {model_type: (architecture, the tower of the published models but for its depth)}
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        QWEN_TOWER | {"embed_dim": 1280, "hidden_size": 64},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_TOWER | {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 64},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": []},
    ),
}
PATCHES = 64


def kept_per_patch(kind: str, depth: int) -> tuple[float, int]:
    """Bytes that a running tower of so many blocks keeps for a patch, and the planner's."""
    import torch
    import transformers
    from llamafactory.hparams import ModelArguments
    from llamafactory.model.model_utils.checkpointing import prepare_model_for_training
    from peft import LoraConfig, get_peft_model

    architecture, sizes = TOWERS[kind]
    text = SMALL_TEXT | ({"head_dim": 8} if kind == "qwen3_vl" else {})
    values = {"text_config": text, "vision_config": sizes | {"depth": depth}}
    values |= {"image_token_id": 500, "vision_start_token_id": 501}
    config = transformers.AutoConfig.for_model(kind, **values)
    real = getattr(transformers, architecture)(config).to(torch.bfloat16)
    prepare_model_for_training(real, ModelArguments(model_name_or_path="a model"))
    adapter = LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")
    adapted = get_peft_model(real, adapter).train()

    weights_lie = [*adapted.parameters(), *adapted.buffers()]
    places = {tensor.untyped_storage().data_ptr() for tensor in weights_lie}
    running = []
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if running and storage.data_ptr() not in places:
            kept[storage.data_ptr()] = storage
        return tensor

    real.model.visual.register_forward_pre_hook(lambda *_: running.append(True))
    real.model.visual.register_forward_hook(lambda *_: running.clear())
    side = real.model.visual.patch_embed.patch_size
    pixels = torch.randn(PATCHES, 3 * 2 * side * side, dtype=torch.bfloat16)
    tokens = torch.tensor([[1, 501, *[500] * (PATCHES // 4), 2]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = adapted(
            input_ids=tokens,
            labels=tokens,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, PATCHES // 8]]),
            mm_token_type_ids=(tokens == 500).int(),
        ).loss
    assert loss.requires_grad
    model = read(config.to_dict() | {"architectures": [architecture]})
    setup = states.Training(
        method="lora", checkpointing=True, seq_len=100, image_tokens=PATCHES // 4
    )
    real_bytes = sum(storage.nbytes() for storage in kept.values())
    return real_bytes / PATCHES, tower.tower_bytes(model, setup) / PATCHES


@pytest.mark.parametrize("kind", TOWERS)
def test_a_frozen_tower_keeps_its_activations(kind):
    """Under peft, checkpointing and LLaMA-Factory; not where a tower names no input embeddings."""
    one_real, one = kept_per_patch(kind, 1)
    two_real, two = kept_per_patch(kind, 2)
    assert two - one == two_real - one_real
    assert (two > 0) == (kind != "qwen3_vl")


def test_pictures_are_counted(answer):
    """A picture of 262,144 pixels is 334 tokens of 4 patches, 1.5 MB each (LlamaFactory#9331)."""
    line = "train --model qwen2.5-vl-7b-instruct --gpus 1 --method lora --seq-len 2048"
    text = answer(f"{line} --checkpointing")
    pictures = answer(f"{line} --checkpointing --image-tokens 334")
    gib = 334 * 4 * 1_498_624 / GIB
    assert allocated(pictures) - allocated(text) == pytest.approx(gib, rel=1e-3)
    assert "334 of them are pictures" in pictures["notes"][0]
    for none in ("--method qlora --checkpointing", ""):
        with_pictures = answer(f"{line} {none} --image-tokens 334")
        assert "pictures" not in with_pictures["per_gpu_gib"]
