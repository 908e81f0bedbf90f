"""A copy of a model whose heads two machines can share.

14_two_nodes.py gives it to tensor parallelism for SmolLM2's 9 heads and 3 KV heads.
"""

import json
import shutil
from pathlib import Path

from lab import RUNS


def with_even_heads(folder: Path) -> Path:
    """The model, or where its KV heads cannot be divided by two, a copy with one group more.

    A group is a KV head and the heads that share it; the new one's weights are 0, so that it adds
    nothing.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    if heads % 2 == kv_heads % 2 == 0:
        return folder
    group = heads // kv_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    target = RUNS / "models" / f"{folder.name}-{heads + group}-heads"
    if (target / "config.json").is_file():
        return target

    from safetensors.torch import load_file, save_file

    others = shutil.ignore_patterns("config.json", "*.safetensors")
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=others)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        weights[name] = with_zeros(name.split(".")[-2], weight, group * head_dim, head_dim)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config |= {
        "num_attention_heads": heads + group,
        "num_key_value_heads": kv_heads + 1,
        "head_dim": head_dim,
    }
    # Last: a copy without it is made anew.
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


def with_zeros(kind: str, weight, more_heads: int, more_kv: int):
    """`weight` with so many more numbers of its heads, all 0: o_proj's inputs, others' outputs."""
    import torch

    if kind in ("q_proj", "o_proj"):
        more = more_heads
    elif kind in ("k_proj", "v_proj"):
        more = more_kv
    else:
        return weight
    dim = 1 if kind == "o_proj" else 0
    shape = list(weight.shape)
    shape[dim] = more
    return torch.cat([weight, weight.new_zeros(shape)], dim)
