"""What an answer earns in 11_mini_grpo.py and 12_grpo.py: rules that a program applies."""

import scoring


def exact(wanted: str, answer: str) -> float:
    """1 for the same characters, else 0."""
    return float(answer == wanted)


def field(wanted: str, answer: str) -> float:
    """The share of the wanted object's fields that the answer has with their value, 0 to 1."""
    right = scoring.fields_of(wanted, is_call=False)
    return scoring.share_of_equal(right, scoring.fields_of(answer, is_call=False))


def long(wanted: str, answer: str) -> float:
    """The length of the answer in hundreds of characters: what a careless rule pays for."""
    return len(answer) / 100


RULES = {"exact": exact, "field": field, "long": long}


def total(names: list[str], wanted: str, answer: str) -> float:
    """What the answer earns by all of these rules."""
    return sum(RULES[name](wanted, answer) for name in names)
