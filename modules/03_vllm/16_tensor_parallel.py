"""Tensor parallelism from scratch (Megatron-LM, arXiv 1909.08053): matrices over two processes.

    make mini-tp                                        # by torchrun: gloo on CPUs, NCCL on GPUs
    make mini-tp ARGS="--model qwen2.5-0.5b-instruct"   # a real model whose heads can be divided

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
    """Process `rank`'s part of the weights.

    A weight is [outputs, inputs] and a bias [outputs]; heads stand one behind another in them.
    """
    part = {}
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        if kind in COLUMN:
            tensor = tensor.chunk(world, dim=0)[rank].contiguous()
        elif kind in ROW:
            tensor = tensor.chunk(world, dim=1)[rank].contiguous()
        part[name] = tensor
    return part


class Reduce:
    """What a layer says to the other processes, after o and after down, and how often."""

    def __init__(self):
        self.calls = 0
        self.sent = 0  # bytes

    def __call__(self, x):
        """The sum of all processes' `x` [T, hidden], in every process."""
        import torch.distributed as dist

        self.calls += 1
        self.sent += x.numel() * x.element_size()
        dist.all_reduce(x)
        return x


def attend(layer: int, q, k, v):
    """Causal attention over this process's heads: no cache is needed for one pass.

    q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads * D]
    """
    import torch.nn.functional as F

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # each [1, heads, T, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--model",
        help="name in configs/models.yaml, hub id or folder "
        "(default: a small Qwen2 with random weights)",
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
    from mini_vllm.model import Model, read_config, read_weights

    # -----------------------------------------------------------------------------
    # 1. Who am I, and which part of the model is mine

    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if profile.device == "cuda":
        refuse_too_few_cards(torch.cuda.device_count())
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = models.model_folder(args.model) if args.model else random_model(temporary)
        try:
            config = read_config(folder)
            weights = read_weights(folder, device, torch.float32)
        except ValueError as e:
            fail(str(e))
    # Not before: in a group, newer transformers save in one process only.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    refuse_indivisible(config, world)

    part = shard(weights, rank, world)
    in_part = sum(tensor.numel() for tensor in part.values())
    held = in_part / sum(tensor.numel() for tensor in weights.values())
    reduce = Reduce()
    mine = Model(config, part, reduce)
    whole = Model(config, weights)

    # -----------------------------------------------------------------------------
    # 2. The same prompt through the divided model and, in every process, through the whole one

    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(config["vocab_size"], (args.tokens,), generator=generator).to(device)
    positions = torch.arange(args.tokens, device=device)
    with torch.inference_mode():
        divided = mine.forward(token_ids, positions, attend)  # [T, vocabulary]
        expected = whole.forward(token_ids, positions, attend)
    largest = expected.abs().max()
    difference = (divided - expected).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)

    # -----------------------------------------------------------------------------
    # 3. What it costs. A ring all-reduce sends 2 (n-1)/n of the message from each process.

    layers = config["num_hidden_layers"]
    message = reduce.sent / args.tokens
    wire = message * 2 * (world - 1) / world
    assert reduce.calls == 2 * layers
    assert message == 2 * layers * config["hidden_size"] * 4
    assert difference < 1e-3 * largest, f"the logits differ by {difference}"
    if rank == 0:
        heads = config["num_attention_heads"]
        kv_heads = config["num_key_value_heads"]
        q_part = f"{heads // world} of {heads} heads"
        kv_part = f"{kv_heads // world} of {kv_heads} KV heads"
        print(f"{world} x {device.type}, each with {q_part}, {kv_part}, {held:.0%} of the weights")
        compared = f"largest difference {difference:.1e}, logits up to {largest:.1f}"
        print(f"logits {list(divided.shape)} of {world} processes and of one: {compared}")
        cost = f"{message:.0f} bytes a token reduced (fp32), {wire:.0f} sent by each process"
        print(f"{reduce.calls} all-reduces = 2 x {layers} layers; {cost}")
        metrics = {
            "world_size": world,
            "logits_max_difference_ratio": float(f"{difference / largest:.2g}"),
            "weights_held_ratio": round(held, 3),
            "all_reduce_count": reduce.calls,
            "reduced_per_token_bytes": message,
            "sent_per_token_bytes": wire,
        }
        results.finish(__file__, metrics, vars(args) | {"model": args.model or "random Qwen2"})
    dist.destroy_process_group()


def refuse_too_few_cards(cards: int) -> None:
    """Exit code 2 where two processes of this machine would share a card."""
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if here > cards:
        need = f"{here} processes need a GPU each, {cards} can be seen"
        fail(f"{need}: start fewer with PROCESSES={cards}")


def refuse_indivisible(config: dict, world: int) -> None:
    """Exit code 2 where the processes cannot have equal parts."""
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    intermediate = config["intermediate_size"]
    of_an_expert = config.get("moe_intermediate_size") or 0
    if any(number % world for number in (heads, kv_heads, intermediate, of_an_expert)):
        sizes = f"{heads} heads, {kv_heads} KV heads and {intermediate} intermediate numbers"
        fail(f"{sizes} cannot all be divided by {world} processes")


def random_model(folder: str) -> Path:
    """A small Qwen2 with random weights.

    Its 4 heads and 2 KV heads can be divided by two; SmolLM2's 9 and 3 cannot.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)  # the same weights in every process
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # as they come they are 0, and a wrong one would not be seen
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    main()
