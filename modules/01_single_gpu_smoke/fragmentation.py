"""Fragmentation, provoked: enough is free, in pieces that are too small.

04_where_memory_goes.py runs this as a process of its own, which begins with an empty allocator:

    python modules/01_single_gpu_smoke/fragmentation.py cpu "shorter sequences"
"""

import json
import sys

from memory_gauges import memory_of  # the file beside this one

from lab.planner.constants import GIB

PATTERNS = ("every second one freed", "shorter sequences")


def fragment(device: str, pattern: str) -> dict[str, float]:
    """Ask for 40 blocks of 100 MiB (CPU: 4,000 of 100 KiB), then go on as `pattern` says.

    "every second one freed": half of the blocks go, then blocks of 120 come in the same number.
    "shorter sequences": all go, then blocks of 60 come, then of 50, as when a long batch is
    followed by shorter ones. Bytes are given as a share of what tensors then hold.
    """
    import torch

    memory = memory_of(device)
    torch.zeros(1, device=device)
    before = memory.keeps()
    count = 4000 if device == "cpu" else 40
    unit = 2**10 if device == "cpu" else 2**20

    def blocks(size: int, number: int) -> list:
        return [torch.ones(size * unit, dtype=torch.uint8, device=device) for _ in range(number)]

    first = blocks(100, count)
    if pattern == "every second one freed":
        first = first[::2]
        second = blocks(120, count // 2)
    else:
        first = None
        second = blocks(60, count)
        first = blocks(50, int(count * 0.8))

    held = sum(block.nbytes for block in [*first, *second])
    kept = memory.keeps() - before
    memory.give_back()
    kept_at_the_end = memory.keeps() - before
    return {
        "held_gib": held / GIB,
        "kept_ratio": kept / held,
        "given_back_ratio": kept_at_the_end / held,
    }


if __name__ == "__main__":
    print(json.dumps(fragment(*sys.argv[1:])))
