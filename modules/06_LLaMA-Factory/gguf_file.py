"""A Hugging Face folder as one GGUF file, tensor by tensor: llama.cpp's names, order and types.

What is written is what llama.cpp's convert_hf_to_gguf.py writes for these architectures; the format
itself is described in docs/gguf.md of the ggml repository.
"""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lab import fail, shown

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
}
# How a tokenizer cuts a text before it merges bytes, and what llama.cpp calls that
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    WORD.replace("NUMBER", r"\p{N}"): "qwen2",
    WORD.replace("NUMBER", r"\p{N}{1,3}"): "llama-bpe",
}


class Tensor(NamedTuple):
    name: str  # in the GGUF file
    source: str  # in the folder
    file: Path  # that has it
    shape: tuple[int, ...]


class Source(NamedTuple):
    folder: Path
    config: object  # transformers'
    architecture: gguf.MODEL_ARCH
    tokenizer: dict  # tokenizer.json
    pre_tokenizer: str  # llama.cpp's name of it
    tensors: list[Tensor]


# -----------------------------------------------------------------------------
# What the folder holds


def read(folder: Path) -> Source:
    """All but the weights. Exit code 2 where the folder is of a kind that is not known here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        fail(f"the model in {shown(folder)} cannot be read: {str(e).splitlines()[0]}")
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        fail(f"{shown(folder)} is a {architecture}, and only {known} are known here")
    stretched = config.rope_parameters.get("rope_type", "default")
    if stretched != "default":
        fail(
            f"{shown(folder)} stretches its positions (rope_type {stretched}), which is not known "
            "here: llama.cpp's convert_hf_to_gguf.py knows it"
        )
    pre_tokenizer = pre_tokenizer_of(tokenizer)
    if not pre_tokenizer:
        fail(
            f"{shown(folder)} has another tokenizer than the byte-level ones that are known here: "
            f"{', '.join([*PRE_TOKENIZERS.values(), *SPLITS.values()])}"
        )
    number = ARCHITECTURES[architecture]
    return Source(
        folder, config, number, tokenizer, pre_tokenizer, tensors_in(folder, config, number)
    )


def pre_tokenizer_of(tokenizer: dict) -> str | None:
    """llama.cpp's name for the way in which tokenizer.json cuts a text; None: not known."""
    whole = tokenizer.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", [whole])
    kinds = tuple(step.get("type") for step in steps)
    if kinds == ("Split", "ByteLevel"):
        return SPLITS.get(steps[0]["pattern"].get("Regex"))
    return PRE_TOKENIZERS.get(kinds)


def tensors_in(folder: Path, config, architecture: gguf.MODEL_ARCH) -> list[Tensor]:
    """Every tensor of the safetensors files. Exit code 2 where one has no place in the GGUF."""
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as stored:
            for source in stored.keys():  # noqa: SIM118, it is no dictionary
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if source == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # the embedding once more
                if name is None:
                    fail(f"{shown(file)}: llama.cpp has no place for the tensor {source}")
                shape = tuple(stored.get_slice(source).get_shape())
                tensors.append(Tensor(name, source, file, shape))
    if not tensors:
        fail(f"there are no weights (*.safetensors) in {shown(folder)}")
    return tensors


# -----------------------------------------------------------------------------
# What stands in the file before the weights


def add_metadata(writer: gguf.GGUFWriter, source: Source, kind: str) -> None:
    config = source.config
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.folder.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_vocabulary(writer: gguf.GGUFWriter, source: Source) -> None:
    """Tokens, their types, the merges, which tokens begin and end a text, the chat template."""
    from tokenizers import Tokenizer

    tokens = {number: text for text, number in source.tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in source.tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        is_control = added["special"]  # never shown, and never made from a user's text
        types[added["id"]] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
    size = source.config.vocab_size  # the embedding may have more rows than there are tokens
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(source.pre_tokenizer)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    writer.add_add_space_prefix(False)
    special = gguf.SpecialVocab(source.folder, load_merges=True, n_vocab=size)
    first = Tokenizer.from_file(str(source.folder / "tokenizer.json")).encode("a").ids[0]
    special.add_special_token["bos"] = first == special.special_token_ids.get("bos")
    special.add_to_gguf(writer, quiet=True)


# -----------------------------------------------------------------------------
# The weights


def type_of(tensor: Tensor, kind: str) -> Type:
    """How a tensor is stored in a file of this `kind`."""
    if len(tensor.shape) == 1:
        return Type.F32  # norms and biases: few numbers, and sensitive
    wanted = Type[kind]
    if kind.startswith("Q4") and tensor.name in ("token_embd.weight", "output.weight"):
        wanted = Type.Q8_0  # every token goes through these: llama-quantize keeps them finer too
    block = gguf.GGML_QUANT_SIZES[wanted][0]  # numbers that share a scale, all of one row
    return Type.F16 if tensor.shape[-1] % block else wanted


def weights_of(tensor: Tensor, source: Source) -> np.ndarray:
    """One tensor in float32, its rows as llama.cpp wants them."""
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as stored:  # NumPy knows no bfloat16
        weights = stored.get_tensor(tensor.source).float().numpy()
    rotated = {
        "attn_q": source.config.num_attention_heads,
        "attn_k": source.config.num_key_value_heads,
    }
    heads = rotated.get(tensor.name.split(".")[-2])
    if heads and source.architecture == gguf.MODEL_ARCH.LLAMA:
        return interleaved(weights, heads)
    return weights


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as pairs: Hugging Face rotates row i with row i + half of the head,
    llama.cpp's Llama row 2i with row 2i + 1. `weights`: [heads * size, ...].
    """
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write(source: Source, kind: str, file: Path) -> None:
    """`file`, a GGUF of this `kind` (F16, BF16, Q8_0, Q4_0, Q4_1); one tensor in memory at a time.

    Written beside and renamed. Exit code 2 where there is no room; an earlier file then stays.
    """
    partial = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[source.architecture])
    add_metadata(writer, source, kind)
    add_vocabulary(writer, source)
    needed = 0
    for tensor in source.tensors:
        stored_as = type_of(tensor, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, stored_as)
        count = math.prod(shape)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), count, stored_as)
        needed += count
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        fail(f"{shown(file)} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in source.tensors:
            weights = weights_of(tensor, source)
            writer.write_tensor_data(gguf.quantize(weights, type_of(tensor, kind)).view(np.uint8))
        writer.close()
    except OSError as e:
        partial.unlink(missing_ok=True)
        fail(f"{shown(file)} could not be written: {e.strerror or e}; make room and try again")
    partial.replace(file)
