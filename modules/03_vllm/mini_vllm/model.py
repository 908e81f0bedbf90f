"""Llama, Qwen2, Qwen3 and Qwen3-MoE decoders in plain torch, told apart by their weights.

Sequences are packed one behind another, T tokens in one dimension. q, k and v are one matrix
product, and so are gate and up. The model does not know about blocks: `attend` is handed in.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mini_vllm.mlp import MLP, Experts

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def read_config(folder: Path) -> dict:
    """config.json with `head_dim` and `rope_theta`; ValueError where we would compute wrongly."""
    config = json.loads((folder / "config.json").read_text())
    architecture = str(config.get("architectures") or "model without a name").strip("[']")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"{folder.name} is a {architecture}: this small engine computes {known} only"
        )
    beyond = "which this small engine does not compute"
    rope = config.get("rope_parameters") or {}  # transformers 5 writes this,
    rope |= config.get("rope_scaling") or {}  # older ones this
    scalings = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    if scalings:
        raise ValueError(f"{folder.name} scales its rotary embedding ({scalings.pop()}), {beyond}")
    if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder.name} has a sliding window or an activation not silu, {beyond}")
    if config.get("quantization_config"):
        raise ValueError(f"{folder.name} is quantised, {beyond}")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    return config | {"head_dim": head_dim, "rope_theta": theta}


def read_weights(folder: Path, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files under their names in the file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder.name} holds no .safetensors file")
    return {
        name: tensor.to(device, dtype)
        for file in files
        for name, tensor in load_file(file).items()
        if not name.endswith("inv_freq")
    }


def rotate(x, cos, sin) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [T, heads, D] by angles [T, 1, D/2]."""
    a, b = x.chunk(2, dim=-1)  # turned are the pairs (x[i], x[i + D/2])
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer:
    """A decoder layer's weights; with tensor parallelism, this process's part of them."""

    def __init__(self, weights, number: int, config):
        """Layer `number`: its tensors are taken out of `weights`."""

        def take(name):
            return weights.pop(f"model.layers.{number}.{name}", None)

        parts = [take(f"self_attn.{x}_proj.weight") for x in "qkv"]
        self.heads = [len(part) // config["head_dim"] for part in parts]
        self.qkv = torch.cat(parts)  # [(heads + 2 * kv_heads) * D, hidden]
        biases = [take(f"self_attn.{x}_proj.bias") for x in "qkv"]
        self.bias = None if biases[0] is None else torch.cat(biases)  # Qwen2
        self.q_norm = take("self_attn.q_norm.weight")  # [D] for every head, Qwen3
        self.k_norm = take("self_attn.k_norm.weight")
        self.o = take("self_attn.o_proj.weight")  # [hidden, heads * D]
        self.norm1 = take("input_layernorm.weight")  # [hidden]
        self.norm2 = take("post_attention_layernorm.weight")  # [hidden]
        router = take("mlp.gate.weight")  # Qwen3-MoE; it may have layers without experts, too
        self.mlp = MLP(take, "mlp") if router is None else Experts(take, router, config)


class Model:
    def __init__(self, config: dict, weights: dict[str, Tensor], reduce=lambda x: x):
        """`weights` are used up. `reduce` sums over the processes of tensor parallelism."""
        self.config = config
        self.reduce = reduce
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.norm = weights.pop("model.norm.weight")
        lm_head = weights.pop("lm_head.weight", self.embedding)
        self.lm_head = self.embedding if config.get("tie_word_embeddings") else lm_head
        self.layers = [Layer(weights, i, config) for i in range(config["num_hidden_layers"])]
        if weights:
            raise ValueError(
                "the model has weights that this small engine does not compute with, "
                f"such as {next(iter(weights))}"
            )
        head_dim = config["head_dim"]
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [D/2]
        self.frequencies = (1.0 / config["rope_theta"] ** exponents).to(self.norm.device)

    def rms_norm(self, x, weight) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])  # arXiv 1910.07467

    def forward(self, token_ids, positions, attend, rows=slice(None)) -> Tensor:
        """Logits [rows, vocabulary] of tokens [T] at positions [T].

        `attend(layer, q, k, v)`: q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D].
        """
        head_dim = self.config["head_dim"]
        x = self.embedding[token_ids]  # [T, hidden]
        angles = positions[:, None, None] * self.frequencies  # [T, 1, D/2]
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)
        for number, layer in enumerate(self.layers):
            qkv = F.linear(self.rms_norm(x, layer.norm1), layer.qkv, layer.bias)
            q, k, v = qkv.unflatten(-1, (-1, head_dim)).split(layer.heads, dim=1)
            if layer.q_norm is not None:  # each head by itself
                q = self.rms_norm(q, layer.q_norm)
                k = self.rms_norm(k, layer.k_norm)
            out = attend(number, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x = x + self.reduce(F.linear(out, layer.o))
            x = x + self.reduce(layer.mlp(self.rms_norm(x, layer.norm2)))
        return F.linear(self.rms_norm(x[rows], self.norm), self.lm_head)
