"""Models of every kind: what the planner says of them, what it refuses, and what vLLM reports."""

import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import configs
from lab import machine as this_machine
from lab import models
from lab.planner import cache, config, serving, weights
from lab.planner.serving import Serving

KIB = 2**10
GIB = 2**30


@pytest.fixture(scope="module")
def plan():
    """scripts/plan.py as a module."""
    import importlib

    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("plan")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def ask(plan, monkeypatch, capsys):
    """The exit code, the output and the error of a command line."""

    def ask(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *shlex.split(line)])
        monkeypatch.setattr(this_machine, "gpus", list)
        try:
            plan.main()
            code = 0
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        return code, written.out, written.err

    return ask


@pytest.fixture
def answer(ask):
    """The answer to a command line."""

    def answer(line: str) -> dict:
        code, out, err = ask(f"{line} --json")
        assert code == 0, err
        return json.loads(out)

    return answer


def model(name: str, **more) -> config.Model:
    return config.read(models.config(name) | more, name)


# -----------------------------------------------------------------------------
# Caches


def test_a_hybrid_keeps_16_of_64_layers():
    """Qwen3.5-27B: 64 KiB a token, and a state that does not grow (club-3090#1139)."""
    hybrid = model("qwen3.5-27b")
    assert serving.kv_bytes_per_token(hybrid) == 2 * 16 * 4 * 256 * 2 == 64 * KIB
    states = 48 * (10240 * 3 * 2 + 48 * 128 * 128 * 4)
    of_request = serving.kv_bytes_per_request(hybrid, 100_000)
    assert of_request == 100_000 * 64 * KIB + states
    assert cache.pool(hybrid.caches, 2).groups[-1].block == 784  # vLLM's own log says so


def test_sliding_layers_keep_their_window():
    """gpt-oss-20b: half of 24 layers look back 128 tokens."""
    sliding = model("gpt-oss-20b")
    assert serving.kv_bytes_per_token(sliding) == 2 * 24 * 8 * 64 * 2
    long_request = serving.kv_bytes_per_request(sliding, 100_000)
    assert long_request == 2 * 12 * 8 * 64 * 2 * (100_000 + 128)
    gemma = model("gemma-3-12b-it")
    kinds = [layer.kind for layer in gemma.caches]
    assert kinds.count("full_attention") == 8 and len(kinds) == 48


def test_latent_attention_keeps_one_vector():
    """DeepSeek-V2-Lite: 512 + 64 numbers a layer, the same on every card (arXiv 2405.04434)."""
    latent = model("deepseek-v2-lite-chat")
    for cards in (1, 2, 4):
        assert serving.kv_bytes_per_token(latent, tp=cards) == 27 * 576 * 2


def test_shared_caches_are_counted_once():
    """Gemma 4 E4B: the last 18 of 42 layers read the caches of others."""
    shared = model("gemma-4-e4b-it")
    kept = [layer for layer in shared.caches if layer.kind != cache.SHARED]
    assert len(shared.caches) == 42 and len(kept) == 24


# What a small model of each kind is, beside these.
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "dtype": "float32",
}
SERVED = {
    "sliding": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 128,
        "sliding_window_pattern": 3,
    },
    "sliding with experts": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "sliding_window": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
BLOCK_ON_A_CPU = 128  # tokens
BATCH = 256


@pytest.mark.long
@pytest.mark.parametrize("kind", SERVED)
def test_vllm_reports_the_same_tokens(kind, plan, tmp_path, monkeypatch):
    """A small model, served on a CPU with a cache of 1 GiB: the same number.

    States and latent vectors, which vLLM does not serve alike on a CPU, are held against records
    of GPUs: tests/test_plan.py.
    """
    import importlib

    from plan_parts.arguments import read_line

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    values = SMALL | SERVED[kind]
    (tmp_path / "config.json").write_text(json.dumps(values))
    line = f"serve --gpus 1 --model {tmp_path} --dtype float32 --max-model-len 1024 --enforce-eager"
    line += f" --max-num-seqs 16 --max-num-batched-tokens {BATCH}"
    measured = importlib.import_module("calibrate").serve(read_line(line), tmp_path / "log")

    small = config.read(values, kind)
    pool = cache.pool(small.caches, 4, block=BLOCK_ON_A_CPU, computed=4)
    blocks = GIB // int(pool.block_bytes(range(small.layers)))
    # On a CPU vLLM does not prepare a batch while another runs.
    of_request = pool.blocks_of_request(1024, in_flight=BATCH)
    assert measured["kv_tok_count"] == int(blocks / of_request * 1024)


# -----------------------------------------------------------------------------
# How checkpoints are stored


def stored_gb(name: str, quantization: dict) -> float:
    return weights.stored_bytes(model(name, quantization_config=quantization)) / 1e9


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUPS = {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}, "targets": ["Linear"]}
PACKED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUPS}}


def test_formats():
    """Bytes of Qwen2.5-7B by each method: 6.525e9 numbers in linear layers, the rest 2.181 GB."""
    packed = 6.525288448
    rest = 15.231233024 - 2 * packed
    each = {
        1.0: {"quant_method": "modelopt", "quant_algo": "FP8"},
        0.5625: {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}},
        1 + 4 / 128**2: {"quant_method": "fp8", "weight_block_size": [128, 128]},
        0.5 + 2.5 / 64: {"quant_method": "gptq", "bits": "4", "group_size": 64.0},
        0.5: {"quant_method": "gptq", "bits": 4, "group_size": -1},
        0.5 + 2 / 128: {"quant_method": "awq", "bits": 4, "zero_point": False},
        0.5 + 2.5 / 32: PACKED,
        0.5 + 2.5 / 128: {"quant_method": "auto-round", "bits": 4, "group_size": 128},
    }
    for number, quantization in each.items():
        expected = packed * number + rest
        assert stored_gb("qwen2.5-7b-instruct", quantization) == pytest.approx(expected, rel=1e-6)


def test_layers_that_stay_in_16_bits():
    """case: AWQ of Qwen3.5-27B with its linear attention unquantised is 26 GiB, not 16."""
    everything = stored_gb("qwen3.5-27b", PACKED)
    kept = {"ignore": ["re:.*linear_attn.*", "re:.*visual.*", "lm_head"]}
    linear_kept = stored_gb("qwen3.5-27b", PACKED | kept)
    hybrid = model("qwen3.5-27b")
    of_linear = sum(
        w.count for w in hybrid.weights if w.part == "linear" and "linear_attn" in w.name
    )
    assert linear_kept - everything == pytest.approx(
        of_linear * (2 - 0.5 - 2.5 / 32) / 1e9, rel=1e-6
    )
    assert linear_kept / 1.073741824 == pytest.approx(26.07, abs=0.01)


def test_a_checkpoint_may_ask_for_an_fp8_cache(answer, tmp_path):
    """modelopt's kv_cache_quant_algo is what vLLM's --kv-cache-dtype auto means then."""
    tokens = []
    for algorithm in (None, "FP8"):
        quantization = {"quant_method": "modelopt", "quant_algo": "FP8"}
        values = models.config("qwen3-8b")
        quantization |= {"kv_cache_quant_algo": algorithm} if algorithm else {}
        (tmp_path / "config.json").write_text(
            json.dumps(values | {"quantization_config": quantization})
        )
        tokens.append(answer(f"serve --model {tmp_path}/config.json --gpus 1")["kv_tokens"])
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.01)


def test_two_groups_of_formats():
    """compressed-tensors: attention in FP8, the MLP in 4 bits."""
    eight = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["re:.*self_attn.*"]}
    both = {"quant_method": "compressed-tensors", "config_groups": {"a": eight, "b": GROUPS}}
    mixed = model("qwen2.5-7b-instruct", quantization_config=both)
    formats = {w.stored for w in mixed.weights if "self_attn" in w.name and w.part == "linear"}
    assert formats == {"fp8"} and mixed.stored == "int4"


def test_blocks_of_few_experts():
    """FP8 in blocks of 128 of a model with 64 experts: the experts are packed, too."""
    fp8 = model("deepseek-v2-lite-chat", quantization_config=FP8)
    assert {w.stored for w in fp8.weights if w.part == "experts"} == {"fp8"}


def test_patterns_of_gptq():
    """GPTQModel's `dynamic`: a regular expression leaves a module out or gives it other bits."""
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}

    def formats(dynamic: dict) -> dict[str, str]:
        packed = model("qwen3-8b", quantization_config=gptq | {"dynamic": dynamic})
        linear = [w for w in packed.weights if w.part == "linear"]
        return {w.name.split(".")[-2]: w.stored for w in linear}

    assert formats({"-:.*down.*": {}})["down_proj"] == ""
    eight = formats({"+:.*mlp.*": {"bits": 8}})
    assert eight["up_proj"] == "int8" and eight["q_proj"] == "int4"


def test_an_unknown_method_is_read_from_the_headers(tmp_path, plan):
    """A folder's files say what its weights take, whatever packed them."""
    import torch
    from plan_parts import read_model
    from safetensors.torch import save_file

    shapes = SMALL | {"architectures": ["Qwen3ForCausalLM"]}
    values = shapes | {"quantization_config": {"quant_method": "quark"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    plain = config.read(shapes)
    eight_bits = torch.zeros(weights.linear(plain), 1, dtype=torch.int8)
    save_file({"model.layers.0.mlp.up_proj.weight": eight_bits}, tmp_path / "model.safetensors")
    read = read_model(str(tmp_path))
    rest = weights.parameters(plain) - weights.linear(plain)
    assert weights.stored_bytes(read) == weights.linear(plain) + 2 * rest


def test_the_headers_of_a_folder_go_first(tmp_path, plan):
    """An unknown share of scales is read from the safetensors files themselves."""
    import torch
    from plan_parts import read_model
    from safetensors.torch import save_file

    shapes = SMALL | {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32}
    values = shapes | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(values))
    plain = config.read(shapes)
    tensors = {}
    for weight in plain.weights:
        if weight.part == "linear":
            for layer in weight.layers:
                module = weight.name.replace("*", str(layer)).removesuffix(".weight")
                tensors[f"{module}.qweight"] = torch.zeros(weight.each // 8, 1, dtype=torch.int32)
                tensors[f"{module}.scales"] = torch.zeros(weight.each // 16, 1, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    packed = weights.linear(plain) * (4 / 8 + 2 / 16)
    assert weights.stored_bytes(read_model(str(tmp_path))) == packed + 2 * (
        weights.parameters(plain) - weights.linear(plain)
    )


def test_a_float32_checkpoint_is_served_in_16_bits(answer, tmp_path):
    """vLLM's --dtype auto reads it as bfloat16 (vllm/config/model.py)."""
    values = models.config("llama-3.1-8b-instruct") | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    served = answer(f"serve --model {tmp_path}/config.json --gpus 1 --max-model-len 8192")
    assert served["fits"] and served["per_gpu_gib"]["weights"] == pytest.approx(14.99, abs=0.03)


# -----------------------------------------------------------------------------
# What the engine would refuse

QWEN_72B_AWQ = models.config("qwen2.5-32b-instruct-awq") | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 29568,
}
REFUSED = {
    "a group of AWQ is split": (QWEN_72B_AWQ, "--gpus 2 --tp 2", "128 share a scale"),
    "a block of FP8 is split": (
        models.config("qwen3-30b-a3b") | {"quantization_config": FP8},
        "--gpus 4 --tp 4",
        "128 share a scale",
    ),
    "a KV head narrower than a block": (
        models.config("llama-3.1-8b-instruct")
        | {"hidden_size": 2048, "head_dim": 64, "quantization_config": FP8},
        "--gpus 8 --tp 8",
        "64 kv heads of",
    ),
    "a state that nobody lists": (
        {
            "architectures": ["FalconH1ForCausalLM"],
            "model_type": "falcon_h1",
            "num_hidden_layers": 2,
        },
        "",
        "layers with a state",
    ),
    "more KV heads than cards, unevenly": (
        models.config("qwen3-8b") | {"num_attention_heads": 30, "num_key_value_heads": 5},
        "--gpus 3 --tp 3",
        "30 heads and 5 KV heads",
    ),
    "quantised twice": (QWEN_72B_AWQ, "--gpus 2 --dtype fp8", "quantises no checkpoint twice"),
    "float16 where it overflows": (
        models.config("gemma-3-12b-it"),
        "--gpus 2 --dtype float16",
        "in float16",
    ),
    "blocks of seven tokens": (models.config("qwen3-8b"), "--block-size 7", "multiples of 16"),
    "longer than the model": (
        models.config("qwen3-8b"),
        "--gpus 2 --max-model-len 100000",
        "more than the 40960 tokens",
    ),
    "a batch smaller than its requests": (
        models.config("qwen3-8b"),
        "--gpus 2 --max-num-batched-tokens 128",
        "less than --max-num-seqs 256",
    ),
    "stages that do not add up": (
        models.config("qwen3-8b"),
        "--gpus 2 --pp 2 --pp-layers 20,20",
        "36 layers together",
    ),
    "sizes of other cards": (
        models.config("qwen3-8b"),
        "--gpus 3 --gpu-memory-gib 16,24",
        "2 cards",
    ),
    "an unknown method": (
        models.config("qwen3-8b") | {"quantization_config": {"quant_method": "quark"}},
        "",
        "quark, which the planner does not know",
    ),
    "a kind of layer": (
        models.config("qwen3-8b") | {"layer_types": ["mamba"] * 36},
        "",
        "layers of the kind mamba",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_engine_would_refuse(case, ask, tmp_path):
    values, flags, reason = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, err = ask(f"serve --model {tmp_path}/config.json {flags}")
    one_sentence = re.fullmatch(r"(the planner's table .*\n)?error: .*\n", err)
    assert code == 2 and out == "" and one_sentence and reason in err, err


def test_four_bits_are_another_checkpoint(answer):
    """Where the catalogue has one it is named; else a note says that no flag makes it."""
    known = answer("serve --model qwen2.5-32b-instruct --gpus 2")
    assert known["suggestion"] == "--model qwen2.5-32b-instruct-awq" and not known["notes"]
    small = "--gpus 1 --gpu-memory-gib 16 --max-model-len 4096"
    other = answer(f"serve --model qwen2.5-14b-instruct {small}")
    assert other["suggestion"] == "--dtype int4"
    assert "no flag that makes int4" in other["notes"][-1]


def test_a_model_with_states_needs_a_block_for_each_request(answer):
    """Its CUDA graphs do (vllm/config/compilation.py); without them, requests may wait."""
    question = "serve --model qwen3.5-27b-fp8 --gpus 2 --max-model-len 65536"
    too_many = answer(question)
    assert not too_many["fits"] and too_many["suggestion"].startswith("--max-num-seqs")
    assert answer(f"{question} {too_many['suggestion']}")["fits"]
    assert answer(f"{question} --enforce-eager")["fits"]


def test_groups_of_experts_are_cut_in_halves(answer):
    """moe_wna16.py: 192 inputs on a card are three groups of 64."""
    assert answer("serve --model qwen3-30b-a3b-gptq-int4 --gpus 4 --tp 4")["fits"]


def test_a_gguf_is_for_another_engine(ask, tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    code, _, err = ask(f"serve --model {tmp_path}/model.Q4_K_M.gguf")
    assert code == 2 and "is for llama.cpp" in err


def test_architectures_as_a_word():
    as_a_word = model("qwen3-8b", architectures="Qwen3ForCausalLM")
    assert weights.parameters(as_a_word) == 8_190_735_360


# -----------------------------------------------------------------------------
# Cards that are not two equal, empty ones


def test_a_split_group_is_served_by_a_pipeline(answer, tmp_path):
    """The 72B that TP=2 cannot divide: --pp 2 is what helps, on cards that are large enough."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B_AWQ))
    question = (
        f"serve --model {tmp_path}/config.json --gpus 2 --gpu-memory-gib 32 --max-model-len 8192"
    )
    first = answer(question)
    assert not first["fits"] and first["suggestion"] == "--pp 2"
    assert answer(f"{question} --pp 2")["fits"]


def test_unequal_cards_and_stages(answer):
    """vllm#34076: 16 layers on a card of 16 GiB, 32 on one of 32."""
    fp8 = "serve --model qwen3-30b-a3b --dtype fp8 --gpus 2 --pp 2 --max-model-len 32768"
    even = answer(f"{fp8} --gpu-memory-gib 16,32")
    uneven = answer(f"{fp8} --gpu-memory-gib 16,32 --pp-layers 16,32")
    assert not even["fits"] and uneven["fits"]
    suggestion = answer(f"{fp8.replace('--pp 2', '')} --gpu-memory-gib 16,32")["suggestion"]
    assert suggestion == "--tp 1 --pp 2 --pp-layers 16,32"
    assert uneven["kv_tokens"] == min(
        answer(f"{fp8} --gpu-memory-gib {size} --pp-layers {layers}")["kv_tokens"]
        for size, layers in (("16,64", "16,32"), ("64,32", "16,32"))
    )


def test_memory_that_others_have_taken(answer):
    """A desktop has 2 GiB of the card: 0.9 of it is not free (vLLM's check at the start)."""
    question = "serve --model qwen3-8b --gpus 1 --max-model-len 8192 --gpu-memory-utilization 0.9"
    assert answer(question)["fits"]
    beside_a_desktop = answer(f"{question} --free-memory-gib 21")
    assert not beside_a_desktop["fits"]
    assert "Free memory on device" in " ".join(beside_a_desktop["notes"])
    assert "--gpu-memory-utilization" in beside_a_desktop["suggestion"]


# -----------------------------------------------------------------------------
# Any architecture, any config


@pytest.mark.long
def test_every_architecture_that_both_engines_know():
    """Of the architectures in transformers and vLLM, from the classes' own sizes.

    A tenth of these classes cannot be built from their own sizes, or have no attention at all.
    """
    import importlib.util
    from pathlib import Path

    import transformers
    from transformers.models.auto import modeling_auto

    package = Path(importlib.util.find_spec("vllm").origin).parent
    registry = (package / "model_executor/models/registry.py").read_text()
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pictures = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    model_types = {architecture: name for name, architecture in (text | pictures).items()}
    both = [name for name in model_types if f'"{name}"' in registry]
    answered = []
    for architecture in both:
        values = transformers.AutoConfig.for_model(model_types[architecture]).to_dict()
        try:
            read = config.read(values | {"architectures": [architecture]}, architecture)
            plan = serving.serve(read, Serving(gpus=1, gpu_memory_gib=1000))
        except SystemExit as end:
            assert end.code == 2
            continue
        assert plan.kv_bytes_per_request > 0
        answered.append(architecture)
    assert len(both) > 90 and len(answered) > 0.8 * len(both), set(both) - set(answered)


def test_any_config_gets_an_answer_or_one_sentence(ask, tmp_path):
    """200 configs with values missing, of a wrong type, huge, negative or nested: no traceback."""
    file = tmp_path / "config.json"
    refused = 0
    for seed in range(200):
        file.write_text(json.dumps(configs.wrong(seed)))
        line = f"serve --model {file} --tp 2" if seed % 2 else f"train --model {file} --method lora"
        code, out, err = ask(line)
        lines = [text for text in err.splitlines() if "builds it without memory" not in text]
        refused += code == 2
        assert code in (0, 2), seed
        assert len(lines) == (code == 2) and bool(out) == (code == 0), (seed, err)
    assert 50 < refused < 195, "the configs are all right, or all too wrong"
