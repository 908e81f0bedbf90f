"""Which model 07_step_speed.py trains, with random weights, and the FLOP that a step needs."""

from lab import models


def llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    """A Llama's config.json."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }


# name: (config.json, rows of a step, tokens of a row)
SHAPES = {
    "tiny": (llama(2, 128, 384, 4, 2, 4096), 2, 64),  # for a CPU
    "0.5b": (models.config("qwen2.5-0.5b-instruct"), 4, 1024),
    "1.1b": (llama(22, 2048, 5632, 32, 4, 32000), 8, 1024),  # TinyLlama-1.1B's config.json
}


def fitting(memory_gib: float) -> str:
    """The largest shape whose every measure fits a card of so many GiB; 0: a CPU.

    >>> fitting(0), fitting(24), fitting(80)
    ('tiny', '0.5b', '1.1b')
    """
    if not memory_gib:
        return "tiny"
    return "0.5b" if memory_gib < 40 else "1.1b"


def weights_that_multiply(config) -> int:
    """Parameters that a token is multiplied by: all but the embedding's, which is looked up.

    The output layer counts, also where it is the embedding.
    """
    head = config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * head
    keys = config.num_key_value_heads * head
    attention = config.hidden_size * 2 * (queries + keys)
    mlp = 3 * config.hidden_size * config.intermediate_size
    output = config.hidden_size * config.vocab_size
    return config.num_hidden_layers * (attention + mlp) + output


def step_flop(config, rows: int, length: int, causal: bool = False) -> float:
    """FLOP that a step of `rows` x `length` tokens needs: 6 a weight and token, and attention.

    Attention's two products of every token with every other, 12 * layers * hidden * length a token
    (PaLM, arXiv 2204.02311, appendix B). `causal`: only the half that the causal mask leaves, as
    `make plan` counts. What checkpointing computes again does not count.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * length
    if causal:
        attention /= 2
    return rows * length * (6 * weights_that_multiply(config) + attention)
