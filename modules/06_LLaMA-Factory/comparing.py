"""Two models on the same items: which answer is better by rules, and whether they differ."""

import math
import random

import scoring

DRAWS = 2000  # of the bootstrap


def quality(question: scoring.Question, answer: str) -> tuple:
    """What the judge looks at, in this order: a JSON object; right fields; few characters."""
    is_object = bool(scoring.fields_of(answer, question.is_call))
    fields = scoring.share_of_fields(question, answer) or 0.0
    return is_object, fields, -len(answer)


def verdict(question: scoring.Question, first: str, second: str) -> int:
    """1 where the first answer is better, -1 where the second is, 0 for a tie.

    Each answer is judged alone, so that the order in which they are shown cannot count.
    """
    one = quality(question, first)
    other = quality(question, second)
    return (one > other) - (one < other)


def changed(before: list[bool], after: list[bool]) -> tuple[int, int]:
    """(gained, lost): of the same items, how many became right, and how many wrong."""
    pairs = list(zip(before, after, strict=True))
    return pairs.count((False, True)), pairs.count((True, False))


def sign_test(gained: int, lost: int) -> float:
    """How probable a split as uneven as this is, or more, where gains and losses are a coin's.

    Two-sided and exact. Of the items that one model alone gets right this is McNemar's test
    (Psychometrika 12, 1947, 153-157); the items that both get right, or neither, say nothing.

    >>> sign_test(gained=6, lost=0)
    0.03125
    >>> sign_test(gained=3, lost=4)
    1.0
    """
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)


def bootstrap(base: list[tuple], tuned: list[tuple]) -> tuple[float, float]:
    """The 95 % interval of (loss per unit of tuned) - (that of base), of (loss, units) of each row.

    Paired: rows are drawn again with replacement, the same ones for both models.
    """
    rng = random.Random(0)
    rows = list(zip(base, tuned, strict=True))
    differences = []
    for _ in range(DRAWS):
        drawn = rng.choices(rows, k=len(rows))
        before = sum(one[0] for one, _ in drawn) / sum(one[1] for one, _ in drawn)
        after = sum(one[0] for _, one in drawn) / sum(one[1] for _, one in drawn)
        differences.append(after - before)
    differences.sort()
    return differences[DRAWS // 40], differences[-DRAWS // 40 - 1]


# -----------------------------------------------------------------------------
# One measure of both models: its metrics, and its line in the table


def shares(name: str, base: list[bool], tuned: list[bool]) -> dict[str, float]:
    """Of the same items by both models: each share with its interval, and the sign test."""
    metrics = {}
    for model, right in (("base", base), ("tuned", tuned)):
        metrics |= scoring.share_metrics(f"{model}_{name}", right)
    gained, lost = changed(base, tuned)
    metrics[f"{name}_gained_count"] = gained
    metrics[f"{name}_lost_count"] = lost
    metrics[f"{name}_chance_pct"] = round(100 * sign_test(gained, lost), 2)
    return metrics


def rates(name: str, unit: str, base: list[tuple], tuned: list[tuple]) -> dict[str, float]:
    """Of (amount, size) of the same rows by both models: amount per size, each with its interval,
    and the interval of the difference."""
    metrics = {}
    for model, rows in (("base", base), ("tuned", tuned)):
        for end, value in zip(("", "_low", "_high"), scoring.mean_loss(rows), strict=True):
            metrics[f"{model}_{name}{end}_{unit}"] = round(value, 4)
    for end, value in zip(("low", "high"), bootstrap(base, tuned), strict=True):
        metrics[f"{name}_difference_{end}_{unit}"] = round(value, 4)
    return metrics


def line(label: str, metrics: dict, name: str, unit: str, shown: str) -> tuple:
    """The cells of one measure; `shown` is the format of its numbers."""
    cells = []
    for model in ("base", "tuned"):
        value, low, high = (metrics[f"{model}_{name}{end}_{unit}"] for end in ("", "_low", "_high"))
        cells.append(f"{value:{shown}} ({low:{shown}} to {high:{shown}})")
    difference = metrics[f"tuned_{name}_{unit}"] - metrics[f"base_{name}_{unit}"]
    if unit == "pct":
        chance = metrics[f"{name}_chance_pct"]
        is_more = chance < 5
        why = f"+{metrics[f'{name}_gained_count']} -{metrics[f'{name}_lost_count']}"
        why += f", p = {chance / 100:.3f}"
    else:
        low, high = (metrics[f"{name}_difference_{end}_{unit}"] for end in ("low", "high"))
        is_more = low > 0 or high < 0
        why = f"{low:+{shown}} to {high:+{shown}}"
    return label, *cells, f"{difference:+{shown}}", f"{'yes' if is_more else 'no'} ({why})"
