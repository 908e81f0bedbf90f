"""A small mixture of experts, for 15_mini_vllm.py --moe: none that is published is small."""

from pathlib import Path

from lab import RUNS


def random_moe(tokenizer_of: Path) -> Path:
    """A Qwen3-MoE with random weights and the tokenizer of the model in that folder.

    4 layers of 16 experts, of which a token takes 2; the first layer has a plain MLP, as some
    models have it. About 16 million weights besides the embedding.
    """
    folder = RUNS / "models" / f"random-qwen3-moe-{tokenizer_of.name}"
    if (folder / "tokenizer_config.json").is_file():
        return folder

    import torch
    from transformers import AutoConfig, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=AutoConfig.from_pretrained(tokenizer_of).vocab_size,
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    # Last: a folder without it is made anew.
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder
