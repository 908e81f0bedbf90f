"""States in files that any number of processes can go on from.

    2 processes wrote    [a a a a b][b b c c 0]      their parts of a unit, padded
    put together         [a a a a b b b c c]         the padding is off
    3 processes take     [a a a][a b b][b c c]       each its part

The weights in fp32 and every state of the optimizer are divided alike, so all go the same way.
DeepSpeed converts its files first (universal checkpoint: a file for each tensor), and
torch.distributed.checkpoint writes where each piece belongs.
"""

from pathlib import Path

import torch
import torch.distributed as dist


def save(engine, folder: Path) -> None:
    """Every process writes its part of each unit; at stage 0 all have the same, and one writes."""
    rank = dist.get_rank()
    if engine.stage == 0:
        parts = {"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}
    else:
        parts = []
        for unit in engine.divided.units:
            parts.append({"master": unit.master.data, **engine.optimizer.state[unit.master]})
    if engine.stage > 0 or rank == 0:
        torch.save(parts, folder / f"part_{rank}.pt")
    dist.barrier()


def load(engine, folder: Path) -> None:
    """Into an engine of the same model, stage and bucket size, on any number of processes."""
    files = sorted(folder.glob("part_*.pt"), key=lambda file: int(file.stem.split("_")[1]))
    written = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
    if engine.stage == 0:
        engine.model.load_state_dict(written[0]["model"])
        engine.optimizer.load_state_dict(written[0]["optimizer"])
        return
    for number, unit in enumerate(engine.divided.units):
        state = {}
        for name, first in written[0][number].items():
            state[name] = first.clone()  # Adam's count of steps, the same in all parts
            if first.dim() == 1:
                whole = torch.cat([parts[number][name] for parts in written])
                state[name] = unit.cut(whole).to(unit.master.device)
        unit.master.data.copy_(state.pop("master"))
        engine.optimizer.state[unit.master] = state
    engine.divided.gather()
