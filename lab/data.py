"""What the stages compute on: the data set, and requests of mixed length.

scripts/make_data.py writes the data set; here it is checked rows, and blocks for training.
"""

import json
import random
from pathlib import Path

from lab import ROOT, fail, shown
from lab.training import add_flag

FOLDER = ROOT / "modules" / "06_LLaMA-Factory" / "data"


def rows(name: str) -> list[dict]:
    """Rows {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.

    `name` is a data set of the data folder without `.json` (launch_en_train), or a path. Exit code
    2 with one sentence that names the row and the field when something in it is wrong.
    """
    path = FOLDER / f"{name}.json" if not name.endswith(".json") else Path(name)
    if not path.is_file():
        known = sorted(file.stem for file in FOLDER.glob("launch_*.json"))
        fail(
            f"there is no data set {shown(path)}: choose one of {', '.join(known) or 'none'}, or "
            "write them with 'python scripts/make_data.py'"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        fail(f"{shown(path)} is not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}")
    if not isinstance(content, list) or not content:
        fail(f"{shown(path)} must be a list of rows, and not an empty one")
    for number, row in enumerate(content, 1):
        problem = wrong_in(row)
        if problem:
            fail(f"{shown(path)}: row {number}{problem}")
    return content


def wrong_in(row) -> str:
    """How the sentence about this row goes on; "" where it is right."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return " has no list `messages`"
    for place, message in enumerate(messages):
        role = ("user", "assistant")[place % 2]
        if not isinstance(message, dict):
            return f": field `role` must be {role}, it is {message!r}"
        if message.get("role") != role:
            return f": field `role` must be {role}, it is {message.get('role')}"
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return f": field `content` of the {role} must be a text that is not empty"
    return ""


def pairs(name: str) -> list[dict]:
    """Rows {"messages": [user], "chosen": assistant, "rejected": assistant} of our own data set."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def blocks(tokenizer, name: str, length: int):
    """The data set as chat texts one after another, cut: LongTensor [blocks, length].

    Every block holds the same number of tokens, so that the mean of the processes' losses is the
    loss of all tokens.
    """
    import torch

    text = "".join(
        tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows(name)
    )
    tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    return tokens[: len(tokens) // length * length].view(-1, length)


def endless(loader):
    """The batches of a loader, from the first again after the last."""
    while True:
        yield from loader


TOPICS = [
    "a lighthouse",
    "two graphics cards",
    "the first frost",
    "a lost letter",
    "the night train",
    "an honest merchant",
    "a river in spring",
]


def lognormal(rng: random.Random, mean: float, most: int, sigma: float = 0.8) -> int:
    """A length as skewed as real traffic is: lognormal with this mean, between 4 and `most`.

    Source of sigma: the logarithm of the answer's length has a standard deviation of 0.86 over the
    19,366 conversations and of 0.85 over the 8,819 code completions of Azure's LLM inference trace
    of 2023 (Splitwise, arXiv 2311.18677).
    """
    return min(max(round(mean * rng.lognormvariate(-(sigma**2) / 2, sigma)), 4), most)


def trace(count: int, mean: float, most: int, sigma: float, seed: int) -> list[tuple[str, int]]:
    """`count` requests (prompt, number of output tokens), lengths `lognormal`."""
    rng = random.Random(seed)
    lengths = [lognormal(rng, mean, most, sigma) for _ in range(count)]
    prompts = [
        f"Tell me a story about {rng.choice(TOPICS)} and {rng.choice(TOPICS)}."
        + " Mind every detail." * rng.randint(0, 12)
        for _ in lengths
    ]
    return list(zip(prompts, lengths, strict=True))


def add_trace_flags(parser, defaults) -> None:
    """The flags that `trace_of` reads; `defaults`: the profile's `throughput`."""
    add_flag(parser, "--requests", int, defaults.requests, "how many requests to send")
    add_flag(parser, "--mean-tokens", float, defaults.mean_tokens, "mean length of the outputs")
    add_flag(parser, "--max-tokens", int, defaults.max_tokens, "length of the longest output")
    add_flag(parser, "--sigma", float, 0.8, "spread of the lengths, 0: all equal")
    add_flag(parser, "--seed", int, 0, "seed of the random lengths and prompts")


def trace_of(args) -> list[tuple[str, int]]:
    """The `trace` that the flags ask for. Raises SystemExit(2) where there is no such one."""
    if min(args.requests, args.max_tokens) < 1 or args.mean_tokens <= 0 or args.sigma < 0:
        fail("--requests, --max-tokens and --mean-tokens must be positive, --sigma at least 0")
    return trace(args.requests, args.mean_tokens, args.max_tokens, args.sigma, args.seed)
