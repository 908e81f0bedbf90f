"""What a running DeepSpeed engine holds in this process: bytes of tensors, by their kind.

Buffers on the way (reduce bucket, copies for offload) are no states: peak memory has them.
"""

from typing import NamedTuple

from lab import fail
from lab.table import table


class Held(NamedTuple):
    """Bytes of tensors: all of them, and those on the device that computes."""

    everywhere: int
    on_device: int


def bytes_of(tensors, device) -> Held:
    """Each tensor counted once: tied weights are one."""
    once = {t.data_ptr(): t for t in tensors if t is not None and t.numel()}.values()
    return Held(
        sum(tensor.nbytes for tensor in once),
        sum(tensor.nbytes for tensor in once if tensor.device.type == device.type),
    )


def numbers(parameters) -> int:
    """How many numbers these parameters are; at stage 3 each process has a part of them."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in parameters)


def stage_that_runs(engine) -> int:
    """The stage by the class of the optimizer: one does stages 1 and 2, one stage 3."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    stage = 0
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        stage = 3
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        stage = 2 if zero.partition_gradients else 1
    elif isinstance(zero, BF16_Optimizer):  # stage 1 where gradients add up in fp32
        stage = 1
    configured = engine.zero_optimization_stage()
    if stage != configured:
        kind = type(zero).__name__
        fail(f"configured for ZeRO stage {configured}, but the engine runs stage {stage} ({kind})")
    return stage


def adds_up_in_fp32(engine) -> bool:
    """Whether whole fp32 gradients lie beside bf16 ones: grad_accum_dtype fp32 at stage 1."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(engine.optimizer, BF16_Optimizer)


def offloads(engine) -> bool:
    """Whether the optimizer's states are in host memory."""
    zero = engine.optimizer
    return getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)


def gradients(engine) -> Held:
    """What is kept from backward to step, wherever the stage keeps it."""
    zero = engine.optimizer
    tensors = [weight.grad for weight in engine.module.parameters()]
    # Offloaded: this process's part in fp32, as the optimizer reads it (stages 1 and 2, stage 3).
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        tensors += [part.grad for part in getattr(zero, name, [])]
    for group in getattr(zero, "averaged_gradients", {}).values():
        tensors += group or []
    tensors += getattr(zero, "fp32_groups_gradients_flat", [])  # of BF16_Optimizer, beside its own
    # Offloaded to files: what is too small for one stays in memory.
    swapper = getattr(zero, "optimizer_swapper", None)
    for part in swapper.swap_params_info.values() if swapper else ():
        tensors += part.unswapped_gradients.values()
    return bytes_of(tensors, engine.device)


def states(engine) -> dict[str, Held]:
    """Parameters, and the optimizer's states: master copy and moments."""
    import torch

    weights = []
    for weight in engine.module.parameters():
        weights.append(weight.data)  # empty at stage 3 ...
        weights.append(getattr(weight, "ds_tensor", None))  # ... where this is the own part
    moments = []
    for master, state in engine.basic_optimizer.state.items():
        moments += [tensor for tensor in (master, *state.values()) if torch.is_tensor(tensor)]
    parameters = bytes_of(weights, engine.device)
    # In fp32 without ZeRO the master copy is the weight itself: counted together, then taken off.
    both = bytes_of([*weights, *moments], engine.device)
    everywhere = both.everywhere - parameters.everywhere
    optimizer = Held(everywhere, both.on_device - parameters.on_device)
    return {"parameters": parameters, "optimizer": optimizer}


def show(held: dict[str, int], expected: dict[str, float], parameters: int) -> None:
    """The table of bytes, a row for each kind and one for their sum."""
    held = held | {"sum": sum(held.values())}
    expected = expected | {"sum": sum(expected.values())}
    rows = [
        [kind, f"{held[kind]:,}", f"{expected[kind]:,.0f}", f"{held[kind] / parameters:.2f}"]
        for kind in held
    ]
    table(["bytes in this process", "measured", "theory", "per parameter"], rows)


def gib(held: dict[str, int], expected: dict[str, float]) -> dict[str, float]:
    """The same table for the record."""
    sums = {"": sum(held.values()), "_theory": sum(expected.values())}
    metrics = {}
    for kind in held:
        name = kind.removesuffix("s")
        metrics[f"{name}_state_gib"] = held[kind] / 2**30
        metrics[f"{name}_state_theory_gib"] = expected[kind] / 2**30
    return metrics | {f"state{name}_gib": total / 2**30 for name, total in sums.items()}
