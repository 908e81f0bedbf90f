"""How much memory a model needs on each card and on the host, for serving and for training: arithmetic on its config.json.

Nothing is loaded: no torch, no GPU, no network. A `Model` holds the sizes; `serve` and `train` return a plan, a dict with

    fits          bool: every card and the host hold their part
    per_gpu_gib   {part: GiB on the card that needs most, ..., "total"}
    host_gib      GiB of host memory over all processes of this machine

Sizes are exact where a formula is (weights, KV cache, states of ZeRO). What an engine needs on the way (activations, buffers, graphs)
is a formula with the constants below, which were fixed on the lines marked `fit` in configs/calibration.yaml and held against the
lines marked `test`: the table is in modules/01_single_gpu_smoke/planner.md. GiB = 2^30 bytes, psi = number of parameters.
"""

import math
from dataclasses import dataclass

from lab import fail

GIB = 2**30

# Bytes of one parameter in a linear layer of the decoder. Quantised types keep embeddings, norms and the output layer in 16 bits.
# int4: AWQ / GPTQ, a 16-bit scale and a 4-bit zero for 128 weights. nf4: an 8-bit scale for 64 weights, itself scaled (arXiv 2305.14314).
LINEAR_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1, "int4": 0.5 + 2.5 / 128, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}

CARD_GIB = 23.6  # of a 4090's 24 GiB, what its driver leaves to CUDA ("total capacity of 23.65 GiB" in PyTorch's error messages)
HOST_PROCESS_GIB = 2.25  # Python, torch and its libraries
UTILIZATIONS = (0.9, 0.85, 0.8, 0.75)  # what vLLM may take of a card, the rest is for CUDA graphs and NCCL
KV_BLOCK = 16  # tokens of a block of vLLM's cache

# Measured on H100s (configs/calibration.yaml, lines `fit`): CUDA context and loaded kernels of a process, what PyTorch holds for cuBLAS,
# what vLLM's libraries take within its share, a CUDA graph of one layer.
CONTEXT, WORKSPACE, SERVE_OTHER, GRAPH_LAYER = 0.75 * GIB, 0.064 * GIB, 0.22 * GIB, 0.00025 * GIB
# NCCL between two cards without NVLink, and its part in CUDA graphs. The first from logs of two GeForce cards (vllm#14452), the second
# scaled from it: nobody has measured a 4090 here. On H100s, with more channels, they were 1.0 and 1.2 GiB.
NCCL, GRAPH_NCCL = 0.33 * GIB, 0.4 * GIB
ZERO3_LIVE = 1e9  # parameters gathered at once: stage3_max_live_parameters

# What the code of an architecture decides and its config.json does not say.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "MixtralForCausalLM": {},
    "Qwen2MoeForCausalLM": {"qkv_bias": True},
    "Qwen3MoeForCausalLM": {"qk_norm": True},
}


# -----------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder-only transformer, under the names of config.json. `experts` 0 means a dense model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of a dense layer's MLP
    vocab: int
    max_len: int  # tokens it was made for
    tied: bool = False  # input and output embedding are one tensor
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # of the expert that every token passes
    expert_layers: int = 0  # layers that have experts
    stored: str = "bfloat16"  # a key of LINEAR_BYTES: how the linear layers are stored

    @property
    def q(self) -> int:
        """Width of the queries of a layer."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys (and of the values) of a layer."""
        return self.kv_heads * self.head_dim

    @property
    def attention(self) -> int:
        """Weights in the linear layers of one attention."""
        return 2 * self.hidden * (self.q + self.kv)

    @property
    def linear(self) -> int:
        """Weights in all linear layers of the decoder: what quantisation packs and LoRA adapts."""
        dense = (self.layers - self.expert_layers) * 3 * self.hidden * self.intermediate
        sparse = self.expert_layers * 3 * self.hidden * (self.experts * self.expert_intermediate + self.shared_intermediate)
        return self.layers * self.attention + dense + sparse

    @property
    def active(self) -> int:
        """Weights in linear layers that one token passes, the output layer included."""
        idle = self.expert_layers * 3 * self.hidden * self.expert_intermediate * (self.experts - self.experts_per_token)
        return self.linear - idle + self.embedding

    @property
    def mlp(self) -> int:
        """Width of the MLP that one token passes: of all its experts together in a MoE."""
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate if self.experts else self.intermediate

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def other(self) -> int:
        """Norms, biases, routers."""
        biases = (self.q + 2 * self.kv) * self.qkv_bias + self.hidden * self.o_bias
        routers = self.expert_layers * self.hidden * (self.experts + bool(self.shared_intermediate))
        return self.layers * (2 * self.hidden + biases + 2 * self.head_dim * self.qk_norm) + self.hidden + routers

    @property
    def parameters(self) -> int:
        return self.linear + self.other + self.embedding * (1 if self.tied else 2)


def read(config: dict, name: str = "this model") -> Model:
    """The sizes in a config.json. Raises SystemExit(2) with one sentence for an architecture or a value that it cannot judge."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        fail(f"{name} has the architecture {architecture}, which the planner does not know: it knows {', '.join(ARCHITECTURES)}")

    def size(*keys: str, default: int | None = None) -> int:
        value = next((config[k] for k in keys if config.get(k) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1e9:
            fail(f"the config.json of {name} says {keys[0]} = {value}: it must be a whole number above 0")
        return value

    heads, layers, hidden = size("num_attention_heads"), size("num_hidden_layers"), size("hidden_size")
    experts = size("num_experts", "num_local_experts", default=1) if "Moe" in architecture or "Mixtral" in architecture else 0
    sparse = {}
    if experts:
        dense, step = set(config.get("mlp_only_layers") or []), size("decoder_sparse_step", default=1)
        sparse = {"experts": experts, "experts_per_token": size("num_experts_per_tok"), "expert_intermediate": size("moe_intermediate_size", "intermediate_size")}
        sparse |= {"shared_intermediate": size("shared_expert_intermediate_size") if config.get("shared_expert_intermediate_size") else 0}
        sparse |= {"expert_layers": sum(i not in dense and (i + 1) % step == 0 for i in range(layers))}
    bias = bool(config.get("attention_bias", False)) and architecture.startswith(("Llama", "Qwen3"))
    model = Model(
        layers=layers, hidden=hidden, heads=heads, kv_heads=size("num_key_value_heads", default=heads), head_dim=size("head_dim", default=hidden // heads),
        intermediate=size("intermediate_size"), vocab=size("vocab_size"), max_len=size("max_position_embeddings", default=2048),
        tied=bool(config.get("tie_word_embeddings", False)), stored=stored_as(config, name),
        **{"qkv_bias": bias, "o_bias": bias} | ARCHITECTURES[architecture], **sparse,
    )  # fmt: skip
    if model.heads % model.kv_heads:
        fail(f"the config.json of {name} has {model.heads} heads and {model.kv_heads} KV heads: the first must be a multiple of the second")
    return model


def stored_as(config: dict, name: str) -> str:
    """The key of LINEAR_BYTES for what config.json says of the checkpoint."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or not quantization:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return dtype if dtype in LINEAR_BYTES else "bfloat16"
    method, bits = quantization.get("quant_method"), quantization.get("bits")
    if method in ("awq", "gptq") and bits in (4, 8):
        return f"int{bits}"
    if method == "fp8":
        return "fp8"
    if method == "bitsandbytes":
        return "nf4" if quantization.get("load_in_4bit") else "int8"
    if method == "compressed-tensors":
        weights = next(iter((quantization.get("config_groups") or {}).values()), {}).get("weights") or {}
        kind = "fp8" if (weights.get("type"), weights.get("num_bits")) == ("float", 8) else f"int{weights.get('num_bits')}"
        if kind in LINEAR_BYTES:
            return kind
    fail(f"{name} is quantised by {method} ({bits} bits), which the planner does not know: it knows awq, gptq, fp8, bitsandbytes and compressed-tensors")


def width(dtype: str) -> int:
    """Bytes of a number that is computed with, where weights are stored as `dtype`."""
    return 4 if dtype == "float32" else 2


def weight_bytes(model: Model, dtype: str = "auto") -> float:
    """Bytes of all weights, stored as `dtype` ("auto": as the checkpoint has them)."""
    dtype = model.stored if dtype == "auto" else dtype
    return model.linear * LINEAR_BYTES[dtype] + (model.parameters - model.linear) * width(dtype)


def kv_bytes_per_token(model: Model, kv_dtype: str = "auto", tp: int = 1, pp: int = 1, dtype: str = "bfloat16") -> int:
    """Bytes of keys and values of one token on one card. With more cards than KV heads, vLLM keeps copies (arXiv 2309.06180)."""
    heads = max(1, math.ceil(model.kv_heads / tp))
    return 2 * math.ceil(model.layers / pp) * heads * model.head_dim * (1 if kv_dtype == "fp8" else width(dtype))


def splits(model: Model, tp: int) -> bool:
    """Whether tensor parallelism over `tp` cards divides the heads, and the KV heads or copies of them (vllm/config/model.py)."""
    return model.heads % tp == 0 and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0)


# -----------------------------------------------------------------------------
# Serving by vLLM 0.26


def serve(
    model: Model, *, gpus: int = 2, gpu_memory_gib: float = CARD_GIB, gpu_memory_utilization: float | None = None, tp: int | None = None, pp: int = 1,
    dtype: str = "auto", kv_dtype: str = "auto", max_model_len: int | None = None, concurrency: int = 1, max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048, enforce_eager: bool = False,
) -> dict:  # fmt: skip
    """What vLLM's server needs of each card; `kv_tokens` is how many tokens its cache holds, `max_concurrency` in requests of full length.

    vLLM takes gpu_memory_utilization of the card and gives the KV cache what weights and the largest batch (measured at its start) leave;
    CUDA graphs and context come on top. It fits where the cache holds `concurrency` requests of `max_model_len` tokens and all of it stays
    on the card. Source: vllm/v1/worker/gpu_worker.py, determine_available_memory. Without gpu_memory_utilization: the largest of
    UTILIZATIONS that fits.
    Raises SystemExit(2) where the engine would refuse the division.
    """
    if gpu_memory_utilization is None:
        options = {name: value for name, value in locals().items() if name != "gpu_memory_utilization"}
        plans = [serve(**options | {"gpu_memory_utilization": share}) for share in UTILIZATIONS]
        return next((p for p in plans if p["fits"]), plans[0])
    tp = tp or max(n for n in range(1, max(1, gpus // pp) + 1) if splits(model, n))
    dtype = model.stored if dtype == "auto" else dtype
    max_model_len = max_model_len or model.max_len
    if not 0 < gpu_memory_utilization <= 1:
        fail(f"--gpu-memory-utilization is a share of the card, above 0 and at most 1: it is {gpu_memory_utilization:g}")
    if tp * pp > gpus:
        fail(f"--tp {tp} x --pp {pp} needs {tp * pp} cards, there are {gpus}")
    if not splits(model, tp):
        fail(f"--tp {tp} does not divide the model: it has {model.heads} heads and {model.kv_heads} KV heads, and each card takes as many")
    if pp > model.layers:
        fail(f"--pp {pp} is more than the model's {model.layers} layers")

    wide = width(dtype)
    layers = math.ceil(model.layers / pp)
    ends = model.embedding * (1 if model.tied or pp > 1 else 2)  # a pipeline's first and last card have one of the two each
    copies = max(1, tp / model.kv_heads)  # of each key and value head
    linear = model.linear / model.layers * layers / tp + layers * 2 * model.hidden * model.kv / tp * (copies - 1)
    weights = linear * LINEAR_BYTES[dtype] + (ends / tp + model.other / model.layers * layers) * wide

    # The largest batch: three times the MLP's width and six times the hidden size are alive at once in a layer. At a first start
    # torch.compile holds one more copy of the embedding, which is often the larger (seen with every model; not with --enforce-eager).
    flow = (6 * model.hidden + 3 * model.mlp / tp) * wide  # bytes for a token
    compiling = 0 if enforce_eager else model.embedding / tp * wide + 2 * max_num_batched_tokens * model.hidden * wide
    parts = {"weights": weights, "activations": max(flow * max_num_batched_tokens, compiling), "libraries": SERVE_OTHER}

    per_token = kv_bytes_per_token(model, kv_dtype, tp, pp, dtype)
    budget = gpu_memory_gib * gpu_memory_utilization * GIB
    kv_tokens = max(0, math.floor((budget - sum(parts.values())) / per_token / KV_BLOCK) * KV_BLOCK)
    parts["kv_cache"] = max(0, budget - sum(parts.values()))
    # Outside gpu_memory_utilization: the context, taken before vLLM looks, and the CUDA graphs, captured when the cache has its share.
    largest = min(2 * max_num_seqs, 512, max_num_batched_tokens)
    sizes = 3 + min(largest, 255) // 8 + max(0, (largest - 240) // 16)
    graphs = 0 if enforce_eager else GRAPH_LAYER * layers * sizes + flow * largest + (GRAPH_NCCL if tp > 1 else 0)
    parts |= {"cuda_graphs": graphs, "cuda_context": CONTEXT + (NCCL if tp * pp > 1 else 0)}
    per_gpu = gib(parts)
    return {
        "fits": kv_tokens >= max_model_len * concurrency and per_gpu["total"] <= gpu_memory_gib,
        "per_gpu_gib": per_gpu,
        "budget_gib": round(budget / GIB, 2),
        "gpu_memory_utilization": gpu_memory_utilization,
        "host_gib": round(HOST_PROCESS_GIB * (tp * pp + 1), 1),
        "kv_tokens": kv_tokens,
        "kv_bytes_per_token": per_token,
        "max_concurrency": round(kv_tokens / max_model_len, 1),
        "max_model_len": max_model_len,
    }


def gib(parts: dict[str, float]) -> dict[str, float]:
    """Bytes to GiB, and their total."""
    return {name: round(value / GIB, 6) for name, value in (parts | {"total": sum(parts.values())}).items()}


# -----------------------------------------------------------------------------
# Training


def lora_parameters(model: Model, rank: int) -> int:
    """Trained weights of LoRA on every linear layer: rank x (inputs + outputs) each (arXiv 2106.09685). Experts are left alone, as peft does."""
    attention = model.layers * (2 * (model.hidden + model.q) + 2 * (model.hidden + model.kv))
    dense = (model.layers - model.expert_layers) * 3 * (model.hidden + model.intermediate)
    shared = model.expert_layers * 3 * (model.hidden + model.shared_intermediate) if model.shared_intermediate else 0
    return rank * (attention + dense + shared)


def saved_bytes_per_token(model: Model, method: str = "full", precision: str = "bf16", rank: int = 16) -> float:
    """Bytes that one decoder layer of transformers 5.6 keeps for the backward pass, for each token.

    `precision`: "fp32"; "bf16" (weights held in bf16: DeepSpeed, FSDP); "autocast" (weights, or adapters, in fp32 and computed with in bf16).
    Counted from modeling_llama.py with sdpa attention, tensor by tensor; tests/test_memory.py counts them in a running graph. The often
    quoted 34 x hidden (arXiv 2205.05198) is for a fused fp16 GPT with dropout and a 4 x hidden MLP. Of a MoE, the experts' part is not measured.
    """
    h, q, kv = model.hidden, model.q, model.kv
    inputs = max(1, model.experts_per_token)  # of the MLP, one for each expert a token passes
    wide = 4 if precision == "fp32" else 2
    trained = method == "full"
    # each norm keeps its input in fp32 and, for its weight's gradient, the normalised values
    normed = 4 if precision in ("fp32", "autocast") else 2
    norms = 2 * h * (4 + normed * trained) + 4 * 2
    if model.qk_norm:
        norms += (q + kv) * (4 + wide * trained) + 4 * (model.heads + model.kv_heads)
    # autocast casts the input of every linear layer anew; otherwise q, k, v share one, gate and up too
    linears = wide * h * ((3 + 2 * inputs) if precision == "autocast" else (1 + inputs))
    attention = wide * (2 * q + 2 * kv) + 4 * model.heads  # q, k, v, output; the log-sum-exp in fp32
    if not trained:
        linears += 2 * 7 * rank + (2 * q if precision == "autocast" else 0)  # what lora_B reads; a cast copy for o_proj's lora_A
    return norms + linears + attention + wide * 4 * model.mlp  # gate, silu(gate), up, their product


def train(
    model: Model, *, gpus: int = 2, gpu_memory_gib: float = CARD_GIB, method: str = "full", engine: str = "ddp", zero: int = 0, offload: str = "none",
    offload_device: str = "cpu", dtype: str = "bfloat16", seq_len: int = 1024, micro_batch: int = 1, accumulate: int = 1, checkpointing: bool = False,
    bucket: float = 1e8, lora_rank: int = 16, host_memory_gib: float | None = None,
) -> dict:  # fmt: skip
    """What fine-tuning with AdamW needs of each card at its fullest moment, which `moment` names, and of the host.

    `engine` ddp: PyTorch as in module 04 (trained weights in fp32, computed with in bf16 by autocast); fsdp: the same, divided (FSDP2);
    deepspeed: bf16 weights, an fp32 master copy and moments, divided from ZeRO stage `zero` on (arXiv 1910.02054). LoRA and QLoRA freeze the
    weights, in bf16 or nf4. `offload` moves optimizer states (ZeRO-1 on) and parameters (ZeRO-3) to the host or to NVMe (arXiv 2101.06840).
    """
    deepspeed, fp32, n = engine == "deepspeed", dtype == "float32", gpus
    if zero and not deepspeed:
        fail(f"--zero {zero} is DeepSpeed's: leave out --engine {engine}")
    if offload != "none" and (zero < 1 or ("param" in offload and zero < 3)):
        fail(f"--offload {offload} needs --zero {3 if 'param' in offload else '1, 2 or 3'}")
    full, tokens, layers, h = method == "full", micro_batch * seq_len, model.layers, model.hidden
    trained = model.parameters if full else lora_parameters(model, lora_rank)
    half = 4 if fp32 else 2
    held = half if deepspeed else 4  # bytes of a trained weight
    precision = "fp32" if fp32 else "bf16" if engine in ("deepspeed", "fsdp") else "autocast"
    divided = n if zero == 3 or engine == "fsdp" else 1  # parameters
    shared = n if zero or engine == "fsdp" else 1  # optimizer states

    # What lies on the card all the time
    frozen = 0 if full else weight_bytes(model, "nf4" if method == "qlora" else "float32" if fp32 else "bfloat16")
    head = model.embedding * held if full else 0  # one gradient of the embedding or of the output layer
    still = {"weights": 0 if "param" in offload else (frozen + trained * held) / divided}
    optimizer = trained * (12 if deepspeed and (zero or not fp32) else 8) / shared
    still["optimizer"] = 0 if offload != "none" else optimizer
    grads = trained * held / (n if zero >= 2 or (zero == 1 and accumulate == 1) or engine == "fsdp" else 1)
    still["buffers"] = WORKSPACE
    if engine == "ddp" and n > 1:
        still["buffers"] += trained * 4  # DDP's buckets: every gradient once more
    if zero == 3:
        still["buffers"] += min(bucket, trained) * half + (grads if offload == "none" else 0)  # one flat buffer, never freed
    if zero and zero < 3 and offload != "none":
        still["buffers"] += head  # the last gradient that was larger than a bucket

    # What comes and goes
    layer = saved_bytes_per_token(model, method, precision, lora_rank) * tokens
    stream = (4 if precision == "fp32" or (precision == "autocast" and full) else 2) * h * tokens  # a layer's input
    saved = layers * (stream if checkpointing else layer)
    logits = model.vocab * tokens  # 16-bit and fp32 ones and their log-softmax; then the fp32 ones, their log-softmax, its gradient
    cast = half * (model.linear + model.embedding if full else trained) if precision == "autocast" else 0
    live = 0
    if zero == 3:
        live = half * min(model.parameters, ZERO3_LIVE + (0 if model.tied else model.embedding))
    if engine == "fsdp":
        live = half * (2 * model.linear / layers + model.embedding * (1 if model.tied else 2))
    recomputed = layer + 3 * half * model.mlp * tokens if checkpointing else 0
    ending = 0 if zero == 3 else grads  # ZeRO-3 has their place already, or sends them to the host as they come
    reducing = 2 * min(bucket, trained) * half + 3 * head if zero in (1, 2) else head  # buckets, and what is larger than one
    stepping = 0 if offload != "none" else trained * 4 / shared  # AdamW's square roots
    grads_of_step = 0 if offload != "none" else trained * 4 / n if zero else grads + (trained * 4 if deepspeed and not fp32 else 0)
    earlier = grads if accumulate > 1 and zero < 3 and offload == "none" else 0  # of the micro-steps before
    moments_of_step = {
        "end of forward": still | {"activations": saved, "gradients": earlier, "logits": (8 if fp32 else 10) * logits, "working_copies": cast + live},
        "begin of backward": still | {"activations": saved, "gradients": earlier, "logits": 12 * logits,
                                      "working_copies": (min(cast, half * model.embedding) if checkpointing else cast) + live},
        "a layer's backward": still | {"activations": saved + recomputed, "gradients": earlier or min(grads, head), "working_copies": live},
        "end of backward": still | {"activations": recomputed or layer, "gradients": ending + reducing, "working_copies": live},
        "optimizer step": still | {"gradients": grads_of_step, "optimizer_step": stepping},
    }  # fmt: skip
    moment = max(moments_of_step, key=lambda name: sum(moments_of_step[name].values()))
    parts = moments_of_step[moment] | {"cuda_context": CONTEXT + (NCCL if n > 1 else 0)}
    per_gpu = gib({name: value for name, value in parts.items() if value or name == "weights"})

    # Each process of an offloaded optimizer pins its part of the master copy and of the fp32 gradients, and has two moments that are not
    # pinned; while it starts it also holds the model's weights once. Offloaded parameters lie there twice.
    host, disk = {"processes": HOST_PROCESS_GIB * GIB * n}, 0.0
    if offload != "none":
        part = 4 * trained / n
        master = n * pinned(part, 4e9 if zero == 3 else part)  # ZeRO-3 works on sub_group_size = 1e9 numbers at a time
        moving = {"master_copy": master, "moments": 2 * n * part, "parameters": 2 * half * trained if "param" in offload else 0}
        host |= {"gradients": master, "start": n * half * trained}
        if offload_device == "cpu":
            host |= moving
        else:
            disk = sum(moving.values())
    host_parts = gib(host)
    states = {"parameters": (frozen + trained * held) / divided, "gradients": grads * (4 / held if offload != "none" else 1), "optimizer": optimizer}
    found = {
        "fits": per_gpu["total"] <= gpu_memory_gib and (host_memory_gib is None or host_parts["total"] <= host_memory_gib),
        "per_gpu_gib": per_gpu,
        "moment": moment,
        "moments_gib": {name: round(sum(parts.values()) / GIB, 2) for name, parts in moments_of_step.items()},
        "states_gib": gib(states),
        "host_gib": round(host_parts["total"], 1),
        "host_parts_gib": host_parts,
        "trained_parameters": trained,
    }
    return found | ({"nvme_gib": round(disk / GIB, 1)} if disk else {})


def pinned(size: float, largest: float) -> float:
    """Bytes that PyTorch page-locks for `size` bytes in tensors of at most `largest`: each is rounded up to a power of two."""
    whole, rest = divmod(size, largest)
    return whole * 2 ** math.ceil(math.log2(largest)) + (2 ** math.ceil(math.log2(rest)) if rest >= 1 else 0)
