"""The command line of scripts/plan.py, and the question that it asks."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import fields

from lab import fail
from lab.planner import constants
from plan_parts import SETUPS, TWO_4090S, Cards, Request, request


def read_line(line: str, cards: Cards = TWO_4090S) -> Request:
    """The question of a command line, as configs/calibration.yaml writes it."""
    return asked(parser(cards).parse_args(shlex.split(line)), cards)


def asked(args: argparse.Namespace, cards: Cards) -> Request:
    """The question of parsed arguments."""
    setup = SETUPS[args.task]
    options = {
        field.name: getattr(args, field.name)
        for field in fields(setup)
        if hasattr(args, field.name)
    }
    options |= memory_of_cards(args)
    if args.task == "train" and args.engine is None:
        deepspeed = args.zero or args.offload != "none"  # FSDP is asked for by its name
        options["engine"] = "deepspeed" if deepspeed else "ddp"
    question = request(args.model, setup(**options), cards)
    return question._replace(engine=getattr(args, "engine", None) or "")


def memory_of_cards(args: argparse.Namespace) -> dict:
    """The fields of a setup that say how large the cards are: one size, or one for each card."""
    sizes = args.gpu_memory_gib
    if len(sizes) == 1:
        return {"gpu_memory_gib": sizes[0]}
    if len(sizes) != args.gpus:
        fail(f"--gpu-memory-gib names {len(sizes)} cards, and --gpus {args.gpus}")
    same = {"gpu_memory_gib": min(sizes)}
    return same | ({"memories_gib": sizes} if args.task == "serve" else {})


# -----------------------------------------------------------------------------
# Types: a number in its bounds, or one sentence


def at_least(least: float, kind: type, otherwise: str) -> Callable[[str], float]:
    """A type for argparse: a number of `kind`, `least` or more."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 1e12:
            fail(f"{otherwise}, it is {text}")
        return value

    return read


count = at_least(1, int, "a count must be a whole number of at least 1")
memory = at_least(0.1, float, "memory must be at least 0.1 GiB")


def of_each(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """A type for argparse: numbers of a kind, with commas between them."""
    return lambda text: tuple(kind(part) for part in text.split(","))


elements = at_least(1, float, "a bucket has at least 1 element")
share = at_least(
    0.01, float, "--gpu-memory-utilization is a share of the card, above 0 and at most 1"
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One sentence, as everywhere in this repository."""
        fail(message)


# -----------------------------------------------------------------------------
# The parser


def parser(cards: Cards, description: str = "") -> argparse.ArgumentParser:
    """The three tasks; what a line does not say of the cards is as in `cards`."""
    formatter = argparse.RawDescriptionHelpFormatter
    whole = Parser(description=description, formatter_class=formatter)
    tasks = whole.add_subparsers(dest="task", metavar="serve|train|image-edit")
    shared = Parser(add_help=False)
    add_cards(shared, cards)
    serve = tasks.add_parser("serve", parents=[shared], help="vLLM")
    train = tasks.add_parser("train", parents=[shared], help="full, LoRA or QLoRA fine-tuning")
    edit = tasks.add_parser("image-edit", parents=[shared], help="Qwen-Image-Edit")
    model = "name in configs/models.yaml, hub id, folder or config.json"
    serve.add_argument("--model", required=True, help=model)
    train.add_argument("--model", required=True, help=model)
    edit.add_argument("--model", default="qwen-image-edit", help=model)
    add_serve(serve)
    add_train(train)
    add_image_edit(edit)
    return whole


def add_cards(parser: Parser, cards: Cards) -> None:
    names = " and an ".join(cards.names)
    parser.add_argument(
        "--gpus", type=count, default=cards.count, help="cards (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-gib",
        type=of_each(memory),
        default=(cards.memory_gib,),
        metavar="GIB[,GIB...]",
        help="of one card as CUDA sees it, or of each card in turn "
        f"(default: {cards.memory_gib:g}, as an {names})",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def add_serve(parser: Parser) -> None:
    # The cards, and how the model is divided over them.
    parser.add_argument(
        "--gpu-memory-utilization",
        type=share,
        help="share of the card that vLLM takes (default: 0.9, or less where CUDA graphs and NCCL "
        "would not fit beside it)",
    )
    parser.add_argument(
        "--tp",
        type=count,
        help="tensor parallel size (default: as many cards as --pp leaves and the model allows)",
    )
    parser.add_argument("--pp", type=count, default=1, help="pipeline parallel size")
    parser.add_argument(
        "--pp-layers",
        type=of_each(count),
        default=(),
        metavar="N,N...",
        help="layers of each stage of the pipeline (VLLM_PP_LAYER_PARTITION; default: even)",
    )
    parser.add_argument(
        "--free-memory-gib",
        type=memory,
        help="what is free on a card before vLLM starts: less than all of it beside a desktop or "
        "under WSL2 (default: all of it)",
    )

    # Weights and cache.
    only_stored = ("mxfp4", "nvfp4")  # no flag of vLLM makes these
    dtypes = ["auto", *(kind for kind in constants.LINEAR_BYTES if kind not in only_stored)]
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights")
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")

    # Requests.
    parser.add_argument(
        "--max-model-len",
        type=count,
        help="tokens of the longest request (default: the model's own limit)",
    )
    parser.add_argument(
        "--concurrency", type=count, default=1, help="requests of that length to hold at once"
    )
    parser.add_argument("--max-num-seqs", type=count, default=256)
    parser.add_argument("--max-num-batched-tokens", type=count, default=2048)
    parser.add_argument("--block-size", type=count, default=16, help="tokens of a block")
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--language-model-only",
        action="store_true",
        help="leave the vision tower out: the server takes no pictures",
    )


def add_train(parser: Parser) -> None:
    # What is trained, and by which engine.
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="full")
    parser.add_argument(
        "--loss",
        choices=["sft", "dpo", "kto", "simpo", "orpo"],
        default="sft",
        help="on answers, or on preferences (default: %(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=["ddp", "fsdp", "deepspeed"],
        help="(default: deepspeed with --zero 1 to 3, else ddp)",
    )
    parser.add_argument("--zero", type=int, choices=range(4), default=0)
    parser.add_argument(
        "--offload",
        choices=["none", "optimizer", "optimizer+param"],
        default="none",
        help="to the host; FSDP moves all or nothing (default: %(default)s)",
    )
    parser.add_argument("--offload-device", choices=["cpu", "nvme"], default="cpu")
    parser.add_argument(
        "--load",
        choices=["divided", "whole"],
        help="whole: on each card, before ZeRO-3 or FSDP divides it, as with zero3_init_flag: "
        "false (default: divided, but whole with qlora, as transformers 5.6 packs it)",
    )

    # A step.
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the computation (default: %(default)s, mixed precision)",
    )
    parser.add_argument(
        "--seq-len", type=count, default=1024, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--image-tokens",
        type=at_least(0, int, "--image-tokens must be a whole number of at least 0"),
        default=0,
        help="of these, tokens of pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--micro-batch",
        type=count,
        default=1,
        help="sequences of one card and micro-step (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulate",
        type=count,
        default=1,
        help="micro-steps of one optimizer step (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep only the layers' inputs, compute the rest again",
    )

    # Details.
    parser.add_argument("--host-memory-gib", type=memory, help="of the host (default: not checked)")
    parser.add_argument(
        "--bucket",
        type=elements,
        default=1e8,
        help="reduce_bucket_size, elements (default: %(default)g)",
    )
    parser.add_argument("--lora-rank", type=count, default=16)


def add_image_edit(parser: Parser) -> None:
    parser.add_argument(
        "--recipe",
        default="plain",
        help="plain (bf16), fp8, nf4, gguf, model-offload, group-offload, sequential-offload "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--size", type=count, default=1024, help="pixels of a side (default: %(default)s)"
    )
