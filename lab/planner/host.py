"""What a training needs of the host's memory and of NVMe: what offloading moves there.

pinned_*      PyTorch page-locks memory in powers of two
frozen        weights under an adapter lie there too, a tensor each
host          all processes of a machine, with what loading takes (arXiv 2101.06840)
"""

import math
from typing import NamedTuple

from lab.planner.config import Model
from lab.planner.constants import GIB, HOST_PROCESS_GIB
from lab.planner.states import (
    Training,
    frozen_bytes,
    packs,
    scale_bytes,
    trained_parameters,
    whole_bytes,
)

ZERO3_SUB_GROUP = 1e9  # numbers that ZeRO-3 updates at a time: sub_group_size
NVME_BUFFERS = 5  # buffer_count of offload_param: each holds the largest parameter's part
NVME_OPTIMIZER_BUFFERS = 4  # buffer_count of offload_optimizer: each holds the largest group
NVME_GROUP = 2e7  # numbers: sub_group_size of modules/05_DeepSpeed/configs/z3-nvme.json


class Host(NamedTuple):
    """Bytes over all processes of this machine."""

    memory: dict[str, float]
    nvme: float


def power_of_two(size: float) -> float:
    """What PyTorch page-locks for a tensor of `size` bytes (CachingHostAllocator).

    >>> power_of_two(67.9e6)  # 64.8 MiB
    134217728
    """
    return 2 ** math.ceil(math.log2(size)) if size >= 1 else 0


def pinned(size: float, largest: float) -> float:
    """Bytes that PyTorch page-locks for `size` bytes in tensors of at most `largest`.

    >>> pinned(10, 4)  # 4 + 4 + 2
    10
    >>> pinned(11, 8)  # 8 + 4
    12
    """
    whole, rest = divmod(size, largest)
    return whole * power_of_two(largest) + power_of_two(rest)


def pinned_parameters(model: Model, setup: Training, each: float, frozen: bool) -> float:
    """Page-locked bytes, over all cards, of trained or frozen parameters of `each` bytes a weight.

    Every parameter is divided and locked by itself (DeepSpeed, partition_parameters.py; FSDP2,
    _fsdp_param.py), so each part is rounded up. Of QLoRA the packed ones have half a byte.

    >>> lora = Training(engine="deepspeed", zero=3, method="lora", offload="optimizer+param")
    >>> round(pinned_parameters(QWEN_7B, lora, 2, frozen=True) / GIB, 1)  # of 14.2
    27.0
    """
    total = 0.0
    for weight in model.weights:
        is_packed = setup.method == "qlora" and packs(weight)
        part = weight.each * (0.5 if is_packed else each) / setup.gpus
        is_frozen = not setup.full or weight.part == "vision"
        # Norms and biases are below ZeRO-3's persistence threshold.
        if is_frozen == frozen and len(weight.shape) > 1:
            total += setup.gpus * weight.count // weight.each * power_of_two(part)
    return total


def frozen_on_host(model: Model, setup: Training) -> float:
    """Frozen weights that were moved away from the cards, on the host.

    >>> lora = Training(engine="deepspeed", zero=3, method="lora", offload="optimizer+param")
    >>> round(frozen_on_host(QWEN_7B, lora) / GIB, 1)
    27.0
    """
    if not setup.offloads_parameters:
        return 0
    return pinned_parameters(model, setup, setup.computed, frozen=True)


def host(model: Model, setup: Training) -> Host:
    """What lies on the host, or on NVMe.

    >>> offloaded = Training(engine="deepspeed", zero=3, offload="optimizer+param")
    >>> round(sum(host(QWEN_7B, offloaded).memory.values()) / GIB)  # 180 measured
    182
    """
    processes = {"processes": HOST_PROCESS_GIB * GIB * setup.gpus}
    if setup.engine == "fsdp":
        return Host(processes | fsdp_host(model, setup), 0.0)
    if not setup.offloads:
        return Host(processes, 0.0)
    if setup.offload_device == "cpu":
        return Host(processes | deepspeed_host(model, setup), 0.0)
    kept = {
        "gradients": setup.computed * trained_parameters(model, setup),  # one buffer, 16 bits
        "start": at_start(model, setup),
        "buffers": nvme_buffers(model, setup),
    }
    return Host(processes | kept, nvme_files(model, setup))


def nvme_buffers(model: Model, setup: Training) -> float:
    """Bytes, over all processes, through which files are read and written.

    A group that is updated together is a whole parameter at least (stage3.py,
    _create_fp16_sub_groups).

    >>> both = "optimizer+param"
    >>> setup = Training(engine="deepspeed", zero=3, offload=both, offload_device="nvme")
    >>> round(nvme_buffers(QWEN_7B, setup) / GIB, 1)
    13.2
    """
    largest = max(weight.each for weight in model.weights) / setup.gpus
    part = trained_parameters(model, setup) / setup.gpus
    group = min(part, max(NVME_GROUP, largest if setup.full else 0))
    each = 4 * NVME_OPTIMIZER_BUFFERS * group
    if setup.offloads_parameters:
        each += setup.computed * NVME_BUFFERS * largest
    return setup.gpus * each


def nvme_files(model: Model, setup: Training) -> float:
    """Bytes in files: fp32 gradients, master copy and two moments, and parameters if offloaded.

    >>> both = "optimizer+param"
    >>> setup = Training(engine="deepspeed", zero=3, offload=both, offload_device="nvme")
    >>> round(nvme_files(QWEN_7B, setup) / GIB)  # 18 psi
    128
    """
    trained = trained_parameters(model, setup)
    size = 16 * trained
    if setup.offloads_parameters:
        size += setup.computed * trained
        size += frozen_bytes(model, setup) - scale_bytes(model, setup)
    return size


def at_start(model: Model, setup: Training) -> float:
    """Bytes of the trained weights that each process holds once while it starts."""
    return setup.gpus * setup.computed * trained_parameters(model, setup)


def deepspeed_host(model: Model, setup: Training) -> dict[str, float]:
    """What DeepSpeed's offloading moves from the cards to the host.

    Each process pins its part of the master copy and of the fp32 gradients, and has two moments
    that are not pinned. Trained parameters that are offloaded lie there twice, frozen ones once.

    >>> on_host = deepspeed_host(QWEN_7B, Training(zero=2, offload="optimizer"))
    >>> round(on_host["moments"] / 1e9, 1)  # 8 psi
    60.9
    """
    trained = trained_parameters(model, setup)
    part = 4 * trained / setup.gpus
    largest = 4 * ZERO3_SUB_GROUP if setup.zero == 3 else part
    master = setup.gpus * (pinned(part, largest) if setup.pin_memory else part)
    twice = 2 * setup.computed * trained if setup.offloads_parameters else 0
    return {
        "gradients": master,
        "start": at_start(model, setup),
        "master_copy": master,
        "moments": 2 * setup.gpus * part,
        "parameters": twice,
        "frozen": frozen_on_host(model, setup),
    }


def fsdp_host(model: Model, setup: Training) -> dict[str, float]:
    """What FSDP has on the host: the model that its first process deals out, and what it offloads.

    Offloaded are fp32 parameters and gradients, page-locked, and two moments that are not.

    >>> offloaded = Training(engine="fsdp", offload="optimizer+param", method="lora")
    >>> round(fsdp_host(QWEN_7B, offloaded)["start"] / GIB, 1)
    14.3
    """
    start = 0 if setup.loads_whole else whole_bytes(model, setup)
    if not setup.offloads:
        return {"start": start}
    trained = trained_parameters(model, setup)
    locked = 4 * trained
    if setup.full:
        locked = pinned_parameters(model, setup, 4, frozen=False)
    return {
        "start": start,
        "parameters": locked,
        "gradients": locked,
        "moments": 8 * trained,
        "frozen": frozen_on_host(model, setup),
    }
