"""Llama and Qwen2 decoders in plain torch.

Sequences are packed one behind another, T tokens in one dimension. q, k and v are one matrix
product, and so are gate and up. The model does not know about blocks: `attend` is handed in.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")


def read_config(folder: Path) -> dict:
    """config.json with `head_dim` and `rope_theta`; ValueError where we would compute wrongly."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["model without a name"])[0]
    if architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ValueError(
            f"{folder.name} is a {architecture}: this small engine computes {known} only"
        )
    beyond = "which this small engine does not compute"
    # transformers 5 writes the first, older ones the second.
    rope = (config.get("rope_parameters") or {}) | (config.get("rope_scaling") or {})
    scalings = {rope.get("rope_type"), rope.get("type")} - {None, "default"}
    if scalings:
        raise ValueError(f"{folder.name} scales its rotary embedding ({scalings.pop()}), {beyond}")
    if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder.name} has a sliding window or an activation not silu, {beyond}")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    return config | {"head_dim": head_dim, "rope_theta": theta}


def read_weights(folder: Path, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files under their names in the file."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder.name} holds no .safetensors file")
    return {
        name: tensor.to(device, dtype)
        for file in files
        for name, tensor in load_file(file).items()
        if not name.endswith("inv_freq")
    }


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [T, heads, D] by angles [T, 1, D/2]."""
    a, b = x.chunk(2, dim=-1)  # turned are the pairs (x[i], x[i + D/2])
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(NamedTuple):
    """A decoder layer's weights; with tensor parallelism, this process's part of them."""

    norm1: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(heads + 2 * kv_heads) * D, hidden]
    bias: torch.Tensor | None  # of qkv
    kv_heads: int
    o: torch.Tensor  # [hidden, heads * D]
    norm2: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    down: torch.Tensor  # [hidden, intermediate]


def take_layer(weights: dict[str, torch.Tensor], number: int, head_dim: int) -> Layer:
    """Layer `number`, its tensors taken out of `weights`."""

    def take(name: str) -> torch.Tensor:
        return weights.pop(f"model.layers.{number}.{name}")

    key = weights[f"model.layers.{number}.self_attn.k_proj.weight"]
    biased = f"model.layers.{number}.self_attn.q_proj.bias" in weights
    return Layer(
        norm1=take("input_layernorm.weight"),
        qkv=torch.cat([take(f"self_attn.{x}_proj.weight") for x in "qkv"]),
        bias=torch.cat([take(f"self_attn.{x}_proj.bias") for x in "qkv"]) if biased else None,
        kv_heads=key.shape[0] // head_dim,
        o=take("self_attn.o_proj.weight"),
        norm2=take("post_attention_layernorm.weight"),
        gate_up=torch.cat([take(f"mlp.{x}_proj.weight") for x in ("gate", "up")]),
        down=take("mlp.down_proj.weight"),
    )


class Model:
    def __init__(self, config: dict, weights: dict[str, torch.Tensor], reduce=lambda x: x):
        """`weights` are used up. `reduce` sums over the processes of tensor parallelism."""
        self.config = config
        self.reduce = reduce
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.norm = weights.pop("model.norm.weight")
        lm_head = weights.pop("lm_head.weight", self.embedding)
        self.lm_head = self.embedding if config.get("tie_word_embeddings") else lm_head
        head_dim = config["head_dim"]
        numbers = range(config["num_hidden_layers"])
        self.layers = [take_layer(weights, number, head_dim) for number in numbers]
        if weights:
            raise ValueError(
                "the model has weights that this small engine does not compute with, "
                f"such as {next(iter(weights))}"
            )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [D/2]
        frequencies = 1.0 / config["rope_theta"] ** exponents
        positions = torch.arange(config["max_position_embeddings"], dtype=torch.float32)
        angles = torch.outer(positions, frequencies)[:, None]  # [positions, 1, D/2]
        self.cos = angles.cos().to(self.norm)
        self.sin = angles.sin().to(self.norm)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])  # arXiv 1910.07467

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend, rows=slice(None)
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of tokens [T] at positions [T].

        `attend(layer, q, k, v)`: q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D].
        """
        cos = self.cos[positions]  # [T, 1, D/2]
        sin = self.sin[positions]
        x = self.embedding[token_ids]  # [T, hidden]
        for number, layer in enumerate(self.layers):
            kv_heads = layer.kv_heads
            qkv = F.linear(self.rms_norm(x, layer.norm1), layer.qkv, layer.bias)
            qkv = qkv.unflatten(-1, (-1, self.config["head_dim"]))  # [T, heads + 2 * kv_heads, D]
            qk = rotate(qkv[:, :-kv_heads], cos, sin)
            q = qk[:, :-kv_heads]
            k = qk[:, -kv_heads:]
            v = qkv[:, -kv_heads:]
            x = x + self.reduce(F.linear(attend(number, q, k, v), layer.o))
            gate_up = F.linear(self.rms_norm(x, layer.norm2), layer.gate_up)
            gate, up = gate_up.chunk(2, dim=-1)  # each [T, intermediate]
            x = x + self.reduce(F.linear(F.silu(gate) * up, layer.down))
        return F.linear(self.rms_norm(x[rows], self.norm), self.lm_head)
