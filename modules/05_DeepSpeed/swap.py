"""Offload to NVMe: DeepSpeed writes states into files of a folder, and reads them when needed.

It does so by libaio, past the page cache, in blocks. What is smaller than a block of 1 MiB stays in
memory. The rest, by this process: a file for each parameter, and for each group of parameters that
is updated together (sub_group_size) three: master copy and moments; and gradients.
"""

import ctypes
import math
import resource
import shutil
import tempfile
from pathlib import Path

from lab import RUNS, fail

PATTERN = "*.tensor.swp"
PACKAGE = "apt-get install -y libaio-dev"
GIB = 2**30
SECTIONS = ("offload_optimizer", "offload_param")


def settle(config, args, shape, rank: int, world: int) -> Path | None:
    """The folder of the files, emptied of a killed training's; None where nothing goes to nvme.

    Fills nvme_path and buffer_size where the file leaves them "auto". `args`: nvme, lora_rank.
    `shape`: transformers' config of the model.
    """
    parts = {name: config.zero.get(name) for name in SECTIONS}
    swapped = {
        name: part
        for name, part in parts.items()
        if isinstance(part, dict) and part.get("device") == "nvme"
    }
    if not swapped:
        if args.nvme is not None:
            config.refuse('--nvme moves nothing where no offload says "device": "nvme"')
        return None
    parameters = swapped.get("offload_param")
    if parameters and config.zero.get("stage3_max_reuse_distance", 1e9) != 0:
        # What is read from a file keeps its buffer until it is released (DeepSpeed#3062).
        config.refuse(
            'offload_param to nvme needs "stage3_max_reuse_distance": 0, or the second step finds '
            "no free buffer (Not enough buffers 0 for swapping 1)"
        )
    refuse_without_libaio()
    for name, part in swapped.items():
        part["nvme_path"] = config.chosen(part, "nvme_path", args.nvme) or default()
        if not isinstance(part["nvme_path"], str):
            config.refuse(f"{name}.nvme_path is {part['nvme_path']}: write the name of a folder")
    paths = {part["nvme_path"] for part in swapped.values()}
    if len(paths) > 1:
        config.refuse(f"nvme_path is {' and '.join(sorted(paths))}: write one folder for both")
    largest = -(-shape.vocab_size * shape.hidden_size // world)  # the embedding's part
    if parameters and parameters.get("buffer_size", "auto") == "auto":
        parameters["buffer_size"] = largest
    refuse_locked(locked(config, swapped, largest))
    path = Path(paths.pop())
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        fail(f"cannot offload to {path}: {e.strerror}")
    remove(path, rank)
    refuse_full(config, path, shape, bool(args.lora_rank))
    return path


def locked(config, swapped: dict, largest: int) -> int:
    """Bytes of the buffers that a process locks; `largest`: numbers of its largest parameter.

    The optimizer has four (buffer_count) of its largest group, which is a whole parameter at least
    (deepspeed/runtime/zero/stage3.py, _create_fp16_sub_groups).
    """
    size = 0
    if "offload_optimizer" in swapped:
        group = config.zero.get("sub_group_size", 1e9)
        usual = isinstance(group, int | float) and math.isfinite(group)  # others: ds_check.py
        count = swapped["offload_optimizer"].get("buffer_count", 4)
        size += 4 * count * max(largest, int(group) if usual else 0)
    if "offload_param" in swapped:
        part = swapped["offload_param"]
        size += 2 * part.get("buffer_count", 5) * int(part["buffer_size"])
    return size


def refuse_full(config, folder: Path, shape, lora: bool) -> None:
    """Where the disk has no room for the files: DeepSpeed's writes would not say so.

    Written are, for each trained parameter, master copy, two moments and the gradient in fp32, and
    all parameters if they are offloaded too.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    numbers = sum(weight.numel() for weight in model.parameters())
    need = 0 if lora else 16 * numbers
    if (config.zero.get("offload_param") or {}).get("device") == "nvme":
        need += (4 if config.dtype == "float32" else 2) * numbers
    free = shutil.disk_usage(folder).free
    if free < need:
        fail(
            f"offload to nvme writes {need / GIB:,.1f} GiB below {folder}, where {free / GIB:,.1f} "
            "are free: give --nvme a folder on another disk"
        )


def default() -> str:
    return str(RUNS / "05_DeepSpeed/nvme")


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
    """This process's files: DeepSpeed leaves them, and they are nothing without it.

    Those of a training that was killed too, when the next one begins.
    """
    if folder:
        for part in folder.glob(f"zero_stage_3/*/rank{rank}"):
            shutil.rmtree(part)
