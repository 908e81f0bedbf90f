"""ZeRO from scratch: the four stages of mini_zero/ in one run, their losses, bytes and traffic.

    make mini-zero                                   # two processes, stages 0 to 3
    make mini-zero ARGS="--stages 2 3 --accumulate 2"

Look at: the losses, which no stage changes; the bytes of a parameter, which are those of DeepSpeed
(`make train-z2`); and what is sent a step, in numbers per parameter: 2 at stages 0 and 1, one more
at stage 2 for each further micro-step, 3 a micro-step at stage 3. The last step is computed once
more, by a new engine that loads what the first one saved before it: `again` differs by nothing.
Everything is computed in float32, on GPUs too: so equal is equal.
"""

import argparse
import gc
import os
import shutil

import zero_states

from lab import RUNS, data, models, results, training
from lab.profile import load_profile
from lab.table import table

STEPS = 3


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    stages = "ZeRO stages to run, one after another (default: 0 1 2 3)"
    every = [0, 1, 2, 3]
    parser.add_argument("--stages", type=int, nargs="+", choices=every, default=every, help=stages)
    offload = "let the host keep and update what stages 1 to 3 divide of the optimizer"
    parser.add_argument("--offload", action="store_true", help=offload)
    training.add_data_flags(parser, profile.train)
    training.add_step_flags(parser, profile.train, saves=False)
    parser.set_defaults(steps=STEPS)
    training.add_process_flag(parser)
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    import copy
    import itertools

    import torch
    import torch.distributed as dist
    from mini_zero import Engine, traffic  # the folder beside this script
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. The processes, the data, and one model that every stage begins with

    os.environ.update(training.ONE_PROCESS | os.environ)
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    training.refuse_alone(world, args.min_world)
    torch.manual_seed(args.seed)
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    step_blocks = world * args.accumulate * args.micro_batch
    made_of = f"{world} processes x {args.accumulate} micro-steps x {args.micro_batch}"
    blocks = training.whole_steps(blocks, step_blocks, args, made_of)
    share = DistributedSampler(blocks, shuffle=False)
    untrained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    parameters = sum(weight.numel() for weight in untrained.parameters())

    def new_engine(stage: int) -> Engine:
        model = copy.deepcopy(untrained).to(device)
        return Engine(
            model,
            stage,
            args.learning_rate,
            layers=list(model.get_decoder().layers),
            accumulate=args.accumulate,
            offload=args.offload and stage > 0,
        )

    def train_step(engine: Engine, batches, held: dict[str, int]) -> torch.Tensor:
        """The loss of one step in this process []; `held` keeps the most bytes of each kind."""
        step_loss = torch.zeros((), device=device)
        for _ in range(args.accumulate):
            batch = next(batches).to(device)  # [micro_batch, seq_len]
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            for kind, count in engine.bytes_held().items():
                held[kind] = max(held[kind], count)
            step_loss += loss.detach() / args.accumulate
        engine.step()
        return step_loss

    def over_all(step_loss: torch.Tensor) -> float:
        """Their mean, for the eye only."""
        dist.all_reduce(step_loss)
        return round(step_loss.item() / world, 6)

    def train(stage: int) -> tuple[list[float], dict[str, int], float, int, int, float]:
        """(losses, bytes held, numbers sent a step, outside, there, again) of a training.

        `outside`: numbers outside of the layers; `there`: most layers that lay there whole, both of
        stage 3. `again`: the loss of the last step by a new engine that loads the state before it.
        """
        loader = DataLoader(blocks, batch_size=args.micro_batch, sampler=share)
        engine = new_engine(stage)
        batches = data.endless(loader)
        losses = []
        held = dict.fromkeys(zero_states.FP32, 0)
        state = RUNS / "05_DeepSpeed" / f"mini_state_{stage}"
        for step in range(1, args.steps + 1):
            if step == args.steps:
                empty(state)
                engine.save_checkpoint(state)
            with traffic.counted() as sent:
                step_loss = train_step(engine, batches, held)
            losses.append(over_all(step_loss))
            if rank == 0:
                print(f"stage {stage}   step {step:3}   loss {losses[-1]:.4f}", flush=True)
        outside = engine.divided.rest.size if stage == 3 else 0
        there = engine.divided.most_there if stage == 3 else 0
        del engine  # before the next one takes its room; its hooks refer to it
        gc.collect()
        other = new_engine(stage)
        other.load_checkpoint(state)
        skipped = (args.steps - 1) * args.accumulate
        batches = itertools.islice(data.endless(loader), skipped, None)
        again = over_all(train_step(other, batches, dict(held)))
        return losses, held, sum(sent.values()), outside, there, again

    def empty(folder) -> None:
        """For all processes, made by one."""
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()

    # -----------------------------------------------------------------------------
    # 2. Stage after stage, beside DeepSpeed's theory and the arithmetic of the messages

    rows = []
    metrics = {"losses": {}, "world_size": world, "parameters_count": parameters}
    first = []
    for stage in args.stages:
        losses, held, sent, outside, there, again = train(stage)
        first = first or losses
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, first, strict=True))
        theory = zero_states.of_deepspeed(stage, world, "float32", args.accumulate, False)
        messages = messages_by_arithmetic(stage, args.accumulate, outside / parameters)
        each = {kind: held[kind] / parameters for kind in held}
        widths = [f"{each[kind]:.2f} ({theory[kind]:.2f})" for kind in held]
        sending = f"{sent / parameters:.3f} ({messages:.3f})"
        compared = [f"{losses[-1]:.6f}", f"{worst:.1e}", f"{again - losses[-1]:g}"]
        rows.append([f"stage {stage}", *widths, sending, *compared])
        metrics["losses"][f"stage {stage}"] = losses
        metrics[f"z{stage}_sent_per_parameter_ratio"] = round(sent / parameters, 4)
        metrics[f"z{stage}_sent_theory_ratio"] = round(messages, 4)
        metrics[f"z{stage}_difference_ratio"] = float(f"{worst:.2g}")
        metrics[f"z{stage}_again_difference_ratio"] = abs(again / losses[-1] - 1)
        for kind in held:
            metrics[f"z{stage}_{kind}_per_parameter_bytes"] = round(each[kind], 4)
        if stage == 3:
            metrics["z3_layers_there_count"] = there
    if rank == 0:
        kinds = ["parameters", "gradients", "optimizer"]
        print(f"\n{world} processes, {parameters:,} parameters, float32; in brackets the theory")
        columns = [f"{kind}, bytes each" for kind in kinds]
        table(
            ["", *columns, "sent a step, each", "last loss", "differs from the first", "again"],
            rows,
        )
        results.picture(__file__, "who_holds_what", draw(metrics, args.stages, world))
        results.finish(__file__, metrics, vars(args))
    dist.destroy_process_group()


def messages_by_arithmetic(stage: int, accumulate: int, outside: float) -> float:
    """Numbers sent a step per parameter (arXiv 1910.02054, section 7).

    `outside`: the share of the parameters outside of the layers, which stage 3 gathers once a
    micro-step and not twice.
    """
    if stage < 2:
        return 2
    if stage == 2:
        return accumulate + 1
    return (3 - outside) * accumulate


def draw(metrics: dict, stages: list[int], world: int):
    """The figure: what each process holds at each stage, a layer of the bar for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    bars = [(stage, rank) for stage in stages for rank in range(world)]
    places = [i + 0.6 * (i // world) for i in range(len(bars))]  # a gap between the stages
    below = [0.0] * len(bars)
    for kind in zero_states.FP32:
        heights = [metrics[f"z{stage}_{kind}_per_parameter_bytes"] for stage, _ in bars]
        drawn = ax.bar(places, heights, 0.9, bottom=below, label=kind, edgecolor="white")
        ax.bar_label(drawn, fmt="%g", label_type="center", color="white")
        below = [bottom + height for bottom, height in zip(below, heights, strict=True)]
    names = [f"stage {stage}\nprocess {rank}" for stage, rank in bars]
    ax.set_xticks(places, names, fontsize=8)
    ax.set(ylabel="bytes per parameter (float32)")
    ax.set_title("The higher the stage, the less each process keeps of what all have")
    ax.legend(loc="upper right", ncols=3)
    ax.set_ylim(0, 1.15 * max(below))
    return fig


if __name__ == "__main__":
    main()
