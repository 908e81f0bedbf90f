"""What this machine itself reaches: a matrix product, a copy, an all-reduce of two cards.

scripts/calibrate.py runs `worker` in one process, or in one for each of two cards by torchrun.
The planner predicts speeds from these rates (lab/planner/speed.py).
"""

import json
import os
import time
from collections.abc import Callable

SIZES = (4096, 8192)  # of the square matrices
COPY = 2 * 2**30  # bytes
SHORT = 8 * 2**10  # bytes of a message that only waits
LONG = 256 * 2**20  # bytes of a message that only travels


def worker() -> None:
    """One process of one or two: the first prints {matmul_tflop_per_s, copy_gb_per_s, ...}."""
    reached = rates()
    if int(os.environ.get("RANK", 0)) == 0:
        print("measured " + json.dumps(reached), flush=True)


def rates() -> dict[str, float]:
    """{matmul_tflop_per_s, copy_gb_per_s}, and of two cards {link_us, link_gb_per_s}."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    products = [2 * size**3 / seconds_of_product(size, device) for size in SIZES]
    source = torch.ones(COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds(lambda: target.copy_(source))
    reached = {
        "matmul_tflop_per_s": round(max(products) / 1e12, 1),
        "copy_gb_per_s": round(2 * COPY / copying / 1e9, 1),
    }
    if int(os.environ.get("WORLD_SIZE", 1)) == 2:
        dist.init_process_group("nccl", device_id=device)
        short = source[:SHORT].view(torch.float32)
        long = source[:LONG].view(torch.float32)
        waiting = seconds(lambda: dist.all_reduce(short))
        travelling = seconds(lambda: dist.all_reduce(long)) - waiting
        # Of two cards each sends one half and then the other: two waits, all bytes once.
        reached["link_us"] = round(waiting / 2 * 1e6, 2)
        reached["link_gb_per_s"] = round(LONG / travelling / 1e9, 2)
        dist.destroy_process_group()
    return reached


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
