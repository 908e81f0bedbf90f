"""What a config.json says of a model: its sizes, every weight, and what each layer caches."""

from dataclasses import dataclass, field

from lab import fail
from lab.planner import cache, quantization, tensors, vision
from lab.planner.cache import LayerCache
from lab.planner.families import FAMILIES, Family
from lab.planner.tensors import Decoder, Weight
from lab.planner.values import Values

MOST_LAYERS = 1000
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k")
SECTIONS = ("text_config", "language_config", "llm_config")  # of the decoder, beside a tower


@dataclass(frozen=True)
class Model:
    """A decoder, and the tower beside it where it reads pictures. `experts` 0: a dense model."""

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # width of a dense layer's MLP
    vocab: int
    max_len: int  # tokens it was made for
    tied: bool = False  # input and output embedding are one tensor
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of the experts that every token passes
    expert_layers: int = 0  # layers that have experts
    latent_head: int = 0  # MLA: numbers of one head's key and value that a token's vector becomes
    rope: int = 0  # numbers in the tables of cosines and sines that vLLM keeps for RoPE
    largest_graph: int = 512  # requests of vLLM's largest CUDA graph
    dtype: str = "bfloat16"  # what vLLM computes in, unless told otherwise
    cache_dtype: str = "auto"  # of the KV cache, where the checkpoint says it: fp8
    stored: str = "bfloat16"  # a key of LINEAR_BYTES: how most of the linear layers are stored
    weights: tuple[Weight, ...] = field(default=(), repr=False)
    caches: tuple[LayerCache, ...] = field(default=(), repr=False)  # of each layer

    @property
    def has_state(self) -> bool:
        """Whether some layers keep a state instead of keys and values."""
        return any(layer.is_state for layer in self.caches)

    @property
    def has_tower(self) -> bool:
        """Whether it reads pictures."""
        return any(weight.part == "vision" for weight in self.weights)

    @property
    def quantised(self) -> bool:
        """Whether the checkpoint is: an engine then keeps it so."""
        return self.stored != self.dtype

    @property
    def query_width(self) -> int:
        """Numbers in the queries of one token and layer.

        >>> QWEN_7B.query_width
        3584
        """
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers in the keys (and in the values) of one token and layer.

        >>> QWEN_7B.kv_width
        512
        """
        return self.kv_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Width of the MLP that one token passes: of all its experts together in a MoE.

        >>> QWEN_7B.mlp_width
        18944
        """
        if not self.experts:
            return self.intermediate
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate


def read(config: dict, name: str = "this model") -> Model:
    """The model that a config.json describes.

    An architecture outside of the table (families.py) is built by transformers without memory,
    which takes seconds. Raises SystemExit(2) with one sentence for what it cannot judge.
    """
    top = Values(config, name)
    architecture = architecture_of(top)
    section = next((top.section(key) for key in SECTIONS if top.has(key)), Values({}, name))
    family = FAMILIES.get(architecture)
    text = Values(config | section.values, name)
    if family is None or (family.wide and has_more_than_the_table(text, top)):
        from lab.planner import counted

        return counted.read(top, text, architecture)
    text = Values(family.defaults | text.values, name)
    decoder = decoder_of(text, top, family)
    weights = list(tensors.decoder_weights(decoder, family, text))
    if family.vision:
        weights += vision.tower_weights(family.vision, top.section("vision_config"), decoder.hidden)
    caches = cache.of_layers(decoder, text, latent=family.mla)
    return model_of(decoder, quantization.stored(weights, top), caches, text, top, family)


def has_more_than_the_table(text: Values, top: Values) -> bool:
    """Whether this Gemma 4 has per-layer inputs, experts or sound, which tensors.py leaves out."""
    per_layer = text.number("hidden_size_per_layer_input", default=256, least=0)
    return bool(per_layer) or top.has("audio_config") or text.flag("enable_moe_block")


def architecture_of(config: Values) -> str:
    """The first architecture that is named: by a list, or by a word alone."""
    names = config.words("architectures")
    if not names:
        config.refuse("architectures", 'a list with the name of a class, as ["Qwen3ForCausalLM"]')
    return next((name for name in names if name in FAMILIES), names[0])


def model_of(
    decoder: Decoder,
    weights: list[Weight],
    caches: tuple[LayerCache, ...],
    text: Values,
    top: Values,
    family: Family,
) -> Model:
    """Everything together."""
    dtype = dtype_of(text, top)
    return Model(
        name=text.name,
        architecture=architecture_of(top),
        layers=decoder.layers,
        hidden=decoder.hidden,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        intermediate=decoder.intermediate,
        vocab=decoder.vocab,
        max_len=longest(text),
        tied=decoder.tied,
        qk_norm=tensors.has_qk_norm(family, text),
        experts=decoder.experts,
        experts_per_token=decoder.experts_per_token,
        expert_intermediate=decoder.expert_intermediate,
        shared_intermediate=decoder.shared_intermediate,
        expert_layers=sum(decoder.sparse),
        latent_head=latent_numbers(text) if family.mla else 0,
        rope=rope_numbers(text, family, decoder),
        largest_graph=family.largest_graph,
        dtype=dtype,
        cache_dtype=quantization.cache_dtype(top),
        stored=mostly_stored_as(weights) or dtype,
        weights=tuple(weights),
        caches=caches,
    )


def decoder_of(config: Values, top: Values, family: Family) -> Decoder:
    """The sizes of the decoder; refused where heads and KV heads do not go together."""
    number = config.number
    layers = number("num_hidden_layers")
    if layers > MOST_LAYERS:
        config.refuse("num_hidden_layers", f"at most {MOST_LAYERS}")
    hidden = number("hidden_size")
    heads = number("num_attention_heads")
    kv_heads = number("num_key_value_heads", default=heads)
    if heads % kv_heads and not family.mla:
        fail(
            f"the config.json of {config.name} has {heads} heads and {kv_heads} KV heads: "
            "the first must be a multiple of the second"
        )
    sparse = layers_with_experts(config, family, layers)
    has_dense = not all(sparse)
    tied = config.flag("tie_word_embeddings", default=family.tied)
    return Decoder(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=number("head_dim", default=max(1, hidden // heads)),
        vocab=number("vocab_size"),
        intermediate=number("intermediate_size", default=None if has_dense else 1),
        tied=top.flag("tie_word_embeddings", default=tied),
        kinds=kinds_of_layers(config, family, layers),
        sparse=sparse,
        **(expert_sizes(config, family) if any(sparse) else {}),
    )


def kinds_of_layers(config: Values, family: Family, layers: int) -> tuple[str, ...]:
    """Of each layer: full_attention, sliding_attention or linear_attention."""
    listed = config.words("layer_types")
    if listed:
        if len(listed) != layers:
            config.refuse("layer_types", f"a list of {layers} kinds, one for each layer")
        return tuple(listed)
    if family.linear:
        step = config.number("full_attention_interval", default=4)
        return every(step, layers, "full_attention", "linear_attention")
    if config.flag("use_sliding_window"):
        first = config.number("max_window_layers", default=layers, least=0)
        full = ("full_attention",) * min(first, layers)
        return full + ("sliding_attention",) * (layers - len(full))
    if not family.sliding or not config.has("sliding_window"):
        return ("full_attention",) * layers
    if family.sliding == "all":
        return ("sliding_attention",) * layers
    step = 2
    if family.sliding == "pattern":
        step = config.number("sliding_window_pattern", default=6)
    return every(step, layers, "full_attention", "sliding_attention")


def every(step: int, layers: int, nth: str, others: str) -> tuple[str, ...]:
    """`nth` at every `step`-th layer.

    >>> every(2, 4, "full", "sliding")
    ('sliding', 'full', 'sliding', 'full')
    """
    return tuple(others if (layer + 1) % step else nth for layer in range(layers))


def layers_with_experts(config: Values, family: Family, layers: int) -> tuple[bool, ...]:
    """Of each layer, whether it has experts."""
    if not family.moe:
        return (False,) * layers
    listed = config.words("mlp_layer_types")
    if listed:
        if len(listed) != layers:
            config.refuse("mlp_layer_types", f"a list of {layers} kinds, one for each layer")
        return tuple(kind == "sparse" for kind in listed)
    dense = set(config.numbers("mlp_only_layers"))
    step = config.number("decoder_sparse_step", default=1)
    first = config.number("first_k_dense_replace", default=family.dense_first, least=0)
    return tuple(
        layer >= first and layer not in dense and (layer + 1) % step == 0 for layer in range(layers)
    )


def expert_sizes(config: Values, family: Family) -> dict[str, int]:
    """The fields of `Decoder` that describe the experts."""
    width = config.number("moe_intermediate_size", "intermediate_size")
    shared = 0
    if family.moe == "deepseek":
        shared = width * config.number("n_shared_experts", least=0)
    elif config.has("shared_expert_intermediate_size"):
        shared = config.number("shared_expert_intermediate_size", least=0)
    return {
        "experts": config.number("num_experts", "num_local_experts", "n_routed_experts"),
        "experts_per_token": config.number(*EXPERTS_PER_TOKEN),
        "expert_intermediate": width,
        "shared_intermediate": shared,
    }


def dtype_of(text: Values, top: Values) -> str:
    """What vLLM computes in under --dtype auto: a float32 checkpoint is read as bfloat16.

    Source: vllm/config/model.py, _resolve_auto_dtype.

    >>> half = Values({"torch_dtype": "torch.float16"}, "a model")
    >>> dtype_of(half, half)
    'float16'
    """
    for values in (text, top):
        for key in ("dtype", "torch_dtype"):
            if values.has(key):
                is_half = values.text(key).removeprefix("torch.") in ("float16", "half")
                return "float16" if is_half else "bfloat16"
    return "bfloat16"


def mostly_stored_as(weights: list[Weight]) -> str:
    """The format of most of the packed numbers; "" where nothing is packed."""
    numbers: dict[str, int] = {}
    for weight in weights:
        if weight.stored:
            numbers[weight.stored] = numbers.get(weight.stored, 0) + weight.count
    return max(numbers, key=numbers.get, default="")


def latent_numbers(config: Values) -> int:
    return config.number("qk_nope_head_dim") + config.number("v_head_dim")


def rope_section(config: Values) -> Values:
    """What the config says of its rotary positions (arXiv 2104.09864)."""
    return config.section("rope_parameters" if config.has("rope_parameters") else "rope_scaling")


def rope_numbers(config: Values, family: Family, decoder: Decoder) -> int:
    """A cosine and a sine for each position and pair of a head's numbers.

    With positions in three dimensions (pictures), four times as many.
    Source: vllm/model_executor/layers/rotary_embedding.

    >>> QWEN_7B.rope  # 32768 * 128
    4194304
    """
    rope = rope_section(config)
    turned = decoder.head_dim
    if family.mla:
        turned = config.number("qk_rope_head_dim")
    section = rope if rope.has("partial_rotary_factor") else config
    part = min(1, section.decimal("partial_rotary_factor", 1))
    times = 4 if rope.has("mrope_section") else 1
    return int(longest(config) * times * turned * part) * family.ropes


def longest(config: Values) -> int:
    """Tokens that vLLM takes at most: the config's, times a factor of its RoPE.

    Source: vllm/config/model.py, _get_and_verify_max_len.
    """
    longest = config.number("max_position_embeddings", "max_seq_len", "n_positions", default=2048)
    rope = rope_section(config)
    kind = rope.text("rope_type") or rope.text("type")
    scaled_already = kind in ("", "default", "su", "longrope", "llama3", "mrope", "proportional")
    is_gemma3 = "gemma3" in config.text("model_type")
    if scaled_already or is_gemma3 or not rope.has("factor"):
        return longest
    if kind == "yarn":
        longest = rope.number("original_max_position_embeddings", default=longest)
    return int(longest * rope.decimal("factor", 1))


# The model of every worked number in this package: Qwen2.5-7B-Instruct.
QWEN_7B = read(
    {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b-instruct",
)
