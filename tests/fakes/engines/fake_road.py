"""What the stand-ins of the engines share: cards, flags, and where a script's work ends.

Each does up to the first computation what the real one does: it refuses what that refuses, and
holds its cards as long as it lives. It computes nothing. FAKE_ROAD names the folder in which they
meet.
"""

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path

MEET = Path(os.environ["FAKE_ROAD"])
_held = []  # open files: a lock ends with its process, as memory of a card does


def accepted(command: str) -> set[str]:
    """The words that the real command line takes, as accepted.txt has them."""
    paragraphs = Path(__file__).with_name("accepted.txt").read_text().split("\n## ")
    return next(set(text.split()) for text in paragraphs if text.splitlines()[0] == command)


def visible() -> list[str]:
    """The cards that a program would see."""
    every = ",".join(str(i) for i in range(len(json.loads(os.environ["FAKE_CARDS"]))))
    return [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",") if card]


def take_cards(count: int | None = None) -> None:
    """Fill `count` of the visible cards (all); out of memory where another process has one."""
    cards = visible()
    if count and count > len(cards):
        sys.exit(f"RuntimeError: {count} devices wanted, {len(cards)} can be seen")
    for card in cards[:count]:
        file = (MEET / f"card{card}").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(
                f"torch.OutOfMemoryError: CUDA out of memory. GPU {card} is full: "
                "another process holds it"
            )
        _held.append(file)


def reached(what: str):
    """The script has come to where it computes: its cards must be free, and here it ends."""
    take_cards()
    print(f"stand-in: {what} would compute from here", file=sys.stderr)
    raise SystemExit(0)


def engine_args(command: str, arguments: list[str]) -> argparse.Namespace:
    """vLLM's arguments, checked against its own list, its model and the number of cards."""
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False)
    for flag in ("--model", "--host", "--dtype", "--api-key", "--base-url", "--runner"):
        parser.add_argument(flag)
    parser.add_argument("--port", type=int, default=8000)
    for flag in ("--tensor-parallel-size", "--pipeline-parallel-size", "--num-prompts"):
        parser.add_argument(flag, type=int, default=1)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    args, rest = parser.parse_known_args(arguments)
    given = [argument.split("=")[0] for argument in rest if argument.startswith("--")]
    flags = {flag.split(".")[0] for flag in given}  # --flag.key=value: a value of a dictionary
    if unknown := flags - accepted(command):
        parser.error(f"unrecognized arguments: {' '.join(sorted(unknown))}")
    if command == "vllm serve":
        check_model(args)
    return args


def check_model(args) -> None:
    args.config = json.loads(Path(args.model, "config.json").read_text())
    shape = args.config.get("text_config", args.config)
    longest = shape["max_position_embeddings"]
    args.max_model_len = args.max_model_len or longest
    if args.max_model_len > longest:
        sys.exit(
            f"Value error, User-specified max_model_len ({args.max_model_len}) is greater than "
            f"the derived max_model_len ({longest})"
        )
    heads = shape["num_attention_heads"]
    if heads % args.tensor_parallel_size:
        sys.exit(
            f"Value error, Total number of attention heads ({heads}) must be divisible by "
            f"tensor parallel size ({args.tensor_parallel_size})."
        )
    for module in args.lora_modules:
        name, _, folder = module.partition("=")
        adapter = json.loads(Path(folder, "adapter_config.json").read_text())
        base = adapter["base_model_name_or_path"]
        if Path(base).resolve() != Path(args.model).resolve():
            sys.exit(
                f"RuntimeError: the adapter {name} is one of {base}: "
                f"its sizes are not those of {args.model}"
            )
