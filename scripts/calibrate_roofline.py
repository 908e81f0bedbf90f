"""What this machine itself reaches: a matrix product, a copy, a launch, an all-reduce of two cards.

scripts/calibrate.py runs `worker` in one process, or in one for each of two cards by torchrun.
The planner predicts speeds from these rates (lab/planner/speed.py).
"""

import json
import os
import time
from collections.abc import Callable

SIZES = (4096, 8192)  # of the square matrices
COPY = 2 * 2**30  # bytes
MESSAGES_KIB = (8, 64, 512, 4096, 262144)  # the first only waits, the last only travels


def worker() -> None:
    """One process of one or two: the first prints {matmul_tflop_per_s, copy_gb_per_s, ...}."""
    reached = rates()
    if int(os.environ.get("RANK", 0)) == 0:
        print("measured " + json.dumps(reached), flush=True)


def rates() -> dict[str, float]:
    """{matmul_tflop_per_s, copy_gb_per_s, launch_us}, and of two cards the link between them."""
    import torch

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    products = [2 * size**3 / seconds_of_product(size, device) for size in SIZES]
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds(lambda: target.copy_(source))
    one = torch.ones(1, device=device)
    reached = {
        "matmul_tflop_per_s": round(max(products) / 1e12, 1),
        "copy_gb_per_s": round(2 * COPY / copying / 1e9, 1),
        "launch_us": round(seconds(lambda: one.add_(1), times=1000) * 1e6, 2),
    }
    if int(os.environ.get("WORLD_SIZE", 1)) == 2:
        reached |= link(source, device)
    return reached


def link(memory, device) -> dict[str, float]:
    """{all_reduce_<KiB>kib_us, link_us, link_gb_per_s} of two cards."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl", device_id=device)
    took = {}
    for kib in MESSAGES_KIB:
        message = memory[: kib * 2**10].view(torch.float32)
        took[kib] = seconds_on_card(lambda message=message: dist.all_reduce(message), device)
    dist.destroy_process_group()
    measured = {f"all_reduce_{kib}kib_us": round(1e6 * took[kib], 2) for kib in took}
    waiting = took[MESSAGES_KIB[0]]
    travelling = took[MESSAGES_KIB[-1]] - waiting
    # Of two cards each sends one half and then the other: two waits, and all bytes once.
    measured["link_us"] = round(1e6 * waiting / 2, 2)
    measured["link_gb_per_s"] = round(MESSAGES_KIB[-1] * 2**10 / travelling / 1e9, 2)
    return measured


def seconds_on_card(work: Callable, device, times: int = 50, repeats: int = 3) -> float:
    """The shortest mean of `times` executions, as in a CUDA graph: the card waits for no host.

    Products that come first keep the card busy while the host launches what is measured.
    """
    import torch

    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    took = []
    for _ in range(1 + repeats):
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        for _ in range(20):
            torch.mm(a, a, out=out)
        began.record()
        for _ in range(times):
            work()
        ended.record()
        ended.synchronize()
        took.append(began.elapsed_time(ended) / 1e3 / times)
    return min(took[1:])


def seconds_of_product(size: int, device) -> float:
    import torch

    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    return seconds(lambda: torch.mm(a, b, out=out))


def seconds(work: Callable, times: int = 20, repeats: int = 5) -> float:
    """The shortest mean of `times` executions in a row, waited for once."""
    import torch

    took = []
    for _ in range(1 + repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        took.append((time.perf_counter() - began) / times)
    return min(took[1:])
