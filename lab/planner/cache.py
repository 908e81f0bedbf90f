"""What a request keeps in the cache, by kind of layer, and how vLLM cuts that into blocks.

    full_attention      keys and values of every token
    sliding_attention   keys and values of the last `window` tokens
    latent_attention    one short vector of every token instead (MLA, arXiv 2405.04434)
    linear_attention    a state of constant size, however long the request (arXiv 2412.06464)
    shared              nothing: it reads another layer's

vLLM has one pool of blocks of one size for all kinds. It puts the layers into groups of one kind,
each as large as the smallest kind; a block belongs to one group and holds its layers' part of a
few tokens, or one state. Source: vllm/v1/core/kv_cache_utils.py, get_kv_cache_groups.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from lab import fail
from lab.planner.constants import width
from lab.planner.tensors import Decoder
from lab.planner.values import Values

FULL = "full_attention"
SLIDING = "sliding_attention"
LATENT = "latent_attention"
LINEAR = "linear_attention"
SHARED = "shared"

KV_BLOCK = 16  # tokens of a block, where no state needs larger ones


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps."""

    kind: str
    kv_heads: int = 0
    numbers: int = 0  # of one head and token: its key and its value
    window: int = 0  # tokens that a sliding layer looks back
    convolution: int = 0  # numbers of a linear layer's last inputs
    state: int = 0  # numbers of its state
    state_dtype: str = ""  # "": as the model's

    @property
    def is_state(self) -> bool:
        return self.kind == LINEAR

    def token_bytes(self, number: float, tp: int = 1) -> float:
        """Bytes of one token on one card; `number` is that of one number.

        With more cards than KV heads, vLLM keeps copies.
        """
        return max(1, math.ceil(self.kv_heads / tp)) * self.numbers * number

    def state_bytes(self, number: float, tp: int = 1) -> float:
        """Bytes of the state of one request on one card.

        >>> state = LayerCache(LINEAR, convolution=30720, state=786432, state_dtype="float32")
        >>> state.state_bytes(2)
        3207168.0
        """
        of_state = width(self.state_dtype) if self.state_dtype else number
        return (self.convolution * number + self.state * of_state) / tp


def of_layers(decoder: Decoder, config: Values, latent: bool = False) -> tuple[LayerCache, ...]:
    """What each layer keeps."""
    sharing = config.number("num_kv_shared_layers", default=0, least=0)
    own = decoder.layers - min(sharing, decoder.layers - 1)
    kinds = {kind: of_kind(kind, decoder, config, latent) for kind in set(decoder.kinds)}
    shared = LayerCache(SHARED)
    return tuple(kinds[kind] if layer < own else shared for layer, kind in enumerate(decoder.kinds))


def of_kind(kind: str, decoder: Decoder, config: Values, latent: bool) -> LayerCache:
    """What a layer of this kind keeps; refused for a kind that the planner does not know."""
    if kind == LINEAR and config.has("linear_num_value_heads"):
        return of_delta_net(config)
    if kind == "mamba" and config.has("mamba_n_heads"):
        return of_mamba2(config)
    if kind == "conv" and config.has("conv_L_cache"):
        steps = config.number("conv_L_cache") - 1  # LFM2: the last inputs of a short convolution
        return LayerCache(LINEAR, convolution=decoder.hidden * steps)
    if kind in ("full_attention", "attention"):
        if latent:
            numbers = config.number("kv_lora_rank") + config.number("qk_rope_head_dim")
            return LayerCache(LATENT, 1, numbers)
        heads = decoder.kv_heads
        if config.flag("attention_k_eq_v"):
            heads = config.number("num_global_key_value_heads", default=heads)
        head_dim = config.number("global_head_dim", default=decoder.head_dim)
        return LayerCache(FULL, heads, 2 * head_dim)
    if kind == SLIDING:
        window = config.number("sliding_window")
        return LayerCache(SLIDING, decoder.kv_heads, 2 * decoder.head_dim, window)
    if kind == "chunked_attention":  # Llama 4: a window that begins anew
        window = config.number("attention_chunk_size")
        return LayerCache(SLIDING, decoder.kv_heads, 2 * decoder.head_dim, window)
    fail(
        f"{config.name} has layers of the kind {kind[:40]}: how much of a request these keep, "
        f"the planner does not know; it knows {FULL}, {SLIDING} and {LINEAR}"
    )


def of_delta_net(config: Values) -> LayerCache:
    """A gated delta net's: a matrix for each head, and what its convolution still needs.

    Source: vllm/model_executor/layers/mamba/mamba_utils.py, gated_delta_net_state_shape.
    """
    key = config.number("linear_num_key_heads") * config.number("linear_key_head_dim")
    value = config.number("linear_num_value_heads") * config.number("linear_value_head_dim")
    steps = config.number("linear_conv_kernel_dim") - 1
    return LayerCache(
        LINEAR,
        convolution=(2 * key + value) * steps,
        state=value * config.number("linear_key_head_dim"),
        state_dtype=config.text("mamba_ssm_dtype"),
    )


def of_mamba2(config: Values) -> LayerCache:
    """A Mamba-2 layer's (arXiv 2405.21060), by the names of Bamba and Granite 4.

    Source: vllm/model_executor/layers/mamba/mamba_utils.py, mamba2_state_shape.
    """
    inner = config.number("mamba_n_heads") * config.number("mamba_d_head")
    size = config.number("mamba_d_state")
    steps = config.number("mamba_d_conv") - 1
    mixed = inner + 2 * config.number("mamba_n_groups", default=1) * size
    return LayerCache(LINEAR, convolution=mixed * steps, state=inner * size)


# -----------------------------------------------------------------------------
# A request, as arithmetic has it


def token_bytes(caches: tuple[LayerCache, ...], number: float, tp: int = 1) -> float:
    """Bytes of one token's keys and values on one card, over all layers that keep them.

    >>> token_bytes(QWEN_7B.caches, 2)  # 2 * 28 layers * 4 heads * 128 * 2 bytes
    57344
    """
    return sum(cache.token_bytes(number, tp) for cache in caches if not cache.is_state)


def request_bytes(caches: tuple[LayerCache, ...], tokens: int, number: float, tp: int = 1) -> float:
    """Bytes of a request of `tokens` tokens on one card: sliding layers keep their window.

    >>> full = LayerCache(FULL, 8, 128)
    >>> sliding = LayerCache(SLIDING, 8, 128, window=128)
    >>> request_bytes((full, sliding), 100_000, 2) / 1e6  # 204.8 and 0.26
    205.062144
    """
    total = 0.0
    for cache in caches:
        if cache.is_state:
            total += cache.state_bytes(number, tp)
        else:
            kept = min(tokens, cache.window) if cache.window else tokens
            total += kept * cache.token_bytes(number, tp)
    return total


# -----------------------------------------------------------------------------
# A request, as vLLM's blocks round it


class Group(NamedTuple):
    """Layers of one kind that share a table of blocks."""

    cache: LayerCache
    layers: list[int]
    block: int  # tokens of a block


class Pool(NamedTuple):
    """vLLM's one pool of blocks."""

    groups: list[Group]
    page: float  # bytes of a block in one layer
    mixed: float = 0  # where layers of one group differ: bytes of a block over all of them

    def block_bytes(self, layers: range) -> float:
        """Bytes of a block on a card that has these layers."""
        if self.mixed:
            return self.mixed * len(layers) / sum(len(group.layers) for group in self.groups)
        return self.page * max(len(set(group.layers) & set(layers)) for group in self.groups)

    def blocks_of_request(self, tokens: int, in_flight: int) -> int:
        """Blocks that a request of `tokens` holds at most, over all groups.

        A sliding layer gives blocks back only when the batches that were begun are through:
        `in_flight` tokens. Source: vllm/v1/kv_cache_interface.py, max_memory_usage_bytes.

        >>> pool(QWEN_7B.caches, 2).blocks_of_request(1000, 4096)  # of 16 tokens
        63
        """
        total = 0
        for group in self.groups:
            if group.cache.is_state:
                total += 1
            elif group.cache.window:
                kept = min(group.cache.window - 1 + in_flight, tokens)
                total += math.ceil(kept / group.block) + 1
            else:
                total += math.ceil(tokens / group.block)
        return total


def pool(
    caches: tuple[LayerCache, ...],
    number: float,
    tp: int = 1,
    block: int = KV_BLOCK,
    computed: float = 2,
) -> Pool:
    """The groups that vLLM makes of the layers, and the size of a block.

    `number` is the bytes of a number in the cache, `computed` of one in a state: FP8 is for keys
    and values only.

    >>> full = LayerCache(FULL, 4, 512)  # as in Qwen3.5-27B: one in four
    >>> state = LayerCache(LINEAR, convolution=30720, state=786432, state_dtype="float32")
    >>> groups = pool((state, state, state, full), 2).groups
    >>> len(groups), groups[-1].block  # 784 * 4096 bytes hold a state of 3207168
    (4, 784)
    """
    layers_of: dict[LayerCache, list[int]] = defaultdict(list)
    for layer, cache in enumerate(caches):
        if cache.kind != SHARED:
            layers_of[cache].append(layer)
    attention = [cache for cache in layers_of if not cache.is_state]
    tokens = {cache: cache.token_bytes(number, tp) for cache in attention}
    alike = {(cache.kind == SLIDING, cache.window) for cache in attention}
    if len(layers_of) > 1 and len(alike) == 1 and len(attention) == len(layers_of):
        # One group of layers that differ in size, as in a model with wide and narrow heads.
        everywhere = sorted(sum(layers_of.values(), []))
        mixed = sum(block * tokens[caches[layer]] for layer in everywhere)
        return Pool([Group(attention[0], everywhere, block)], 0, mixed)

    # A block must hold a state, so that one with few tokens of attention grows.
    states = [cache.state_bytes(computed, tp) for cache in layers_of if cache.is_state]
    if states and attention:
        widest = max(tokens.values())
        block *= max(1, math.ceil(max(states) / (block * widest)))
    page = max([block * size for size in tokens.values()] + states)

    sizes = [len(layers) for layers in layers_of.values()]
    group_size = min(sizes)
    if max(sizes) < 1.5 * group_size:
        group_size = max(sizes)
    groups = []
    for cache, layers in layers_of.items():
        count = math.ceil(len(layers) / group_size)
        size = block if cache.is_state else block * int(page // (block * tokens[cache]))
        groups += [Group(cache, layers[first::count], size) for first in range(count)]
    return Pool(groups, page)
