"""What a pipeline that edits pictures needs of each card, and of the host.

Its components (transformer, text encoder, VAE) run one after another, so that their weights add up
and of their working memory only the largest counts. A recipe says for each component where its
weights lie and how they are stored there: modules/02_qwen_image_edit/recipes.py has them, and the
tensors of a model. Weights are exact; working memory was measured at 1024 x 1024 and scaled.
"""

import math
import re

Component = dict[str, tuple[int, ...]]  # {tensor: shape}
Tensors = dict[str, Component]  # {component: its tensors}
# {component: (place, how it is stored there)}. Places: cuda:0, cuda:1; "host" (on its way to the
# card layer by layer while it runs); "in turn" (on the host, and whole on the card while it runs).
Recipe = dict[str, tuple[str, str]]

# Working memory of a component at 1024 x 1024, GiB, from the peaks of fp8, nf4 and group-offload on
# an H100.
WORK = {"transformer": 0.9, "text_encoder": 1.1, "vae": 4.3}
FILE = 5.0  # GiB: the largest safetensors files of such models
LIBRARIES = 2.0  # GiB of host memory for Python, torch and the CUDA libraries

# The model of the worked numbers: Qwen/Qwen-Image-Edit, what is stored alike as one tensor.
QWEN_IMAGE_EDIT = {
    "transformer": {"linear": (20_424_818_688, 1), "norms and biases": (5_582_400,)},
    "text_encoder": {
        "embed_tokens": (152_064, 3584),
        "lm_head": (152_064, 3584),
        "linear": (7_199_817_728, 1),
        "norms and biases": (2_354_176,),
    },
    "vae": {"convolutions": (126_892_531,)},
}


# -----------------------------------------------------------------------------
# Weights


def stored_bytes(name: str, shape: tuple[int, ...], how: str) -> float:
    """Bytes of one tensor, stored as bf16, float32, fp8, nf4 or gguf, or pinned (bf16 on the host).

    >>> weight = ("transformer_blocks.0.attn.to_q.weight", (3072, 3072))
    >>> stored_bytes(*weight, "bf16"), stored_bytes(*weight, "fp8"), stored_bytes(*weight, "nf4")
    (18874368, 9437184, 5308416.0)
    >>> stored_bytes(*weight, "pinned")  # the next power of two
    33554432
    """
    count = math.prod(shape)
    is_matrix = len(shape) == 2
    # enable_layerwise_casting leaves norms and the output layer alone.
    if how == "fp8" and not re.search(r"norm|proj_out", name):
        return count
    if how == "nf4" and is_matrix and not re.search(r"embed_tokens|lm_head", name):
        return count * (4 + 32 / 64) / 8  # 4 bits, and a float32 scale for 64 numbers
    if how == "gguf" and is_matrix:
        return count * 13.1 / 20.43  # a Q4_K_M file of this transformer has 13.1 GB
    if how == "pinned":  # torch rounds page-locked host memory up to a power of two
        return 2 ** math.ceil(math.log2(2 * count))
    return count * (4 if how == "float32" else 2)


def stored_gib(component: Component, how: str) -> float:
    """GiB of all tensors of a component.

    >>> transformer = QWEN_IMAGE_EDIT["transformer"]
    >>> [round(stored_gib(transformer, how), 1) for how in ("bf16", "fp8", "nf4")]
    [38.1, 19.0, 10.7]
    """
    return sum(stored_bytes(name, shape, how) for name, shape in component.items()) / 2**30


# -----------------------------------------------------------------------------
# Working memory


def working_memory(size: int, tiled: bool = False) -> dict[str, float]:
    """{component: GiB} while it runs, for a picture of size x size.

    The transformer's grows with the tokens of input and output, the VAE's with the picture;
    `tiled`: in tiles of 512 x 512, it takes a quarter.

    >>> working_memory(1024)
    {'transformer': 0.9, 'text_encoder': 1.1, 'vae': 4.3}
    >>> working_memory(2048, tiled=True)["vae"]
    1.075
    """
    tokens = 4096 + size**2 / 256  # of the input at 1 megapixel, and of the output
    # The VAE encodes the input at 1 megapixel, whatever `size` is.
    pictures = 1 / 4 if tiled else max(1, size**2 / 2**20)
    return {
        "transformer": WORK["transformer"] * tokens / 8192,
        "text_encoder": WORK["text_encoder"],
        "vae": WORK["vae"] * pictures,
    }


# -----------------------------------------------------------------------------
# The places


def on_card(card: str, recipe: Recipe, tensors: Tensors, work: dict[str, float]) -> float:
    """GiB of this card: the weights that lie there, and the most that comes while one runs.

    >>> plain = dict.fromkeys(WORK, ("cuda:0", "bf16"))
    >>> round(on_card("cuda:0", plain, QWEN_IMAGE_EDIT, working_memory(1024)), 1)  # 53.7 + 4.3
    58.0
    """
    lying = 0.0
    coming = [0.0]
    for component, (place, how) in recipe.items():
        if place == card:
            lying += stored_gib(tensors[component], how)
            coming.append(work[component])
        elif place == "host":
            coming.append(work[component])
        elif place == "in turn":
            coming.append(stored_gib(tensors[component], how) + work[component])
    return lying + max(coming)


def on_host(recipe: Recipe, tensors: Tensors) -> float:
    """The most GiB that the host holds: all the time, or else while the model is loaded.

    >>> fp8 = {"transformer": ("cuda:1", "fp8"), "text_encoder": ("cuda:0", "bf16")}
    >>> round(on_host(fp8, QWEN_IMAGE_EDIT), 1)  # the transformer in bf16, 38.1
    40.1
    """
    staying = 0.0
    loading = FILE  # one file after another, on its way
    for component, (place, how) in recipe.items():
        if place in ("host", "in turn"):
            staying += stored_gib(tensors[component], how)
        if how == "fp8":  # loaded as bf16, then cast
            loading = stored_gib(tensors[component], "bf16")
    return LIBRARIES + (staying or loading)


def needs(recipe: Recipe, tensors: Tensors, work: dict[str, float]) -> dict[str, float]:
    """{place: GiB} of the host and of every card that the recipe takes.

    >>> fp8 = dict.fromkeys(WORK, ("cuda:0", "bf16")) | {"transformer": ("cuda:1", "fp8")}
    >>> need = needs(fp8, QWEN_IMAGE_EDIT, working_memory(1024))
    >>> {place: round(gib, 1) for place, gib in need.items()}  # of cuda:0, 19.9 measured
    {'host': 40.1, 'cuda:0': 20.0, 'cuda:1': 19.9}
    """
    cards = {"cuda:0"}  # where an offloaded component runs
    cards |= {place for place, _ in recipe.values() if place.startswith("cuda")}
    need = {"host": on_host(recipe, tensors)}
    for card in sorted(cards):
        need[card] = on_card(card, recipe, tensors, work)
    return need
