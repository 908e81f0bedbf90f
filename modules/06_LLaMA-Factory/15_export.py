"""A tuned model for other programs: GGUF files, a Modelfile for Ollama, a folder for a hub.

    make lf-export                      # after make lf-merge: F16, Q8_0 and Q4_0
    make lf-export SCORE=1              # and what each of them answers to the held-out requests
    make lf-export ARGS="--model runs/models/smollm2-135m --types Q4_1"

A GGUF file is the whole model in one file: weights, tokenizer, chat template, and the numbers of
config.json. In the types that begin with Q, 32 neighbours of a row share a scale, and each of them
keeps 8 or 4 bits. --score opens the files again with transformers, which widens the weights: what
is scored is what the rounding has done, by the same arithmetic for all.
Look at: the size of each file beside that of the model, the bits per weight, and with --score
whether fewer bits still give the same answers.
"""

import argparse
import math

import factory
import scoring

from lab import ROOT, fail, jobs, results, shown
from lab.profile import load_profile
from lab.table import table

MERGED = shown(factory.FOLDER / "merged")
TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    whole = "folder of a whole model, Llama or Qwen2 (default: %(default)s)"
    parser.add_argument("--model", default=MERGED, help=whole)
    trained = "the training that it comes from, for the card (default, of the merged model: lora)"
    parser.add_argument("--adapter", help=trained)
    to = "folder that is written (default: %(default)s)"
    parser.add_argument("--output", default=shown(factory.FOLDER / "export"), help=to)
    kinds = f"of {', '.join(TYPES)} (default: %(default)s)"
    default = ["F16", "Q8_0", "Q4_0"]
    parser.add_argument("--types", nargs="+", choices=TYPES, default=default, help=kinds)
    pushed = "push the merged weights or the adapter alone (default: %(default)s)"
    parser.add_argument("--push", choices=("merged", "adapter"), default="merged", help=pushed)
    parser.add_argument("--score", action="store_true", help="score every export")
    held_out = "held-out data set, by name or file (default: %(default)s)"
    parser.add_argument("--test", default=profile.finetune.test, help=held_out)
    first = "score on the first N rows only (default: all)"
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=first)
    args = parser.parse_args()
    folder = ROOT / args.model
    output = ROOT / args.output
    if not (folder / "config.json").is_file():
        fail(f"there is no model in {args.model}: run 'make lf-merge' first, or name a folder")
    if output.resolve() == folder.resolve():
        fail(f"--output {args.output} is the model's own folder: name another one")
    if not args.adapter and args.model == MERGED:
        args.adapter = shown(factory.FOLDER / "lora")
    if args.adapter:
        args.adapter = shown(factory.adapter_folder(args.adapter))
    if args.score:
        jobs.refuse_taken_cards()
        rows = scoring.converted_rows(args.test, None, args.limit)

    import answering  # the files beside this script
    import card
    import gguf_file
    import modelfile
    from transformers import AutoTokenizer

    # -----------------------------------------------------------------------------
    # 1. One GGUF file of each type, a tensor at a time

    source = gguf_file.read(folder)
    weight_count = sum(math.prod(tensor.shape) for tensor in source.tensors)
    output.mkdir(parents=True, exist_ok=True)
    files = {}
    for kind in args.types:
        files[kind] = output / f"model-{kind}.gguf"
        print(f"writing {shown(files[kind])}", flush=True)
        gguf_file.write(source, kind, files[kind])

    # -----------------------------------------------------------------------------
    # 2. Ollama's Modelfile, which has the chat template once more

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    template = modelfile.go_template(factory.own_system_message(folder), tokenizer)
    served = "Q8_0" if "Q8_0" in files else args.types[-1]
    if template:
        text = modelfile.text(files[served].name, template, tokenizer.eos_token)
        (output / "Modelfile").write_text(text, encoding="utf-8")
        print(f"for Ollama: ollama create tuned -f {shown(output / 'Modelfile')}")
    else:
        (output / "Modelfile").unlink(missing_ok=True)  # of an earlier export
        print("no Modelfile: this chat template is not ChatML; llama.cpp uses the one in the GGUF")

    # -----------------------------------------------------------------------------
    # 3. The folder for a hub

    if args.adapter:
        is_merged = args.push == "merged"
        adapter = ROOT / args.adapter
        name = f"{adapter.name}-{args.push}"
        text = card.text(adapter, name, is_merged)
        card.write(output / "hub", folder if is_merged else adapter, text, is_merged)
        print(f"for a hub: hf upload YOUR_NAME/{name} {shown(output / 'hub')} .")

    # -----------------------------------------------------------------------------
    # 4. How large, and how good

    metrics = {"original_gb": factory.size_gb(folder)}
    metrics |= {f"{kind.lower()}_gb": file.stat().st_size / 1e9 for kind, file in files.items()}
    metrics = {name: round(value, 3) for name, value in metrics.items()}
    if args.score:
        switches = factory.trained(args.model).switches
        questions = scoring.questions(rows, tokenizer, switches)
        prompts = [question.prompt for question in questions]
        most = answering.most_tokens(tokenizer, questions)
        load = scoring.loader(profile)
        batch = profile.finetune.batch_size
        for kind in [None, *files]:
            name = kind.lower() if kind else "original"
            place = output if kind else folder
            inside = {"gguf_file": files[kind].name} if kind else {}
            model = None  # two might not fit on the card
            model = load(place, **inside)
            answers, _ = answering.greedy_answers(model, tokenizer, prompts, batch, most)
            answers = [scoring.without_thoughts(answer) for answer in answers]
            metrics |= scoring.measures(name, questions, answers)
        metrics["row_count"] = len(questions)

    lines = []
    for name in ["original", *map(str.lower, files)]:
        size = metrics[f"{name}_gb"]
        line = [name, f"{size:.3f}", f"{8e9 * size / weight_count:.2f}"]
        if args.score:
            line.append(scoring.exact_shown(metrics, name))
        lines.append(tuple(line))
    header = ["type", "GB", "bits a weight", *["exact, % (95 %)"] * args.score]
    table(header, lines)
    config = {"model": args.model, "test": args.test, "types": args.types}
    results.finish(__file__, metrics, config)


if __name__ == "__main__":
    main()
