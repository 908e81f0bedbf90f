"""What the training scripts of modules 04 and 05 share and do not teach: flags, and refusals."""

import os
from pathlib import Path

from lab import checkpoints, fail, jobs, machine, models

# What torchrun sets for each process that it starts, for a script that nobody launched.
ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}

# -----------------------------------------------------------------------------
# Flags


def add_flag(parser, name: str, kind: type, value, meaning: str, left_to: str = "") -> None:
    """One flag with its default in the help; `left_to` says who decides where it is not given."""
    default = None if left_to else value
    parser.add_argument(
        name, type=kind, default=default, help=f"{meaning} (default: {left_to}{value})"
    )


def add_data_flags(parser, train, model_left_to: str = "") -> None:
    """--model, --data, --seq-len with the defaults of `train`, the profile's.

    `model_left_to` says who decides about the model where it is not given.
    """
    meaning = models.MODEL_FLAG
    add_flag(parser, "--model", str, "" if model_left_to else train.model, meaning, model_left_to)
    add_flag(parser, "--data", str, train.data, "name of a data set, or a .json file of chat rows")
    add_flag(parser, "--seq-len", int, train.seq_len, "tokens of a block of training text")


def add_step_flags(parser, train, file_decides: bool = False, saves: bool = True) -> None:
    """--steps, --micro-batch, --accumulate, --learning-rate, --seed, and --save if it `saves`.

    `file_decides`: a configuration file may fix the batch and the learning rate; these flags are
    None where they are not given.
    """
    file = "the file's, else " if file_decides else ""
    add_flag(parser, "--steps", int, train.steps, "how many optimizer steps to train")
    micro_batch = "blocks that one process reads in a micro-step"
    add_flag(parser, "--micro-batch", int, train.micro_batch, micro_batch, file)
    accumulate = "micro-steps whose gradients make one optimizer step"
    add_flag(parser, "--accumulate", int, train.accumulate, accumulate, file)
    rate = "learning rate of AdamW, the same at every step"
    add_flag(parser, "--learning-rate", float, train.learning_rate, rate, file)
    add_flag(parser, "--seed", int, 0, "seed of whatever is random in the model, such as dropout")
    save = "folder in which to leave the trained model (default: it is not kept)"
    if saves:
        parser.add_argument("--save", metavar="FOLDER", help=save)


def add_precision_flag(parser, train) -> None:
    """--mixed-precision, by default the profile's."""
    parser.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="bf16" if train.dtype == "bfloat16" else "no",
        help="type in which matrix products are computed (default: %(default)s)",
    )


def add_process_flag(parser) -> None:
    """--min-world, which the make targets of several processes set."""
    least = "refuse to run on fewer processes than this (default: %(default)s)"
    parser.add_argument("--min-world", type=int, default=1, metavar="N", help=least)


def flags_of(args) -> list[str]:
    """The flags of a training as they were given here, for the scripts that all take them."""
    names = (
        "model",
        "data",
        "seq_len",
        "steps",
        "micro_batch",
        "accumulate",
        "learning_rate",
        "seed",
    )
    flags = []
    for name in names:
        flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return flags


def add_timeout_flag(parser) -> None:
    """--timeout, after which a process gives up the others."""
    patience = "seconds in which the other processes must answer, a save included"
    add_flag(parser, "--timeout", int, 600, patience)


# -----------------------------------------------------------------------------
# Refusals: exit code 2, one sentence


def refuse_impossible(args, device: str) -> None:
    """Where the flags ask for no training, a server holds the cards, or there are too few of them.

    --save's folder is made now, not when the training is done.
    """
    given = vars(args)
    names = ("steps", "micro_batch", "accumulate", "learning_rate", "timeout")
    numbers = [given[name] for name in names if given.get(name) is not None]
    if not all(number > 0 for number in numbers) or args.seq_len < 2:  # NaN is not above 0
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names if name in given)
        fail(f"{flags} must be positive, --seq-len at least 2")
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    cards = len(machine.gpus())
    if device == "cuda" and int(processes) > cards:
        fail(
            f"{processes} processes need a GPU each, {cards} can be seen: start fewer with "
            f"PROCESSES={cards}, or with the launcher's own flag"
        )
    jobs.refuse_taken_cards()
    if "checkpoints" in given:
        checkpoints.refuse_impossible(args)
    if not given.get("save"):
        return
    try:
        Path(args.save).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot save to {args.save}: {e.strerror}")


def refuse_alone(world: int, least: int) -> None:
    """Where fewer processes run than were to share the work."""
    if world < least:
        fail(
            f"{world} process is running, where at least {least} were to share the work: leave "
            "PROCESSES out to start 2, or use python"
        )


def refuse_without_bf16(device, way_out: str) -> None:
    """Where bf16 is asked for and this GPU computes it only by emulation."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail(f"{torch.cuda.get_device_name()} does not compute in bf16: {way_out}")


def whole_steps(blocks, step_blocks: int, args, made_of: str):
    """`blocks` [blocks, seq_len] without those at the end that make no whole optimizer step.

    The data set then begins anew at the same place in every process.
    """
    if len(blocks) < step_blocks:
        fail(
            f"one step needs {step_blocks} blocks ({made_of}), {args.data} has {len(blocks)} of "
            f"{args.seq_len} tokens: lower --micro-batch, --accumulate or --seq-len"
        )
    return blocks[: len(blocks) // step_blocks * step_blocks]


def keep_fsdp_on_cpu(device: str) -> None:
    """Let Accelerate 1.11 shard on CPUs where the launcher's YAML says FSDP.

    It leaves FSDP out, without a word, where it sees CPU processes; torch's FSDP2 runs on both.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and device == "cpu":
        from accelerate import DistributedType, PartialState

        PartialState().distributed_type = DistributedType.MULTI_GPU


def forget_shared_memory(rank: int) -> None:
    """Take the name away from the 66 MiB that each process has opened on a CPU.

    DeepSpeed leaves them behind.
    """
    import torch.distributed as dist

    dist.barrier()
    meeting = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{meeting}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Measuring


def variant(world: int, wrapper: str) -> str:
    """Which record of a script a training makes, by its processes and what wraps the model."""
    if world == 1:
        return "one"
    return {"DistributedDataParallel": "", "DeepSpeedEngine": "deepspeed"}.get(wrapper, "fsdp")


def peak_memory_gib(device: str) -> float:
    """The most memory this process has held: of the GPU, or on a CPU of the host."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timeout(args):
    """--timeout as a process group takes it: a machine that vanished says nothing any more.

    Call it before the first group is made. A group that an engine makes beside it, as DeepSpeed
    does for its collectives, would else wait PyTorch's own 30 minutes (NCCL: 10).
    """
    import datetime

    from torch.distributed import distributed_c10d

    allowed = datetime.timedelta(seconds=args.timeout)
    distributed_c10d.default_pg_timeout = allowed
    distributed_c10d.default_pg_nccl_timeout = allowed
    return allowed


def tokens_per_s(step_tokens: int, seconds: list[float]) -> float:
    """Throughput over the steps after the first, which warms up; 0 where there was none left."""
    steady = seconds[1:] or seconds
    return round(step_tokens * len(steady) / sum(steady), 1) if steady else 0.0


def show_step(args, losses: list[float], seconds: list[float], step_tokens: int, device: str):
    """A line for the step just done: a bar, its loss and seconds, speed, memory, what is left.

    `seconds`: of the steps of this process; after a resume there are fewer of them than losses.
    """
    step = len(losses)
    steady = seconds[1:] or seconds
    left = sum(steady) / len(steady) * (args.steps - step)
    bar = "█" * (10 * step // args.steps)
    print(
        f"step {step:3}/{args.steps} {bar:░<10}   loss {losses[-1]:.4f}   {seconds[-1]:.2f} s   "
        f"{step_tokens / seconds[-1]:,.0f} tok/s   {peak_memory_gib(device):.2f} GiB   "
        f"{left:.0f} s left",
        flush=True,
    )
