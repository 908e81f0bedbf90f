"""Llama and Qwen2 decoders in plain torch, for sequences packed one behind another without padding: T tokens in one dimension.

q, k and v are one matrix product and so are gate and up, as in vLLM. The model does not know about blocks: `attend` is handed in."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F


def read_config(folder: Path) -> dict:
    """The model's config.json; ValueError with one sentence when this engine would compute something else than the model is."""
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (name := (c.get("architectures") or ["model without a name"])[0]) not in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
        raise ValueError(f"{folder.name} is a {name}: this small engine computes LlamaForCausalLM and Qwen2ForCausalLM only")
    rope = (c.get("rope_parameters") or {}) | (c.get("rope_scaling") or {})  # the first since transformers 5
    if kinds := {rope.get("rope_type"), rope.get("type")} - {None, "default"}:
        raise ValueError(f"{folder.name} scales its rotary embedding ({kinds.pop()}), which this small engine does not compute")
    if c.get("use_sliding_window") or c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder.name} uses a sliding window or an activation other than silu, which this small engine does not compute")
    dim, theta = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], rope.get("rope_theta") or c.get("rope_theta", 10000.0)
    return c | {"head_dim": dim, "rope_theta": theta}


def read_weights(folder: Path, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files under their names in the file."""
    from safetensors.torch import load_file
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise ValueError(f"{folder.name} holds no .safetensors file")
    return {name: tensor.to(device, dtype) for file in files for name, tensor in load_file(file).items() if not name.endswith("inv_freq")}


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864): turn the pairs (x[i], x[i + D/2]) of x [T, heads, D] by their angles [T, 1, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Model:
    def __init__(self, config: dict, weights: dict[str, torch.Tensor], reduce=lambda x: x):
        """`weights` are used up. With tensor parallelism they are this process's part, and `reduce` sums over the processes."""
        self.config, self.reduce, self.layers, take = config, reduce, [], weights.pop
        self.embedding, self.norm = take("model.embed_tokens.weight"), take("model.norm.weight")
        lm_head = weights.pop("lm_head.weight", self.embedding)
        self.lm_head = self.embedding if config.get("tie_word_embeddings") else lm_head
        for p in (f"model.layers.{i}." for i in range(config["num_hidden_layers"])):
            qkv = [f"{p}self_attn.{x}_proj." for x in "qkv"]
            layer = {"norm1": take(p + "input_layernorm.weight"), "norm2": take(p + "post_attention_layernorm.weight")}
            layer["kv_heads"] = weights[qkv[1] + "weight"].shape[0] // config["head_dim"]  # of this process
            layer["qkv"] = torch.cat([take(x + "weight") for x in qkv])
            layer["bias"] = torch.cat([take(x + "bias") for x in qkv]) if qkv[0] + "bias" in weights else None
            layer["gate_up"] = torch.cat([take(p + "mlp.gate_proj.weight"), take(p + "mlp.up_proj.weight")])
            layer |= {"o": take(p + "self_attn.o_proj.weight"), "down": take(p + "mlp.down_proj.weight")}
            self.layers.append(layer)
        if weights:
            raise ValueError(f"the model has weights that this small engine does not compute with, such as {next(iter(weights))}")
        frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, config["head_dim"], 2, dtype=torch.float32) / config["head_dim"])
        angles = torch.outer(torch.arange(config["max_position_embeddings"], dtype=torch.float32), frequencies)
        self.cos, self.sin = (f(angles)[:, None].to(self.norm) for f in (torch.cos, torch.sin))  # [positions, 1, D/2]

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attend, rows=slice(None)) -> torch.Tensor:
        """Logits [rows, vocabulary] of tokens [T] at positions [T]; `attend(layer, q, k, v)` -> [T, heads * head_dim]."""
        def norm(x, weight):  # RMSNorm, arXiv 1910.07467
            return F.rms_norm(x, weight.shape, weight, self.config["rms_norm_eps"])
        cos, sin, x = self.cos[positions], self.sin[positions], self.embedding[token_ids]
        for i, w in enumerate(self.layers):
            qkv = F.linear(norm(x, w["norm1"]), w["qkv"], w["bias"]).unflatten(-1, (-1, self.config["head_dim"]))  # [T, heads + 2 * kv_heads, D]
            q, k = rotate(qkv[:, : -w["kv_heads"]], cos, sin).split([qkv.shape[1] - 2 * w["kv_heads"], w["kv_heads"]], dim=1)
            x = x + self.reduce(F.linear(attend(i, q, k, qkv[:, -w["kv_heads"] :]), w["o"]))
            gate, up = F.linear(norm(x, w["norm2"]), w["gate_up"]).chunk(2, dim=-1)
            x = x + self.reduce(F.linear(F.silu(gate) * up, w["down"]))
        return F.linear(norm(x[rows], self.norm), self.lm_head)
