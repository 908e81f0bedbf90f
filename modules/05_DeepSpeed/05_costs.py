"""What messages cost: collectives measured, the alpha-beta model fitted, a step to 1,024 processes.

    make train-costs                                   # two processes
    make train-costs ARGS="--accumulate 8"
    make train-costs PROCESSES=4 ARGS="--model qwen2.5-7b-instruct --no-steps"

Look at: the errors of the line on the sizes that did not make it; and the picture. Its points are
the messages of a whole training step, really sent here; its lines are the same messages by the
formula, over more processes than you have. Nothing is trained, and no model is loaded: its shape
decides what is sent. A ring of 1,024 is a thought: real clusters send over trees and in two levels,
inside a machine and between machines.
"""

import argparse
import functools
import os
import statistics
import time

import alpha_beta
import costs_pictures
from alpha_beta import Line, Message, Point, Shape

from lab import fail, jobs, models, results, training
from lab.planner import weights
from lab.planner.config import read
from lab.profile import load_profile
from lab.table import table

KIB = 2**10
SIZES = [4 * KIB * 4**step for step in range(9)]  # 4 KiB to 256 MiB
LONGEST = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
REPEATS = {"collective": 5, "step": 3}  # of which the median counts
PROCESSES = [2**power for power in range(1, 11)]  # 2 to 1,024
BUCKET_BYTES = 25 * 2**20  # DDP's bucket_cap_mb


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    model = f"name in configs/models.yaml, or a config.json (default: {profile.zero.model})"
    parser.add_argument("--model", default=profile.zero.model, help=model)
    training.add_flag(parser, "--seq-len", int, profile.train.seq_len, "tokens of a block")
    training.add_flag(parser, "--micro-batch", int, profile.train.micro_batch, "blocks at a time")
    training.add_flag(parser, "--accumulate", int, 2, "micro-steps of a step")
    no_steps = "measure only the collectives, not whole steps"
    parser.add_argument("--no-steps", action="store_true", help=no_steps)
    args = parser.parse_args()
    if min(args.seq_len, args.micro_batch, args.accumulate) < 1:
        fail("--seq-len, --micro-batch and --accumulate must be at least 1")
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2:
        fail("messages need at least 2 processes, here is 1: make train-costs, without PROCESSES=1")
    jobs.refuse_taken_cards()
    width = 4 if profile.train.dtype == "float32" else 2  # bytes of a number that is sent
    shape = shape_of(args, width)

    import torch
    import torch.distributed as dist

    # -----------------------------------------------------------------------------
    # 1. The processes, and one tensor that is long enough for every message

    device = torch.device(profile.device, int(os.environ["LOCAL_RANK"]))
    torch.get_device_module(device).set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ways = alpha_beta.ways(shape)
    sizes = [size for size in SIZES if size <= LONGEST[device.type]]
    longest = max(message.numbers * width for way in ways.values() for message in way)
    floats = int(max(longest, sizes[-1]) // 4) + world  # float32: every backend adds it
    whole = torch.zeros(floats, device=device)
    part = torch.zeros(-(-floats // world), device=device)

    def send(kind: str, size: float) -> None:
        """One message of `size` bytes."""
        each = max(1, round(size / 4 / world))  # numbers of each process's part
        if kind == "all_reduce":
            dist.all_reduce(whole[: each * world])
        elif kind == "reduce_scatter":
            dist.reduce_scatter_tensor(part[:each], whole[: each * world])
        elif kind == "all_gather":
            dist.all_gather_into_tensor(whole[: each * world], part[:each])
        elif rank % 2:
            dist.recv(whole[: each * world], src=rank - 1)
        elif rank + 1 < world:
            dist.send(whole[: each * world], dst=rank + 1)

    def seconds(work, times: int, repeats: int) -> float:
        """Of one `work()` out of `times` in a row, on the slowest process."""
        took = []
        for repeat in range(1 + repeats):  # the first one warms up
            torch.get_device_module(device).synchronize()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(times):
                work()
            torch.get_device_module(device).synchronize()
            if repeat:
                took.append((time.perf_counter() - began) / times)
        slowest = torch.tensor(statistics.median(took), device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    # -----------------------------------------------------------------------------
    # 2. Every collective at every size; every second size makes the line, the others check it

    measured: dict[str, list[Point]] = {}
    for kind in alpha_beta.TRIPS:
        measured[kind] = []
        for size in sizes:
            work = functools.partial(send, kind, size)
            times = max(2, min(50, 2**24 // size))
            took = seconds(work, times, REPEATS["collective"])
            measured[kind].append(Point(size, took))
    lines = {kind: alpha_beta.fit(kind, points[::2], world) for kind, points in measured.items()}
    lines["send"] = lines["all_gather"]  # one step of its ring is such a message

    # -----------------------------------------------------------------------------
    # 3. The messages of a whole step of each way, really sent, and by the formula

    def play(messages: list[Message]) -> None:
        for message in messages:
            for _ in range(int(message.times)):
                send(message.kind, message.numbers * width)

    played = {}
    for name, messages in ways.items():
        if not args.no_steps:
            played[name] = seconds(functools.partial(play, messages), 1, REPEATS["step"])
    if rank == 0:
        metrics = {"world_size": world, "parameters_count": int(shape.parameters)}
        metrics |= show_collectives(measured, lines, world)
        metrics |= show_steps(ways, played, lines, width, world)
        figure = costs_pictures.costs(measured, lines, ways, played, width, world, PROCESSES)
        results.picture(__file__, "costs", figure)
        results.picture(__file__, "collectives", costs_pictures.collectives())
        results.finish(__file__, metrics, vars(args) | {"sent_bytes": width})
    dist.destroy_process_group()


def shape_of(args, width: int) -> Shape:
    """What of the model decides the messages; its config.json is enough."""
    model = read(models.config(args.model), args.model)
    return Shape(
        parameters=weights.parameters(model),
        outside=weights.embeddings(model) + model.hidden,  # and the last norm
        layers=model.layers,
        hidden=model.hidden,
        tokens=args.micro_batch * args.seq_len,
        accumulate=args.accumulate,
        bucket=BUCKET_BYTES // width,
    )


def show_collectives(
    measured: dict[str, list[Point]], lines: dict[str, Line], world: int
) -> dict[str, float]:
    """The table of sizes, and the metrics: each line, and its errors where it was not fitted."""
    rows = []
    metrics = {}
    for kind, points in measured.items():
        line = lines[kind]
        errors = []
        for place, point in enumerate(points):
            predicted = alpha_beta.ring(kind, point.size, world, line)
            error = predicted / point.seconds - 1
            use = "check" if place % 2 else "fit"
            errors += [abs(error)] * (use == "check")
            bus = alpha_beta.bus_bandwidth(kind, point, world)
            times = [f"{1e6 * point.seconds:,.0f}", f"{1e6 * predicted:,.0f}", f"{error:+.0%}"]
            rows.append([kind, f"{point.size // KIB:,}", *times, f"{bus / 1e9:.2f}", use])
        metrics[f"{kind}_alpha_us"] = 1e6 * line.alpha
        metrics[f"{kind}_link_gb_per_s"] = 1e-9 / line.beta
        metrics[f"{kind}_bus_gb_per_s"] = bus / 1e9  # of the longest message
        metrics[f"{kind}_check_error_ratio"] = statistics.median(errors)
        metrics[f"{kind}_worst_error_ratio"] = max(errors)
    longest = {kind: points[-1].seconds for kind, points in measured.items()}
    both = longest["reduce_scatter"] + longest["all_gather"]
    metrics["all_reduce_over_both_halves_ratio"] = longest["all_reduce"] / both
    print(f"{world} processes; alpha + beta * size, fitted on every second size")
    table(["", "KiB", "measured, us", "line, us", "error", "bus, GB/s", "for"], rows)
    return metrics


def show_steps(
    ways: dict[str, list[Message]],
    played: dict[str, float],
    lines: dict[str, Line],
    width: int,
    world: int,
) -> dict[str, float]:
    """The table of a step's messages, and its metrics."""
    psi = alpha_beta.sent(ways["DDP"]) / 2
    shown_at = (2, 8, 64, 1024)
    rows = []
    metrics = {}
    for name, messages in ways.items():
        key = name.split(",")[0].lower().replace("-", "_").replace(" ", "_")
        row = [name, f"{alpha_beta.sent(messages) / psi:.3f}", ""]
        metrics[f"{key}_sent_per_parameter_ratio"] = alpha_beta.sent(messages) / psi
        predicted = alpha_beta.step_seconds(messages, world, width, lines)
        metrics[f"{key}_step_predicted_ms"] = 1e3 * predicted
        if name in played:
            row[-1] = f"{1e3 * played[name]:,.1f} ({1e3 * predicted:,.1f})"
            metrics[f"{key}_step_ms"] = 1e3 * played[name]
            metrics[f"{key}_predicted_over_measured_ratio"] = predicted / played[name]
        for n in shown_at:
            ms = 1e3 * alpha_beta.step_seconds(messages, n, width, lines)
            row.append(f"{ms:,.1f}")
            metrics[f"{key}_step_at_{n}_ms"] = ms
        rows.append(row)
    at_n = [f"ms at {n}" for n in shown_at]
    print(f"\na step's messages, {width} bytes a number; predicted but for what was sent here")
    columns = ["", "sent per parameter", f"ms here, {world} (by the line)"]
    table([*columns, *at_n], rows)
    return metrics


if __name__ == "__main__":
    main()
