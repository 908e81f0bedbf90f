"""Which batches a process reads.

Accelerate deals out whole batches in turn; when the last round is not full, it begins anew, so that
all processes make equally many steps (a process that stops earlier would leave the others waiting
in an all-reduce). With 5 batches of 2 rows on 2 processes:

    rows         0 1 | 2 3 | 4 5 | 6 7 | 8
    process 0    0 1   4 5   8 0           row 0 fills the short batch up
    process 1    2 3   6 7   1 2           a whole batch that was read before

9 rows were wanted and 12 are read: `extra` is 3. Source: accelerate/data_loader.py,
BatchSamplerShard with even_batches.
"""

from collections.abc import Iterator


class ShareOfBatches:
    """A batch sampler: the batches of row numbers that one process reads."""

    def __init__(self, batches, process: int, processes: int):
        self.batches = batches  # a BatchSampler over all rows
        self.process = process
        self.processes = processes
        self.extra = 0  # rows of the last round that were read before; known after it

    def __len__(self) -> int:
        return -(-len(self.batches) // self.processes)  # rounded up

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batches.batch_size
        a_full_round = size * self.processes
        first_round: list[int] = []
        a_round: list[list[int]] = []
        self.extra = 0
        for batch in self.batches:
            if len(first_round) < a_full_round:
                first_round += batch
            a_round.append(batch)
            if len(a_round) == self.processes and len(batch) == size:
                yield a_round[self.process]
                a_round = []
        if a_round:
            yield self.filled(a_round, first_round, size)

    def filled(self, a_round: list[list[int]], first: list[int], size: int) -> list[int]:
        """This process's batch of a last round that is short: the first rows fill it up."""
        rows = [row for batch in a_round for row in batch]
        self.extra = size * self.processes - len(rows)
        while len(rows) < size * self.processes:
            rows += first
        begin = self.process * size
        return rows[begin : begin + size]
