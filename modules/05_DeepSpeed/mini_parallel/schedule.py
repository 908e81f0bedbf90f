"""In which order a stage of a pipeline works: ("F", i) and ("B", i) for each micro-batch i.

    AFAB   all forward, all backward (GPipe, arXiv 1811.06965):
           stage 0 of 2    F0 F1 F2 F3 .. .. B0 B1 B2 B3
    1F1B   one forward, one backward (PipeDream-Flush, arXiv 2006.09503):
           stage 0 of 2    F0 F1 .. B0 F2 B1 F3 B2 .. B3

Both wait equally long. What 1F1B saves is memory: a micro-batch's activations are kept from its F
to its B, and it brings every B as early as it can.
"""

from collections.abc import Iterator

Action = tuple[str, int]  # ("F" or "B", number of the micro-batch)


def afab(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """All forward, all backward; the same for every stage."""
    for i in range(micro_batches):
        yield "F", i
    for i in range(micro_batches):
        yield "B", i


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """As many forward as there are stages behind this one; then F and B in turn; then the rest."""
    warm_up = min(stages - stage - 1, micro_batches)
    for i in range(warm_up):
        yield "F", i
    for i in range(micro_batches - warm_up):
        yield "F", warm_up + i
        yield "B", i
    for i in range(micro_batches - warm_up, micro_batches):
        yield "B", i


SCHEDULES = {"afab": afab, "1f1b": one_f_one_b}

# -----------------------------------------------------------------------------
# What an order costs


def most_kept(order: list[Action]) -> int:
    """The most micro-batches whose activations a stage keeps at the same time."""
    kept = most = 0
    for kind, _ in order:
        kept += 1 if kind == "F" else -1
        most = max(most, kept)
    return most


def timeline(orders: list[list[Action]], backward: float = 2.0) -> list[list[tuple]]:
    """[(kind, i, begin, end)] of each stage, where F takes 1, B `backward` and a message nothing.

    An action begins when its stage is free and what it needs has come: F from the stage before, B
    from the stage behind. Raises ValueError where the stages wait for each other for ever.
    """
    takes = {"F": 1.0, "B": backward}
    ends: dict[tuple, float] = {}  # (stage, kind, i) -> when it was done
    free = [0.0 for _ in orders]  # when each stage has done what it has begun
    bars: list[list[tuple]] = [[] for _ in orders]
    waiting = [list(order) for order in orders]
    while any(waiting):
        before = len(ends)
        for stage, actions in enumerate(waiting):
            while actions:
                kind, i = actions[0]
                needed = needs(stage, len(orders), kind, i)
                if needed is not None and needed not in ends:
                    break
                begin = max(free[stage], ends.get(needed, 0.0))
                end = begin + takes[kind]
                bars[stage].append((kind, i, begin, end))
                ends[stage, kind, i] = end
                free[stage] = end
                actions.pop(0)
        if len(ends) == before:
            raise ValueError("the stages wait for each other: this order never ends")
    return bars


def needs(stage: int, stages: int, kind: str, i: int) -> tuple | None:
    """Whose result this action waits for; None: nobody's."""
    if kind == "F":
        return (stage - 1, "F", i) if stage > 0 else None
    if stage == stages - 1:
        return (stage, "F", i)
    return (stage + 1, "B", i)


def bubble(bars: list[list[tuple]]) -> float:
    """Share of the time in which a stage waits, over all stages: (p - 1) / (m + p - 1)."""
    whole = max(stage[-1][3] for stage in bars)
    busy = sum(end - begin for stage in bars for _, _, begin, end in stage)
    return 1 - busy / (len(bars) * whole)
