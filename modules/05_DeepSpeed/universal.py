"""A ZeRO state for another number of processes: DeepSpeed's universal checkpoint.

The files of a ZeRO state are pieces for one number of processes. A universal checkpoint has a file
for each tensor and kind (weights in fp32, both moments); whoever loads it takes its piece of each.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from lab import checkpoints, fail, models, shown


def identity(args, config, blocks) -> dict:
    """What must be the same for a training to go on, see lab.checkpoints."""
    kind = {"dtype": config.dtype, "zero_stage": config.stage, "lora_rank": args.lora_rank}
    for name in ("optimizer", "scheduler", "gradient_clipping", "fp16"):
        kind[name] = config.values.get(name)
    if args.lora_rank and (args.save_every or args.resume):  # the base is not in the state
        weights = sorted(models.model_folder(args.model).glob("*.safetensors"))
        kind["base_crc32"] = [checkpoints.crc32(file) for file in weights]
    run = checkpoints.identity(args, blocks, config.step_blocks, engine="DeepSpeed", **kind)
    return run | {"learning_rate": config.learning_rate}  # the file may have said it


def last(args, config, blocks, rank: int, world: int) -> tuple[dict, Path | None]:
    """(what a state says of this run, the folder to go on from in pieces for `world` processes)."""
    run = identity(args, config, blocks)
    begun = checkpoints.last(args, run)
    if begun and checkpoints.read(begun)["processes"] != world:
        begun = converted(begun, config, rank)
    return run | {"processes": world}, begun


def converted(state: Path, config, rank: int) -> Path:
    """The folder `state`.universal, made by DeepSpeed's own command; its files as in `state`.

    `config` is told to load such a one.
    """
    folder = state.with_name(f"{state.name}.universal")
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder"]
        command += [shown(state / "states"), "--output_folder", shown(folder / "states")]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        if config.stage < 3:
            command.append("--inject_missing_state")
        print(f"of another number of processes: {shlex.join(['python', *command])}", flush=True)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition("\n")[2]
            fail(f"{shown(state)} could not be converted for another number of processes: {reason}")
        shutil.copy(state / checkpoints.RUN, folder)
    checkpoints.meet()
    config.values["checkpoint"] = {"load_universal": True}
    return folder
