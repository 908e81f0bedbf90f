"""Tensor parallelism from scratch (Megatron-LM, arXiv 1909.08053): every layer's matrices divided
over two processes.

    make mini-tp                                          # two processes by torchrun: gloo on CPUs, NCCL on GPUs
    make mini-tp ARGS="--model qwen2.5-0.5b-instruct"     # a real model whose heads can be divided

Column-parallel: a process has some of the matrix's outputs (q, k, v, gate, up) and needs nobody to
compute them. Row-parallel: it has some of the inputs (o, down), and the processes' results are
summed (all-reduce). A column-parallel matrix before a row-parallel one fits without a word between
them, so a layer speaks twice: after o and after down. The model is mini_vllm's own, which does not
know more of all this than that it calls `reduce` at these two places. Embedding and lm_head stay
whole here; vLLM divides them too.
Look at: the logits of two processes beside those of one, the weights each process holds, and the
bytes a token costs on the wire.
"""

import argparse
import os
import tempfile
from pathlib import Path

from lab import fail, jobs, models, results
from lab.profile import load_profile

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


def shard(weights: dict, rank: int, world: int) -> dict:
    """Process `rank`'s part of the weights. A weight is [outputs, inputs] and a bias [outputs];
    heads stand one behind another in them.
    """
    part = {}
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        dim = 0 if kind in COLUMN else 1 if kind in ROW else None
        part[name] = tensor if dim is None else tensor.chunk(world, dim)[rank].contiguous()
    return part


def random_model(folder: str) -> Path:
    """A small Qwen2 with random weights: 4 heads and 2 KV heads can be divided by two; SmolLM2's 9
    and 3 cannot.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)  # the same weights in every process
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=2048, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(
                parameter
            )  # as they come they are 0, and a wrong one would not be seen
    model.save_pretrained(folder)
    return Path(folder)


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        help="name in configs/models.yaml, hub id or folder (default: a small Qwen2 with random weights)",
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="of the prompt (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.tokens < 1:
        fail("--tokens must be positive")
    if "RANK" not in os.environ:
        fail("this script runs as several processes, which torchrun starts: use 'make mini-tp'")
    jobs.refuse_taken_cards()

    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from mini_vllm.model import Model, read_config, read_weights

    # -----------------------------------------------------------------------------
    # 1. Who am I, and which part of the model is mine

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if profile.device == "cuda"
        else torch.device("cpu")
    )
    if device.type == "cuda":
        if (here := int(os.environ["LOCAL_WORLD_SIZE"])) > torch.cuda.device_count():
            fail(
                f"{here} processes need a GPU each, {torch.cuda.device_count()} can be seen: start fewer with PROCESSES={torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = models.model_folder(args.model) if args.model else random_model(temporary)
        try:
            config = read_config(folder)
            weights = read_weights(folder, device, torch.float32)
        except ValueError as e:
            fail(str(e))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo"
    )  # not before: in a group, newer transformers save in one process only
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % world or kv_heads % world or config["intermediate_size"] % world:
        fail(
            f"{heads} heads, {kv_heads} KV heads and {config['intermediate_size']} intermediate numbers cannot all be divided by {world} processes"
        )

    sent = {"count": 0, "bytes": 0}

    def reduce(x: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' `x` [T, hidden], in every process."""
        sent["count"] += 1
        sent["bytes"] += x.numel() * x.element_size()
        dist.all_reduce(x)
        return x

    part = shard(weights, rank, world)
    held = sum(t.numel() for t in part.values()) / sum(t.numel() for t in weights.values())
    mine = Model(config, part, reduce)

    # -----------------------------------------------------------------------------
    # 2. The same prompt through the divided model and, in every process, through the whole one

    def attend(
        layer, q, k, v
    ):  # causal, over this process's heads: no cache is needed for one pass
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
            .transpose(0, 1)
            .flatten(1)
        )

    token_ids = torch.randint(
        config["vocab_size"], (args.tokens,), generator=torch.Generator().manual_seed(1)
    ).to(device)
    positions = torch.arange(args.tokens, device=device)
    with torch.inference_mode():
        divided = mine.forward(token_ids, positions, attend)
        whole = Model(config, weights).forward(token_ids, positions, attend)
    difference = (divided - whole).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)

    # -----------------------------------------------------------------------------
    # 3. What it costs. A ring all-reduce sends 2 (n-1)/n of the message from each process.

    message, layers = sent["bytes"] / args.tokens, config["num_hidden_layers"]
    wire = message * 2 * (world - 1) / world
    assert sent["count"] == 2 * layers and message == 2 * layers * config["hidden_size"] * 4
    assert difference < 1e-3 * whole.abs().max(), f"the logits differ by {difference}"
    if rank == 0:
        print(
            f"{world} x {device.type}, each with {heads // world} of {heads} heads, {kv_heads // world} of {kv_heads} KV heads, {held:.0%} of the weights"
        )
        print(
            f"logits {list(divided.shape)} of {world} processes and of one: largest difference {difference:.1e}, logits up to {whole.abs().max():.1f}"
        )
        print(
            f"{sent['count']} all-reduces = 2 x {layers} layers; {message:.0f} bytes a token reduced (fp32), {wire:.0f} sent by each process"
        )
        metrics = {
            "world_size": world,
            "logits_max_difference_ratio": float(f"{difference / whole.abs().max():.2g}"),
            "weights_held_ratio": round(held, 3),
        }
        metrics |= {
            "all_reduce_count": sent["count"],
            "reduced_per_token_bytes": message,
            "sent_per_token_bytes": wire,
        }
        results.finish(__file__, metrics, vars(args) | {"model": args.model or "random Qwen2"})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
