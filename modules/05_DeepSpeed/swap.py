"""Offload to NVMe: DeepSpeed writes states into files of a folder, and reads them when needed.

It does so by libaio, past the page cache, in blocks. What is smaller than a block of 1 MiB stays in
memory. The rest, by this process: a file for each parameter, and for each group of parameters that
is updated together (sub_group_size) three: master copy and moments; and gradients.
"""

import ctypes
import resource
import shutil
from pathlib import Path

from lab import RUNS, fail

PATTERN = "*.tensor.swp"
PACKAGE = "apt-get install -y libaio-dev"


def settle(config, folder: Path | None, shape, world: int) -> Path | None:
    """The folder of the files; None where nothing is offloaded to nvme.

    Fills nvme_path and buffer_size where the file leaves them "auto". `folder`: the command line's.
    `shape`: transformers' config of the model.
    """
    sections = [config.zero.get(f"offload_{what}") for what in ("optimizer", "param")]
    swapped = [part for part in sections if isinstance(part, dict) and part.get("device") == "nvme"]
    if not swapped:
        if folder:
            config.refuse('--nvme moves nothing where no offload says "device": "nvme"')
        return None
    buffers = sections[1]
    if buffers in swapped and config.zero.get("stage3_max_reuse_distance", 1e9) != 0:
        # What is read from a file keeps its buffer until it is released (DeepSpeed#3062).
        config.refuse(
            'offload_param to nvme needs "stage3_max_reuse_distance": 0, or the second step finds '
            "no free buffer (Not enough buffers 0 for swapping 1)"
        )
    refuse_without_libaio()
    for part in swapped:
        part["nvme_path"] = str(config.chosen(part, "nvme_path", folder) or default())
    group = config.zero.get("sub_group_size", 1e9)
    group = int(group) if isinstance(group, int | float) else 0  # another text: ds_check.py
    if buffers in swapped and buffers.get("buffer_size", "auto") == "auto":
        # A buffer must hold this process's part of the largest parameter, the embedding.
        buffers["buffer_size"] = -(-shape.vocab_size * shape.hidden_size // world)
    refuse_locked(4 * group)
    path = Path(swapped[0]["nvme_path"])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        fail(f"cannot offload to {path}: {e.strerror}")
    return path


def default() -> Path:
    return RUNS / "05_DeepSpeed/nvme"


def refuse_without_libaio() -> None:
    """DeepSpeed's own test: it compiles and links a program that calls io_submit."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        fail(f"offload to nvme compiles DeepSpeed's async_io, which needs libaio: {PACKAGE}")


def refuse_locked(size: int) -> None:
    """Where this process may not lock `size` bytes: DeepSpeed's buffers would be null pointers."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or size <= limit:
        return
    probe = ctypes.create_string_buffer(limit + 2**20)
    if ctypes.CDLL(None).mlock(probe, len(probe)):  # root may lock more than the limit
        fail(
            f"offload to nvme locks {size / 2**20:,.0f} MiB of memory and more, and this user may "
            f"lock {limit / 2**20:,.0f} (ulimit -l): write 'memlock unlimited' for them in "
            "/etc/security/limits.conf; in Docker, --ulimit memlock=-1"
        )
    ctypes.CDLL(None).munlock(probe, len(probe))


def bytes_on_disk(folder: Path | None, rank: int, engine) -> dict[str, int]:
    """{kind of state: bytes} of this process's files; of parameters, where no newer ones exist.

    What max_in_cpu keeps in memory was written at the start all the same.
    """
    sizes = {"parameters": 0, "gradients": 0, "optimizer": 0}
    if folder is None:
        return sizes
    weights = engine.module.parameters()
    swapped = [weight for weight in weights if weight.ds_tensor.final_location == "nvme"]
    live = {f"{weight.ds_id}_param.tensor.swp" for weight in swapped}
    for file in folder.glob(f"zero_stage_3/*/rank{rank}/{PATTERN}"):
        kind = "parameters" if file.name in live else None
        if file.parent.parent.name == "optimizer":
            kind = "gradients" if "_gradient_" in file.name else "optimizer"
        if kind:
            sizes[kind] += file.stat().st_size
    return sizes


def remove(folder: Path | None, rank: int) -> None:
    """This process's files: DeepSpeed leaves them, and they are nothing without it."""
    if folder:
        for part in folder.glob(f"zero_stage_3/*/rank{rank}"):
            shutil.rmtree(part)
