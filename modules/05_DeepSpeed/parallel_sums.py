"""What all processes send each other in a step of mini_parallel, by arithmetic, in numbers.

For 04_mini_parallel.py. As mini_zero/traffic.py counts: an all-reduce of n numbers is 2 n in each
process, a message n in its sender.
"""


def sent(name: str, config, world: int, batch: int, seq: int, micro_batches: int) -> dict:
    """{collective: numbers} for an engine's name, "tensor" or "pipeline 1f1b 2x2" (stages x
    replicas), and the model's config.
    """
    way, *shape = name.split()
    if way == "pipeline":
        stages, replicas = map(int, shape[1].split("x"))
        return of_pipeline(config, stages, replicas, batch * seq)
    return {"tensor": of_tensor, "ring": of_ring, "experts": of_experts}[way](
        config, world, batch * seq
    )


def of_pipeline(config, stages: int, replicas: int, tokens: int) -> dict:
    """Down and up between neighbours: 2 (p - 1) m micro_batch seq hidden, in all replicas."""
    between = 2 * (stages - 1) * tokens * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    tied = 2 * 2 * embedding * replicas  # the first and the last stage of each replica
    held = dense_parameters(config) + embedding  # by all stages: the embedding is there twice
    means = 2 * held * replicas if replicas > 1 else 0
    return {"isend": between, "all_reduce": tied + means}


def of_tensor(config, world: int, tokens: int) -> dict:
    """Four all-reduces a layer of the activations; and the norms of q and k, head_dim each."""
    activations = 4 * tokens * config.hidden_size
    norms = 2 * config.head_dim
    return {"all_reduce": 2 * config.num_hidden_layers * (activations + norms) * world}


def of_ring(config, world: int, tokens: int) -> dict:
    """A shard's K and V: world - 1 hops forward; as many backward, and dK and dV world hops."""
    shard = 2 * (tokens // world) * config.num_key_value_heads * config.head_dim
    hops = (world - 1) + (world - 1) + world
    return {
        "isend": config.num_hidden_layers * shard * hops * world,
        "all_reduce": 2 * dense_parameters(config) * world,
    }


def of_experts(config, world: int, tokens: int) -> dict:
    """Four all-to-alls a layer of top_k rows a token, and one of the counts."""
    rows = (tokens // world) * config.num_experts_per_tok * config.hidden_size
    layers = config.num_hidden_layers
    router = config.num_experts * config.hidden_size
    whole = outside_of_layers(config) + layers * (attention_and_norms(config) + router)
    return {
        "all_to_all_single": layers * (4 * rows + config.num_experts) * world,
        "all_reduce": 2 * whole * world,
    }


# -----------------------------------------------------------------------------
# Parameters of a Qwen3 with tied embeddings


def outside_of_layers(config) -> int:
    return config.vocab_size * config.hidden_size + config.hidden_size


def attention_and_norms(config) -> int:
    """q, k, v, o; two norms of hidden; norms of q and k."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return (heads * config.hidden_size + 2) * config.head_dim + 2 * config.hidden_size


def dense_parameters(config) -> int:
    mlp = 3 * config.hidden_size * config.intermediate_size
    layer = attention_and_norms(config) + mlp
    return outside_of_layers(config) + config.num_hidden_layers * layer
