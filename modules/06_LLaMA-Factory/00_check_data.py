"""Look at a data set before it is trained on: as LLaMA-Factory reads it, as the model will see it.

    make lf-check-data                                    # the training data of this profile
    make lf-check-data FILE=my.jsonl                      # a file of yours; INFO=dataset_info.json
    make lf-check-data FILE=my.jsonl ARGS="--held-out my_test.jsonl --cutoff-len 512"
    make lf-check-data ARGS="--training enable_thinking=false"      # as a training will be told
    make lf-new-data FILE=my.jsonl                        # write its entry into dataset_info.json

Look at: the rows (`masked` is only read, `trained` counts in the loss), the token counts, and the
last lines: rows that repeat or that are held out, and whether the template says what the model's
own chat template says. A wrong row is named, with its field.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import checks
import entries
import factory
import views

from lab import ROOT, fail, models, results
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent
NOT_HERE = "the rows of {} are in no file here: LLaMA-Factory fetches them"


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The data
    what = "file, folder or name of a data set (default: the profile's training data)"
    parser.add_argument("file", nargs="?", help=what)
    parser.add_argument("--info", help="dataset_info.json with the file's entry (default: beside)")
    parser.add_argument("--media-dir", help="folder of the pictures (default: the file's)")
    held_out = "data set or file whose rows training must not have"
    parser.add_argument("--held-out", metavar="NAME", help=held_out)
    parser.add_argument("--write", action="store_true", help="write an entry that fits the file")
    # How it is trained on
    models.add_model_flag(parser, profile.finetune.model)
    parser.add_argument("--stage", choices=entries.STAGES, help="(default: by the entry)")
    longest = "tokens of a row, what is longer is cut (default: the training's)"
    parser.add_argument("--cutoff-len", type=int, metavar="N", help=longest)
    given = "settings that the training will be given: template, mask_history ..."
    parser.add_argument("--training", nargs="+", default=[], metavar="KEY=VALUE", help=given)
    # What is shown
    parser.add_argument("--brief", action="store_true", help="only say what is wrong")
    parser.add_argument("--rows", type=int, default=3, help="rows to show (default: %(default)s)")
    args = parser.parse_args()

    settings, yours = checks.told(args.training, profile)
    if (args.cutoff_len is not None and args.cutoff_len < 1) or args.rows < 0:
        fail("--cutoff-len must be at least 1, --rows at least 0")

    # -----------------------------------------------------------------------------
    # 1. The entry: what LLaMA-Factory is told of the file

    info = Path(args.info) if args.info else None
    media = Path(args.media_dir) if args.media_dir else None
    ours = ROOT / settings.dataset_dir
    name, entry, folder = entries.find(args.file or settings.dataset, info, ours)
    problem = entries.wrong_in_entry(entry)
    if problem:
        fail(f"the entry {name}{problem}")
    stage = args.stage or entries.usual_stage(entry)
    if args.brief:
        entries.check(name, entry, folder, stage, media=media)
        return
    print(f"{name}: {json.dumps(entry, ensure_ascii=False)}")
    checked = entries.check(name, entry, folder, stage, most=10, media=media)
    if not checked:
        fail(NOT_HERE.format(name))
    rows, attr = checked
    print(f"{len(rows)} rows, none is wrong")
    if args.write:
        return entries.write(name, entry, folder)

    # -----------------------------------------------------------------------------
    # 2. The rows in tokens, by LLaMA-Factory's converter and template

    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.processor.processor_utils import infer_seqlen
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    model = models.model_folder(args.model, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = AutoTokenizer.from_pretrained(model)  # LLaMA-Factory changes its tokenizer's template
    system = factory.own_system_message(model)
    template_name = yours.get("template", models.entry(args.model)[1].get("template"))
    checks.template(template_name)
    told = DataArguments(
        template=template_name,
        default_system=settings.get("default_system", system if template_name else None),
        enable_thinking=settings.get("enable_thinking", True),
        mask_history=settings.get("mask_history", False),
        cutoff_len=2**20,  # whole rows; what will be cut is counted below
        media_dir=str(media or folder),
    )
    template = get_template_and_fix_tokenizer(tokenizer, told)
    takes_pictures = bool(template.mm_plugin.image_token)
    template.mm_plugin = get_mm_plugin("base")  # only the texts are looked at here
    convert = get_dataset_converter(attr.formatting, attr, told)
    converted = [convert(row) for row in rows]
    processor = SupervisedDatasetProcessor(template, tokenizer, None, told)

    def encode(row: dict, answer: dict) -> tuple[list[int], list[int]]:
        """Token ids and labels of the row with one of its answers; -100 is masked."""
        if stage == "pt":  # plain text: all of it is learnt
            ids = tokenizer(row["_prompt"][0]["content"])["input_ids"][: told.cutoff_len]
            return ids, ids
        context = (row["_system"], row["_tools"], [], [], [])
        if stage in ("dpo", "rm", "kto"):  # only the last answer counts
            parts = (tokenizer, [*row["_prompt"], answer], *context[:2])
            prompt, target = template.encode_oneturn(*parts)
            kept_prompt, kept_target = infer_seqlen(len(prompt), len(target), told.cutoff_len)
            ids = prompt[:kept_prompt] + target[:kept_target]
            return ids, [-100] * kept_prompt + target[:kept_target]
        return processor._encode_data_example(row["_prompt"], [answer], *context)

    nothing = [{"role": "assistant", "content": ""}]
    texts = [
        (row, answer)
        for row in converted
        for answer in (nothing if stage == "pt" else row["_response"])
        if answer["content"] or stage == "pt"
    ]
    print(f"tokenizing {len(texts):,} texts ...", file=sys.stderr, flush=True)
    whole = [encode(row, answer) for row, answer in texts]
    cutoff_len = args.cutoff_len or settings.cutoff_len
    told.cutoff_len = cutoff_len
    kept = [encode(row, answer) for row, answer in texts]

    # -----------------------------------------------------------------------------
    # 3. Some of them, as the model will see them

    for number, (ids, labels) in enumerate(kept[: args.rows], 1):
        trained = sum(label != -100 for label in labels)
        print(f"\ntext {number}: {len(ids)} tokens, {trained} count in the loss")
        for masked, run in itertools.groupby(zip(ids, labels, strict=True), lambda t: t[1] == -100):
            text = tokenizer.decode([token for token, _ in run])
            for line in text.splitlines():
                print(f"  {'masked ' if masked else 'trained'}  {line[:120]}")
    if attr.images and takes_pictures:
        print("\npictures: their tokens are not counted here")
    elif attr.images:
        print(
            f"\npictures: template {template_name} takes none, and so a training ends with an "
            "error: --model a vision-language model"
        )

    # -----------------------------------------------------------------------------
    # 4. All of them: lengths, repetitions, and rows that training must not have

    lengths = [len(ids) for ids, _ in whole]
    print(f"\ntokens of a text (cutoff_len {cutoff_len})")
    views.histogram(lengths, cutoff_len)
    lost = [
        sum(label != -100 for label in labels) - sum(label != -100 for label in left)
        for (_, labels), (_, left) in zip(whole, kept, strict=True)
    ]
    cut = sum(length > cutoff_len for length in lengths)
    unlearnt = sum(set(labels) <= {-100} for _, labels in kept)
    print(
        f"cut: {cut} texts are longer, {sum(tokens > 0 for tokens in lost)} of them lose a part of "
        f"the answer, {unlearnt} all of it"
    )
    contents = Counter(json.dumps(row, sort_keys=True, default=str) for row in converted)
    repeated = sum(count - 1 for count in contents.values())
    print(f"repeated: {repeated} of {len(converted)} rows are the same as an earlier one")
    leaked = None
    if args.held_out:
        other = entries.find(args.held_out, info, ours)
        tests, test_attr = entries.check(*other, stage) or fail(NOT_HERE.format(args.held_out))
        read = get_dataset_converter(test_attr.formatting, test_attr, told)
        asked = {json.dumps(row["_prompt"]) for row in converted}
        leaked = sum(json.dumps(read(row)["_prompt"]) in asked for row in tests)
        print(f"held out: {leaked} of {len(tests)} prompts of {args.held_out} are in training too")

    # -----------------------------------------------------------------------------
    # 5. The template, and the model's own: every server later speaks by the second

    differ = None
    if chat.chat_template and stage != "pt":
        pairs = [
            (ids, views.own_tokens(chat, row, answer, factory.template_switches(settings)))
            for (ids, _), (row, answer) in zip(whole, texts, strict=True)
        ]
        unlike = [pair for pair in pairs if not views.same_tokens(*pair, chat)]
        differ = len(unlike)
        print(
            f"template {template_name or '(none: derived)'}: {len(pairs) - differ} of {len(pairs)} "
            "texts are, token for token, what the model's own chat template makes of them"
        )
        thoughts = views.empty_thoughts(template, texts)
        if thoughts:
            print(f"  {thoughts}")
        if unlike:
            views.print_difference(*unlike[0], chat)
    metrics = {
        "row_count": len(rows),
        "tokens_count": sum(lengths),
        "longest_tokens_count": max(lengths, default=0),
        "cut_count": cut,
        "unlearnt_count": unlearnt,
        "repeated_count": repeated,
        "leaked_count": leaked,
        "template_differs_count": differ,
    }
    results.finish(__file__, metrics, {"entry": entry, "model": args.model, "stage": stage})


if __name__ == "__main__":
    main()
