"""Random models of two layers, each with what sets its architecture apart."""

from pathlib import Path

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
HEADS = {"hidden_size": 64, "head_dim": 32}  # not hidden_size / heads
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS = {
    # What the small model does not have: biases, an output layer that is not the embedding.
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": HEADS | {"tie_word_embeddings": True},
    "qwen3_moe": HEADS | EXPERTS | {"norm_topk_prob": True},
    # The shares as the router gives them, and a first layer without experts.
    "qwen3_moe-dense-first": HEADS | EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0]},
}


def random_model(name: str, folder: Path, tokenizer_of: Path) -> Path:
    """`folder`, with the model of MODELS and the tokenizer of another in it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    kind = name.split("-")[0]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **(SIZES | MODELS[name])), dtype=torch.float32
    )
    for parameter_name, parameter in model.named_parameters():
        std = 1.0 if parameter_name.endswith("bias") else 0.2
        torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=std)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def vision_model(folder: Path, tokenizer_of: Path) -> Path:
    """`folder`, with a model of Qwen2.5-VL's kind, two layers of each part, and its processor's
    settings: it looks at pictures of at most 112 x 112.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers import Qwen2VLImageProcessorPil as Pictures

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    names = ["vision_start", "vision_end", "image_pad", "video_pad"]
    tokens = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    start, end, image, video = tokenizer.convert_tokens_to_ids(tokens)
    rope = SIZES["rope_parameters"] | {"mrope_section": [2, 3, 3]}
    sizes = SIZES | {"hidden_size": 64, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config=sizes,
        vision_config=vision | {"out_hidden_size": 64, "fullatt_block_indexes": [1]},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Pictures(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(folder)
    return folder
