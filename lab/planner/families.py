"""What the code of an architecture decides and its config.json does not say: a table of families.

tests/test_memory.py builds every family with transformers and compares each weight's name and
shape with those of lab/planner/tensors.py.
"""

from dataclasses import dataclass, field, replace

PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
GLM_NORMS = (*PRE_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Family:
    """How a decoder is built. Where a field is the name of a config's key, that key decides."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: str = ""  # "head": over each head; "all": over all heads; or a key
    gated: bool = False  # queries carry a gate of their own width
    sinks: bool = False  # one more logit for each head
    norms: tuple[str, ...] = PRE_NORMS
    qkv_fused: bool = False  # one weight for q, k and v
    gate_fused: bool = False  # one weight for gate and up
    wide: bool = False  # full layers have wider heads: Gemma 4's
    mla: bool = False  # latent attention: DeepSeek-V2's
    linear: str = ""  # the linear attention of its linear layers: "next" or "3.5"
    moe: str = ""  # how its experts are named: "qwen", "deepseek", "gpt_oss"
    dense_first: int = 0  # layers before the first with experts, where no key says it
    sliding: str = ""  # which layers slide, where no list says it: "all", "alternate", "pattern"
    vision: str = ""  # the tower: see lab/planner/vision.py
    ropes: int = 1  # tables of rotary positions: Gemma 3 turns its sliding layers otherwise
    largest_graph: int = 512  # requests of vLLM's largest CUDA graph
    tied: bool = False  # whether embedding and output layer are one, where no key says it
    decoder: str = "model."  # what stands before "layers." in the names of weights
    defaults: dict = field(default_factory=dict, hash=False)  # what a config.json may leave out


LLAMA = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
)
QWEN2 = Family(qkv_bias=True)
QWEN3 = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    qk_norm="head",
    defaults={"head_dim": 128},
)
QWEN3_MOE = replace(QWEN3, moe="qwen", defaults={})
LINEAR = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}
QWEN3_NEXT = replace(QWEN3_MOE, gated=True, linear="next", defaults=LINEAR)
QWEN3_5 = replace(QWEN3, gated=True, linear="3.5", defaults=LINEAR)
QWEN3_5_MOE = replace(QWEN3_5, moe="qwen")
GEMMA2 = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    norms=SANDWICH_NORMS,
    sliding="alternate",
    tied=True,
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
)
GEMMA3 = replace(
    GEMMA2,
    qk_norm="head",
    sliding="pattern",
    ropes=2,
    defaults=GEMMA2.defaults
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
    },
)
GEMMA4 = Family(
    qk_norm="head",
    norms=SANDWICH_NORMS,
    wide=True,
    sliding="pattern",
    ropes=2,
    tied=True,
    vision="gemma4",
    decoder="model.language_model.",
    defaults=GEMMA3.defaults
    | {"vocab_size": 262144, "sliding_window": 512, "global_head_dim": 512},
)
GPT_OSS = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    sinks=True,
    moe="gpt_oss",
    largest_graph=1024,
    sliding="alternate",
    defaults={
        "attention_bias": True,
        "head_dim": 64,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
    },
)
DEEPSEEK = Family(
    mla=True,
    moe="deepseek",
    qkv_bias="attention_bias",
    defaults={
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
    },
)
DEEPSEEK_V2 = replace(DEEPSEEK, defaults=DEEPSEEK.defaults | {"n_shared_experts": 2})
GLM4_MOE_LITE = replace(
    DEEPSEEK,
    dense_first=1,
    defaults=DEEPSEEK.defaults
    | {
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "max_position_embeddings": 202752,
    },
)
GLM4_MOE = Family(
    qkv_bias="attention_bias",
    qk_norm="use_qk_norm",
    moe="deepseek",
    dense_first=1,
    defaults={"n_shared_experts": 1},
)


def with_tower(family: Family, vision: str, **changes) -> Family:
    """The family where its decoder stands beside a vision tower."""
    return replace(family, vision=vision, decoder="model.language_model.", **changes)


# Architecture, as config.json names it: its family.
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": Family(
        sliding="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "Ministral3ForCausalLM": Family(defaults={"num_key_value_heads": 8, "head_dim": 128}),
    "SmolLM3ForCausalLM": LLAMA,
    "SeedOssForCausalLM": Family(
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        defaults={"num_key_value_heads": 8, "head_dim": 128},
    ),
    "Phi3ForCausalLM": Family(qkv_fused=True, gate_fused=True, sliding="all"),
    "Olmo3ForCausalLM": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="all",
        norms=POST_NORMS,
        sliding="pattern",
        defaults={"sliding_window_pattern": 4, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "MixtralForCausalLM": Family(moe="qwen", sliding="all", defaults={"num_key_value_heads": 8}),
    "Qwen2MoeForCausalLM": replace(QWEN2, moe="qwen"),
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5ForConditionalGeneration": with_tower(QWEN3_5, "qwen3_5"),
    "Qwen3_5MoeForConditionalGeneration": with_tower(QWEN3_5_MOE, "qwen3_5"),
    "Qwen2VLForConditionalGeneration": with_tower(QWEN2, "qwen2_vl"),
    "Qwen2_5_VLForConditionalGeneration": with_tower(QWEN2, "qwen2_5_vl"),
    "Qwen3VLForConditionalGeneration": with_tower(QWEN3, "qwen3_vl"),
    "Qwen3VLMoeForConditionalGeneration": with_tower(QWEN3_MOE, "qwen3_vl"),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": with_tower(GEMMA3, "siglip"),
    "Gemma4ForConditionalGeneration": GEMMA4,
    "GptOssForCausalLM": GPT_OSS,
    "Glm4ForCausalLM": Family(
        qkv_bias="attention_bias",
        norms=GLM_NORMS,
        gate_fused=True,
        defaults={"num_key_value_heads": 2, "head_dim": 128},
    ),
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": replace(DEEPSEEK, dense_first=3),
}
