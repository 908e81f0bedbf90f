"""Units, the bytes of a number, and what a card and a process cost before any model is there.

Constants of single engines stand in serving.py and training.py. Those marked `fit` were fixed on
the lines of configs/calibration.yaml with that mark; the lines marked `test` only check them.
"""

GIB = 2**30

# Bytes of one number in a linear layer of the decoder, by how it is stored. Quantised types keep
# embeddings, norms and the output layer in 16 bits.
LINEAR_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "fp8": 1,
    "int8": 1,
    "int4": 0.5 + 2.5 / 128,  # AWQ, GPTQ: a 16-bit scale and a 4-bit zero for 128 weights
    "mxfp4": 0.5 + 1 / 32,  # an 8-bit scale for 32 weights (OCP Microscaling formats)
    "nvfp4": 0.5 + 1 / 16,  # an 8-bit scale for 16 weights
    # An 8-bit scale for 64 weights, and a 32-bit one for 256 of these (arXiv 2305.14314).
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
}

# What a 4090's driver leaves to CUDA of 24 GiB: "total capacity of 23.65 GiB" in PyTorch's errors.
CARD_GIB = 23.6
HOST_PROCESS_GIB = 2.25  # Python, torch and its libraries
CONTEXT = 0.75 * GIB  # CUDA context and loaded kernels of a process (fit, on H100s)
# NCCL between two cards without NVLink, from logs of two GeForce cards (vllm#14452): nobody has
# measured a 4090 here. On H100s, with more channels, it was 1.0 GiB.
NCCL = 0.33 * GIB


def width(dtype: str) -> int:
    """Bytes of a number that is computed with, where weights are stored as `dtype`.

    >>> width("float32"), width("bfloat16"), width("int4")
    (4, 2, 2)
    """
    return 4 if dtype == "float32" else 2


def gib(parts: dict[str, float]) -> dict[str, float]:
    """Bytes to GiB, and their total.

    >>> gib({"weights": 2**30, "buffers": 2**29})
    {'weights': 1.0, 'buffers': 0.5, 'total': 1.5}
    """
    with_total = parts | {"total": sum(parts.values())}
    return {name: round(size / GIB, 6) for name, size in with_total.items()}
