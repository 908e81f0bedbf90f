"""Four more ways to divide a training, from scratch: each beside one process, loss by loss.

    make mini-parallel                                # all four, on two processes
    make mini-parallel ARGS="tensor ring"             # some of them
    make mini-parallel ARGS="--optimizer sgd --learning-rate 0.3"
    PROFILE=cpu make mini-parallel PROCESSES=4        # pipeline x data, and a pipeline of 4 stages

Look at: the losses, which no division changes; the parameters that a process holds; and what all
processes send in a step, in numbers, beside the arithmetic. The models are small and random, but
real (Qwen3, Qwen3-MoE); the text counts in steps of 1 to 8; everything is computed in float32.
"""

import argparse
import math
import os
from collections import Counter
from functools import partial

import parallel_sums

from lab import fail, results, training
from lab.profile import load_profile
from lab.table import table

WAYS = ["pipeline", "tensor", "ring", "experts"]


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)} (default: all)")
    training.add_flag(parser, "--steps", int, 6, "how many optimizer steps to train")
    training.add_flag(parser, "--batch", int, 16, "sequences of a step, over all processes")
    training.add_flag(parser, "--micro-batches", int, 8, "into which a pipeline divides its batch")
    training.add_flag(parser, "--seq-len", int, 64, "tokens of a sequence")
    optimizer = "sgd sees a gradient of a wrong length, adamw does not (default: adamw)"
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help=optimizer)
    training.add_flag(parser, "--learning-rate", float, 3e-3, "the same at every step")
    training.add_flag(parser, "--seed", int, 0, "seed of the models' weights and of the text")
    training.add_process_flag(parser)
    args = parser.parse_args()
    args.ways = args.ways or WAYS
    refuse(args, profile.device)

    import torch
    import torch.distributed as dist
    from mini_parallel import ContextParallel, ExpertParallel, Pipeline, TensorParallel, schedule
    from mini_zero import traffic  # both are folders beside this script

    # -----------------------------------------------------------------------------
    # 1. The processes, and an engine for each way

    os.environ.update(training.ONE_PROCESS | os.environ)
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    engines = {}
    for stages in sorted({2, world}):
        for order in schedule.SCHEDULES:
            pipeline = partial(Pipeline, stages=stages, micro_batches=args.micro_batches)
            name = f"pipeline {order} {stages}x{world // stages}"
            engines[name] = partial(pipeline, schedule=order)
    engines |= {"tensor": TensorParallel, "ring": ContextParallel, "experts": ExpertParallel}

    def everyones(value) -> list:
        values: list = [None] * world
        dist.all_gather_object(values, value)
        return values

    # -----------------------------------------------------------------------------
    # 2. One training, by whatever engine

    optimizers = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}

    def train(engine) -> tuple[list[float], dict[str, int]]:
        """(losses, {collective: numbers that all processes send in a step})"""
        optimizer = optimizers[args.optimizer](engine.module.parameters(), lr=args.learning_rate)
        losses = []
        for step in range(args.steps):
            batch = counting(args, step).to(device)  # [batch, seq_len]
            optimizer.zero_grad()
            with traffic.counted() as sent:
                loss = engine.forward_backward(batch)  # this process's share of it
            optimizer.step()
            dist.all_reduce(loss)  # for the eye only, and not counted
            losses.append(loss.item())
        return losses, dict(sum(everyones(sent), start=Counter()))

    # -----------------------------------------------------------------------------
    # 3. Way after way, beside one process that has the whole model and the whole batch

    rows = []
    remarks = []
    metrics = {"losses": {}, "world_size": world}
    alone = {}  # {kind of model: losses of one process}
    orders = {}  # {schedule: what each stage did, in order}
    for name, make_engine in engines.items():
        way = name.split()[0]
        if way not in args.ways:
            continue
        kind = "qwen3_moe" if way == "experts" else "qwen3"
        if kind not in alone:
            whole = Alone(random_model(kind, args.seed).to(device), world)
            alone[kind] = train(whole)[0]
            metrics["losses"][kind] = alone[kind]
            held = bytes_of(whole)
            metrics[f"{kind}_parameters_bytes"] = held
            rows.append([f"{kind}, one process", f"{held:,}", "", "", f"{alone[kind][-1]:.6f}", ""])
        model = random_model(kind, args.seed).to(device)
        config = model.config
        engine = make_engine(model)
        losses, sent = train(engine)
        shape = (world, args.batch, args.seq_len, args.micro_batches)
        theory = parallel_sums.sent(name, config, *shape)
        pairs = zip(losses, alone[kind], strict=True)
        difference = max(abs(loss - expected) / expected for loss, expected in pairs)
        held = max(everyones(bytes_of(engine)))
        numbers = [f"{held:,}", f"{sum(sent.values()):,}", f"{sum(theory.values()):,}"]
        rows.append([name, *numbers, f"{losses[-1]:.6f}", f"{difference:.1e}"])

        key = name.replace(" ", "_")
        metrics["losses"][key] = losses
        metrics[f"{key}_parameters_bytes"] = held
        metrics[f"{key}_difference_ratio"] = float(f"{difference:.2g}")
        for collective in sent | theory:
            metrics[f"{key}_{collective}_count"] = sent.get(collective, 0)
            metrics[f"{key}_{collective}_theory_count"] = theory.get(collective, 0)
        if way == "pipeline":
            stages = engine.stages
            kept = everyones(engine.most_kept)[:stages]
            metrics[f"{key}_kept_by_stage_count"] = kept
            order = orders[name.split()[1]] = everyones(engine.actions)[:stages]
            idle = schedule.bubble(schedule.timeline(order))
            metrics[f"{key}_bubble_ratio"] = round(idle, 4)
            in_theory = (stages - 1) / (args.micro_batches + stages - 1)
            metrics[f"{key}_bubble_theory_ratio"] = round(in_theory, 4)
            waits = f"waits {idle:.1%} of the time ({in_theory:.1%} by arithmetic)"
            remarks.append(f"{name}: keeps {kept} micro-batches by stage, {waits}")
        elif way == "ring":
            attended = everyones(engine.ring.pairs)
            busiest = max(attended) * world / sum(attended)
            metrics["ring_busiest_to_mean_ratio"] = round(busiest, 4)
            remarks.append(f"ring: the last process attends to {busiest:.2f} x the mean's pairs")

    if rank == 0:
        print(f"{world} processes, {args.steps} steps of {args.optimizer}, float32")
        columns = ["parameters, bytes each", "sent a step, all", "by arithmetic"]
        table(["", *columns, "last loss", "differs from one process"], rows)
        print("", *remarks, sep="\n")
        if orders:
            bars = {}
            for name, order in orders.items():
                kept = [schedule.most_kept(stage) for stage in order]
                title = f"{name.upper()}: activations kept by stage {kept}"
                bars[title] = schedule.timeline(order)
            results.picture(__file__, f"pipeline_bubbles_{world}", draw(bars))
        results.finish(__file__, metrics, vars(args), "" if world == 2 else str(world))
    dist.destroy_process_group()


class Alone:
    """An engine that divides nothing: the same in every process."""

    def __init__(self, model, world: int):
        self.module = model
        self.world = world

    def forward_backward(self, input_ids):
        loss = self.module(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        return loss.detach() / self.world


def bytes_of(engine) -> int:
    return sum(weight.nbytes for weight in engine.module.parameters())


# -----------------------------------------------------------------------------
# Models, text, refusals


def random_model(kind: str, seed: int):
    """A Qwen3 of four layers, or one with eight experts a layer; tied, as the small ones are.

    Its weights are larger than Qwen's at the start, so that every part of it can be seen in the
    loss.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=True,
        experts_implementation="eager",
        initializer_range=0.08,
    )
    if kind == "qwen3_moe":
        moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        config.update(moe | {"norm_topk_prob": True})
    torch.manual_seed(seed)  # the same weights in every process
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def counting(args, step: int):
    """The batch of a step [batch, seq_len]: each row counts from somewhere in steps of 1 to 8."""
    import torch

    generator = torch.Generator().manual_seed(1000 * args.seed + step)
    start = torch.randint(512, (args.batch, 1), generator=generator)
    stride = torch.randint(1, 9, (args.batch, 1), generator=generator)
    return (start + stride * torch.arange(args.seq_len)) % 512


def refuse(args, device: str) -> None:
    """Exit code 2 where the work cannot be divided evenly."""
    if "RANK" not in os.environ:
        fail("this runs as several processes, which torchrun starts: use 'make mini-parallel'")
    unknown = set(args.ways) - set(WAYS)
    if unknown:
        fail(f"there is no way {', '.join(sorted(unknown))}: choose of {', '.join(WAYS)}")
    if min(args.batch, args.micro_batches) < 1:
        fail("--batch and --micro-batches must be positive")
    training.refuse_impossible(args, device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    training.refuse_alone(world, max(2, args.min_world))
    if world not in (2, 4):
        fail(f"4 layers and 4 KV heads are not divided by {world}: take PROCESSES=2 or 4")
    whole = math.lcm(args.micro_batches * world // 2, world)
    if args.batch % whole or args.seq_len % world:
        fail(
            f"--batch must be a multiple of {whole} (of the processes, and of micro-batches x "
            f"replicas), --seq-len of {world} (processes)"
        )


# -----------------------------------------------------------------------------
# The figure


def draw(bars: dict[str, list[list[tuple]]]):
    """What each stage did and when it waited, F as 1 and B as 2: a row of axes for each order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"F": "#4c78a8", "B": "#f58518", "waiting": "#eeeeee"}
    fig, axes = plt.subplots(len(bars), 1, figsize=(9, 5), sharex=True, layout="constrained")
    for ax, (title, stages) in zip(axes, bars.items(), strict=True):
        for stage, done in enumerate(stages):
            for kind, i, begin, end in done:
                ax.barh(stage, end - begin, 0.9, begin, color=colours[kind], edgecolor="white")
                ax.text((begin + end) / 2, stage, i, ha="center", va="center", color="white")
        ax.set_yticks(range(len(stages)), [f"stage {stage}" for stage in range(len(stages))])
        ax.invert_yaxis()
        ax.set_facecolor(colours["waiting"])
        ax.set_title(title, loc="left")
        ax.set_xlim(0, max(done[-1][3] for done in stages))
    names = {"F": "forward", "B": "backward", "waiting": "waiting"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=colours[kind]) for kind in names]
    fig.legend(patches, names.values(), loc="outside upper right", ncols=3)
    axes[-1].set_xlabel("time (forward of a micro-batch: 1, backward: 2)")
    return fig


if __name__ == "__main__":
    main()
