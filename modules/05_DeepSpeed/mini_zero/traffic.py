"""Counts what the processes send each other, by standing in front of torch.distributed.

In numbers, not bytes: the unit of the ZeRO paper, whose psi is the number of parameters. An
all-reduce moves as much as a reduce-scatter and an all-gather, so it counts twice (arXiv
1910.02054, section 7.1: each of n processes sends (n - 1) / n of that).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

# {collective: (how often its numbers travel, which argument holds the whole tensor)}
COUNTED = {
    "all_reduce": (2, 0),
    "reduce_scatter_tensor": (1, 1),
    "all_gather_into_tensor": (1, 0),
    "all_to_all_single": (1, 1),
    "isend": (1, 0),
}


@contextmanager
def counted() -> Iterator[Counter]:
    """{collective: numbers sent} of everything within."""
    sent: Counter = Counter()
    originals = {name: getattr(dist, name) for name in COUNTED}

    def counting(name: str):
        times, place = COUNTED[name]

        def call(*tensors, **options):
            sent[name] += times * tensors[place].numel()
            return originals[name](*tensors, **options)

        return call

    for name in COUNTED:
        setattr(dist, name, counting(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
