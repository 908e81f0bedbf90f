"""What FSDP2 divided, in files for any number of processes: torch.distributed.checkpoint.

Each process writes the pieces it holds, and beside them stands which piece of which tensor lies in
which file; whoever reads takes the pieces it needs. Accelerate 1.11 does the same where its YAML
says SHARDED_STATE_DICT, but loads no optimizer states into an optimizer that has not yet stepped
(load_fsdp_optimizer asks it for the names of what it holds: none), and says nothing.
"""

from pathlib import Path


def save(model, optimizer, folder: Path) -> None:
    """`optimizer`: as Accelerate prepared it. By all processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, states = get_state_dict(model, optimizer.optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "shards")


def load(model, optimizer, folder: Path) -> None:
    """Into the pieces that this process holds now. By all processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer.optimizer)  # makes room for both moments
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder / "shards")
    parts = {"model_state_dict": weights, "optim_state_dict": states}
    set_state_dict(model, optimizer.optimizer, **parts)
