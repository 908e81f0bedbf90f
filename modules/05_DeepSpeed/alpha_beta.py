"""The alpha-beta model of messages, and what each way to divide a training sends in a step.

    a message of s bytes takes   alpha + s * beta      alpha: latency, beta: 1 / bandwidth
    a ring of n processes        n - 1 such messages of s / n bytes, each to the next process
                                 (an all-reduce: twice, a reduce-scatter and an all-gather)

So an all-reduce takes 2 (n - 1) (alpha + s / n * beta): each process sends 2 (n - 1) / n of the
tensor, hardly more for many processes than for few, while the waiting grows with n. Sources:
Thakur, Rabenseifner, Gropp 2005; nccl-tests, doc/PERFORMANCE.md; arXiv 1910.02054, section 7.
"""

import math
from typing import NamedTuple

TRIPS = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}  # around the ring


class Point(NamedTuple):
    """A measured collective: bytes of the whole tensor, and how long it took."""

    size: float
    seconds: float


class Line(NamedTuple):
    """What was fitted to a collective."""

    alpha: float  # seconds
    beta: float  # seconds a byte


class Message(NamedTuple):
    """One collective, or a `send` to the next process, `times` times in a step."""

    kind: str
    numbers: float  # of the whole tensor
    times: float = 1


class Shape(NamedTuple):
    """What of a model and its training decides the messages."""

    parameters: float  # psi
    outside: float  # of them outside of the layers: embedding, last norm, output
    layers: int
    hidden: int
    tokens: int  # of a process and micro-step
    accumulate: int
    bucket: float  # numbers of a message of gradients


# -----------------------------------------------------------------------------
# Seconds


def ring(kind: str, size: float, n: int, line: Line) -> float:
    """Seconds of a collective of `size` bytes over a ring of n processes, or of a send.

    >>> round(ring("all_reduce", 2e9, 2, Line(10e-6, 1 / 20e9)), 3)  # 2 * 1 * 1e9 bytes / 20 GB/s
    0.1
    """
    if kind == "send":
        return line.alpha + size * line.beta
    return TRIPS[kind] * (n - 1) * (line.alpha + size / n * line.beta)


def tree(size: float, n: int, line: Line) -> float:
    """Seconds of an all-reduce over a tree: up and down log2(n) levels, all bytes twice.

    The messages are cut in pieces that follow each other, so that every level sends at once.

    >>> round(tree(1e9, 1024, Line(10e-6, 1 / 20e9)), 4)  # 2 * (10 * 10e-6 + 1e9 / 20e9)
    0.1002
    """
    return 2 * (math.ceil(math.log2(n)) * line.alpha + size * line.beta)


def bus_bandwidth(kind: str, point: Point, n: int) -> float:
    """Bytes/s through each link, as nccl-tests counts them: a number that does not depend on n.

    >>> bus_bandwidth("all_reduce", Point(1e9, 0.1), 4) / 1e9  # 2 * 3/4 * 10 GB/s
    15.0
    """
    return TRIPS[kind] * (n - 1) / n * point.size / point.seconds


def fit(kind: str, points: list[Point], n: int) -> Line:
    """Least squares of the relative errors, so that short messages count as much as long ones.

    With a = ring(alpha = 1) and b = ring(beta = 1), each over the measured time, alpha * a +
    beta * b should be 1 at every point: two unknowns, two equations. Where alpha would be negative,
    beta alone.
    """
    a = [ring(kind, point.size, n, Line(1, 0)) / point.seconds for point in points]
    b = [ring(kind, point.size, n, Line(0, 1)) / point.seconds for point in points]
    aa = sum(x * x for x in a)
    bb = sum(x * x for x in b)
    ab = sum(x * y for x, y in zip(a, b, strict=True))
    determinant = aa * bb - ab * ab
    alpha = (sum(a) * bb - sum(b) * ab) / determinant
    beta = (sum(b) * aa - sum(a) * ab) / determinant
    if alpha < 0:
        return Line(0.0, sum(b) / bb)
    if beta < 0:  # longer messages took no longer: nothing but waiting was measured
        return Line(sum(a) / aa, 0.0)
    return Line(alpha, beta)


# -----------------------------------------------------------------------------
# What is sent in a step


def pieces(kind: str, numbers: float, bucket: float, times: float = 1) -> list[Message]:
    """As many messages of a bucket as it takes, the last one shorter."""
    whole, rest = divmod(numbers, bucket)
    messages = [Message(kind, bucket, whole * times), Message(kind, rest, times)]
    return [message for message in messages if message.numbers * message.times]


def ways(shape: Shape) -> dict[str, list[Message]]:
    """{way: its messages of a step}; psi and tokens are those of one process.

    ZeRO-3 and FSDP gather each layer twice a micro-step, what is outside of the layers once. Tensor
    parallelism sums activations four times a layer (arXiv 1909.08053, figure 4), a pipeline hands
    them on, and their gradients back (a process in the middle; its waiting, the bubble, is no
    message).
    """
    psi = shape.parameters
    a = shape.accumulate
    activations = shape.tokens * shape.hidden
    layer = (psi - shape.outside) / shape.layers
    gathers = [
        Message("all_gather", layer, 2 * shape.layers * a),
        Message("all_gather", shape.outside, a),
    ]
    scatters = [
        Message("reduce_scatter", layer, shape.layers * a),
        Message("reduce_scatter", shape.outside, a),
    ]
    gathered = pieces("all_gather", psi, shape.bucket)
    return {
        "DDP": pieces("all_reduce", psi, shape.bucket),
        "ZeRO-1": pieces("reduce_scatter", psi, shape.bucket) + gathered,
        "ZeRO-2": pieces("reduce_scatter", psi, shape.bucket, a) + gathered,
        "ZeRO-3, FSDP2": gathers + scatters,
        "tensor parallel": [Message("all_reduce", activations, 4 * shape.layers * a)],
        "pipeline": [Message("send", activations, 2 * a)],
    }


def sent(messages: list[Message]) -> float:
    """Numbers sent, an all-reduce counted twice: the paper's unit, as mini_zero/traffic.py counts.

    >>> sent([Message("all_reduce", 10), Message("all_gather", 10, 3)])
    50
    """
    return sum(TRIPS.get(each.kind, 1) * each.numbers * each.times for each in messages)


def step_seconds(messages: list[Message], n: int, width: int, lines: dict[str, Line]) -> float:
    """Seconds of a step's messages, one after another, `width` bytes a number."""
    return sum(
        each.times * ring(each.kind, each.numbers * width, n, lines[each.kind]) for each in messages
    )
