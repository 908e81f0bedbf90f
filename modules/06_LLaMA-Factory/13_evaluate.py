"""Evaluate the base and the tuned model beyond the one task that was trained.

    make lf-evaluate                        # after make lf-train
    make lf-evaluate ARGS="--limit 64"      # all requests too, not only ten: takes longer
    make lf-evaluate ARGS="--adapter runs/06_LLaMA-Factory/merged --model smollm2-135m"

Both models get the same items: requests in the form that was trained, the same requests asked in
another form, texts and general questions, English and Chinese. likelihood.py measures options,
comparing.py judges answers and says whether two results differ.
Look at: the two forms of one skill side by side; what was lost (bits per byte, acc); and the last
column. An interval says how sure a number is, the last column whether the *difference* is more
than noise: the items are the same, and so it sees more than the two intervals do.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import comparing
import factory
import scoring
import showing

from lab import fail, jobs, results
from lab.profile import load_profile
from lab.table import table

DATA = Path(__file__).resolve().parent / "data"
TEXTS = {"en": DATA / "neutral.txt", "zh": DATA / "neutral_zh.txt"}
REQUESTS = 10  # of each form, without --limit: writing answers takes most of the time
SHARES = {  # measures that are right or wrong for each item
    "trained": "trained form, exact (%)",
    "other": "another form, exact (%)",
    "holds": "  its answer holds the value (%)",
    "acc_en": "choices en, acc (%)",
    "acc_norm_en": "choices en, acc_norm (%)",
    "acc_zh": "choices zh, acc (%)",
    "acc_norm_zh": "choices zh, acc_norm (%)",
    "wins": "the better answer, by rules (%)",
}


class Text(NamedTuple):
    nats: float  # its summed loss
    tokens: int
    bytes: int  # in UTF-8


class Measured(NamedTuple):
    right: dict[str, list[bool]]  # of each measure of SHARES, each item
    texts: dict[str, list[Text]]  # of each paragraph, of each language
    answers: dict[str, list[str]]  # to the requests in each form


def holds(question: scoring.Question, answer: str) -> bool:
    """Whether the wanted value stands anywhere in the answer, as a word of its own."""
    value = rf"(?<![\w.-]){re.escape(question.wanted)}(?![\w-]|\.\d)"
    return re.search(value, answer) is not None


def per(unit: str, text: Text) -> tuple[float, int]:
    """(amount, size): nats and tokens, or the bits that the text takes where it is coded by the
    model's probabilities, and its bytes."""
    if unit == "loss":
        return text.nats, text.tokens
    return text.nats / math.log(2), text.bytes


def measure(model, tokenizer, forms: dict, limit: int | None, batch_size: int) -> Measured:
    """Everything, of one model. `forms`: the questions in the trained and in the other form."""
    import answering  # the files beside this script
    import likelihood
    import torch

    most = answering.most_tokens(tokenizer, forms["trained"])
    answers = {}
    right = {}
    texts = {}
    with torch.inference_mode():
        prompts = [question.prompt for questions in forms.values() for question in questions]
        together, _ = answering.greedy_answers(model, tokenizer, prompts, batch_size, most)
        written = iter(together)
        for name, questions in forms.items():
            answers[name] = [next(written) for _ in questions]
            pairs = list(zip(questions, answers[name], strict=True))
            right[name] = [scoring.is_right(*pair) for pair in pairs]
        right["holds"] = [holds(*pair) for pair in pairs]
        for language, file in TEXTS.items():
            texts[language] = []
            for paragraph in file.read_text(encoding="utf-8").strip().split("\n\n")[:limit]:
                nats, tokens = answering.loss_of(model, tokenizer, "\n", paragraph)
                texts[language].append(Text(nats, tokens, len(paragraph.encode())))
            asked = likelihood.read_choices(DATA / f"choices_{language}.jsonl")[:limit]
            logps = [likelihood.option_logps(model, tokenizer, one, language) for one in asked]
            for metric, per_character in (("acc", False), ("acc_norm", True)):
                right[f"{metric}_{language}"] = [
                    likelihood.chosen(one, each, per_character) == one.answer
                    for one, each in zip(asked, logps, strict=True)
                ]
    return Measured(right, texts, answers)


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    factory.add_adapter_flag(parser)
    parser.add_argument("--model", help="the base model (default: the one of the training)")
    first = f"take the first N items of each kind (default: all, but {REQUESTS} requests)"
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=first)
    together = "requests that are answered at a time (default: %(default)s)"
    parser.add_argument(
        "--batch-size", type=int, default=profile.finetune.batch_size, help=together
    )
    args = parser.parse_args()
    if args.batch_size < 1 or args.limit < 0:
        fail("--batch-size must be at least 1, --limit at least 0")
    jobs.refuse_taken_cards()
    trained = factory.trained(args.adapter, args.model)
    if trained.base is None:
        fail(f"{args.adapter} does not say which model it was tuned from: name it with --model")

    # -----------------------------------------------------------------------------
    # 1. The same items for both models

    from transformers import AutoTokenizer

    load = scoring.loader(profile)
    tokenizer = AutoTokenizer.from_pretrained(trained.base, padding_side="left")
    forms = {}
    for name, test in (("trained", "test"), ("other", "asked")):
        test = profile.finetune.test.replace("_test", f"_{test}")
        rows = scoring.converted_rows(test, None, args.limit or REQUESTS)
        forms[name] = scoring.questions(rows, tokenizer, trained.switches)
    sizes = (args.limit or None, args.batch_size)
    model = load(trained.base)
    base = measure(model, tokenizer, forms, *sizes)
    if trained.is_adapter:
        model = scoring.put_on(model, trained.folder)
    else:
        model = None  # two might not fit on the card
        model = load(trained.folder)
    tuned = measure(model, tokenizer, forms, *sizes)

    # -----------------------------------------------------------------------------
    # 2. Of two answers the better one, by rules

    pairs = zip(forms["trained"], tuned.answers["trained"], base.answers["trained"], strict=True)
    verdicts = [comparing.verdict(*one) for one in pairs]
    base.right["wins"] = [verdict < 0 for verdict in verdicts]
    tuned.right["wins"] = [verdict > 0 for verdict in verdicts]

    # -----------------------------------------------------------------------------
    # 3. Which differences are more than noise

    metrics = {}
    lines = []
    for name, label in SHARES.items():
        metrics[f"{name}_item_count"] = len(base.right[name])
        metrics |= comparing.shares(name, base.right[name], tuned.right[name])
        lines.append(comparing.line(label, metrics, name, "pct", ".1f"))
    for language in TEXTS:
        name = f"text_{language}"
        both = (base.texts[language], tuned.texts[language])
        for unit in ("bits_per_byte", "loss"):
            rows = [[per(unit, text) for text in texts] for texts in both]
            metrics |= comparing.rates(name, unit, *rows)
        label = f"text {language}, bits per byte"
        lines.append(comparing.line(label, metrics, name, "bits_per_byte", ".3f"))
        losses = [metrics[f"{model}_{name}_loss"] for model in ("base", "tuned")]
        lines.append(("  perplexity of a token", *(f"{math.exp(loss):.1f}" for loss in losses)))
    for number, question in enumerate(forms["other"][:3]):
        print(f"request   {showing.on_one_line(question.request)}")
        for name, model in (("base", base), ("tuned", tuned)):
            print(f"  {name:<6}  {showing.on_one_line(model.answers['other'][number])}")
        print(f"  wanted  {question.wanted}\n")
    print("each measure with its 95 % interval")
    table(("", "base", "tuned", "difference", "more than noise"), lines)
    print("  +gained -lost: items that only the tuned, or only the base model gets right")
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
