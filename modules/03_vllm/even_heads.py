"""A copy of a model whose heads two machines can share: what 14_two_nodes.py gives tensor
parallelism for SmolLM2's 9 heads and 3 KV heads.
"""

import json
import shutil
from pathlib import Path

from lab import RUNS


def with_even_heads(folder: Path) -> Path:
    """The model, or where its KV heads cannot be divided by two, a copy with one group of heads
    more: its weights 0, so that it adds nothing.
    """
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % 2 == kv_heads % 2 == 0:
        return folder
    group, size = heads // kv_heads, config.get("head_dim") or config["hidden_size"] // heads
    target = RUNS / "models" / f"{folder.name}-{heads + group}-heads"
    if not (target / "config.json").is_file():
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(
            folder,
            target,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("config.json", "*.safetensors"),
        )
        weights = load_file(folder / "model.safetensors")
        for name, weight in weights.items():
            kind = name.split(".")[-2]
            if more := {
                "q_proj": group * size,
                "o_proj": group * size,
                "k_proj": size,
                "v_proj": size,
            }.get(kind):
                dim = 1 if kind == "o_proj" else 0
                zeros = weight.new_zeros(
                    [more if d == dim else n for d, n in enumerate(weight.shape)]
                )
                weights[name] = torch.cat([weight, zeros], dim)
        save_file(weights, target / "model.safetensors", {"format": "pt"})
        config |= {
            "num_attention_heads": heads + group,
            "num_key_value_heads": kv_heads + 1,
            "head_dim": size,
        }
        (target / "config.json").write_text(
            json.dumps(config, indent=1)
        )  # last: a copy without it is made anew
    return target
