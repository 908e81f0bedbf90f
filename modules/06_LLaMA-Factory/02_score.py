"""Score the base model and the tuned one on held-out requests: what is right, what is forgotten.

    make lf-score                       # after make lf-train
    make lf-score ARGS="--train"        # train first: before and after in one go
    make lf-score ARGS="--adapter runs/06_LLaMA-Factory/lora_z2 --limit 16"
    make lf-score ARGS="--test my_test.jsonl"    # any file that make lf-check-data understands

The held-out split has phrasings and combinations of values that training does not have, so memory
alone scores nothing. The last answer of each row is asked for, given all before it (system, turns,
tools), and counts only when it is the expected text, character for character; of a call of a tool,
the same call. The prompt is made by the model's own chat template, as a server would make it.
Look at: the same request before and after, the measures with their 95 % intervals, what the model
has forgotten, and the answers that are still wrong.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import factory
import scoring
import showing
from answering import greedy_answers, loss_of, most_tokens

from lab import RUNS, fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent
# Nothing of the task: what a model can lose by learning it
NEUTRAL = HERE / "data" / "neutral.txt"
GENERAL = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue?",
    "Give me three tips for sleeping better.",
    "Write one sentence about the sea.",
)
GENERAL_TOKENS = 32


class Measured(NamedTuple):
    answers: list[str]  # to the questions, greedy
    tokens: list[list[int]]  # of each answer, without the end of its turn
    seconds: float  # of answering
    losses: list[tuple[float, int]]  # (sum, tokens) of each wanted answer
    neutral: float  # mean loss of the neutral text
    most: int  # tokens that an answer may have
    general: list[str]  # answers to GENERAL


def measure(model, tokenizer, questions: list[scoring.Question], batch_size: int) -> Measured:
    """Everything that is measured of one model, here of the base and of the tuned one."""
    import torch

    most = most_tokens(tokenizer, questions)
    asked = [[{"role": "user", "content": request}] for request in GENERAL]
    general = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    with torch.inference_mode():
        began = time.monotonic()
        prompts = [question.prompt for question in questions]
        answers, tokens = greedy_answers(model, tokenizer, prompts, batch_size, most)
        seconds = time.monotonic() - began
        losses = [loss_of(model, tokenizer, one.prompt, one.target) for one in questions]
        paragraphs = NEUTRAL.read_text(encoding="utf-8").strip().split("\n\n")
        neutral = [loss_of(model, tokenizer, "", paragraph) for paragraph in paragraphs]
        kept, _ = greedy_answers(model, tokenizer, general, batch_size, GENERAL_TOKENS)
    answers = [scoring.without_thoughts(answer) for answer in answers]
    return Measured(answers, tokens, seconds, losses, scoring.mean_loss(neutral)[0], most, kept)


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What is scored
    factory.add_adapter_flag(parser)
    base = "the base model, where it lies elsewhere now (default: the one of the training)"
    parser.add_argument("--model", help=base)
    parser.add_argument("--train", action="store_true", help="run 01_train.py first")
    parser.add_argument("--no-base", action="store_true", help="score the tuned model only")
    # On what
    held_out = "held-out data set, by name or file (default: %(default)s)"
    parser.add_argument("--test", default=profile.finetune.test, help=held_out)
    parser.add_argument("--info", help="dataset_info.json that has the data set's entry")
    first = "take only the first N rows (default: all)"
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=first)
    together = "requests that are answered at a time (default: %(default)s)"
    parser.add_argument(
        "--batch-size", type=int, default=profile.finetune.batch_size, help=together
    )
    answers = shown(RUNS / HERE.name / "answers.json")
    parser.add_argument("--answers", default=answers, help="written (default: %(default)s)")
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The held-out rows, and what has been trained

    if args.batch_size < 1 or args.limit < 0:
        fail("--batch-size must be at least 1, --limit at least 0")
    jobs.refuse_taken_cards()
    if not args.train:
        factory.trained(args.adapter, args.model)  # what is not there is said at once
    rows = scoring.converted_rows(args.test, args.info, args.limit)
    if args.train:
        factory.train_first(HERE / "01_train.py")
    trained = factory.trained(args.adapter, args.model)

    from transformers import AutoTokenizer

    load = scoring.loader(profile)
    source = trained.base or trained.folder
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    questions = scoring.questions(rows, tokenizer, trained.switches)

    # -----------------------------------------------------------------------------
    # 2. Without the adapter, then with it; of a whole model, one after the other

    measured = {}
    model = None
    if trained.base and (trained.is_adapter or not args.no_base):
        model = load(trained.base)
    if model and not args.no_base:
        measured["base"] = measure(model, tokenizer, questions, args.batch_size)
    if trained.is_adapter:
        model = scoring.put_on(model, trained.folder)
    else:
        model = None  # two might not fit on the card
        model = load(trained.folder)
    measured["tuned"] = measure(model, tokenizer, questions, args.batch_size)

    # -----------------------------------------------------------------------------
    # 3. Before and after

    answers = {name: one.answers for name, one in measured.items()}
    right = [scoring.is_right(*pair) for pair in zip(questions, answers["tuned"], strict=True)]
    metrics = {"row_count": len(questions), "wrong_count": right.count(False)}
    metrics["most_tok_count"] = measured["tuned"].most
    for name, one in measured.items():
        metrics |= scoring.measures(name, questions, one.answers)
        for end, value in zip(("", "_low", "_high"), scoring.mean_loss(one.losses), strict=True):
            metrics[f"{name}{end}_loss"] = round(value, 4)
        metrics[f"{name}_neutral_loss"] = round(one.neutral, 4)
        metrics[f"{name}_s"] = round(one.seconds, 1)
    general = {name: one.general for name, one in measured.items()}
    if "base" in measured:
        pairs = zip(general["base"], general["tuned"], strict=True)
        metrics["kept_count"] = sum(before == after for before, after in pairs)
    showing.examples(questions, answers, right)
    showing.measures(metrics, list(measured))
    showing.forgetting(metrics, general, GENERAL)
    saved = [question._asdict() for question in questions]
    for name, one in measured.items():
        for row, answer, tokens, loss in zip(
            saved, one.answers, one.tokens, one.losses, strict=True
        ):
            row |= {name: answer, f"{name}_tokens": tokens, f"{name}_loss": loss[0] / loss[1]}
    scoring.save(Path(args.answers), saved)
    print(f"all answers: {args.answers}")
    config = {"adapter": args.adapter, "test": args.test, "dtype": profile.finetune.dtype}
    variant = "" if trained.folder.name == "lora" else trained.folder.name
    results.finish(__file__, metrics, config, variant)


if __name__ == "__main__":
    main()
