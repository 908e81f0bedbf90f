"""The whole road: check, train, score, merge, serve by vLLM, and score what is served.

    make lf-loop                        # trains where no adapter lies in runs/06_LLaMA-Factory/lora
    make lf-loop ARGS="--limit 16"      # fewer requests
    make lf-loop ARGS="--adapter runs/06_LLaMA-Factory/lora_z2"

Every step is the script that its own make target runs. The same requests are answered four times:
by transformers with the adapter, by transformers with the merged model, by vLLM with the merged
model, and by vLLM with the base model on which it puts the adapter (--enable-lora). The last two go
over HTTP, as a program of yours would ask. In float32 all four give the same tokens; in bf16 the
merging rounds, and a near tie may fall otherwise.
Look at: the column `same tokens`, and the plot.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import factory
import loop_parts
import scoring

from lab import ROOT, fail, jobs, results, shown
from lab.profile import load_profile, need_vllm
from lab.table import table

HERE = Path(__file__).resolve().parent
SERVE = ROOT / "modules/03_vllm/01_serve.py"
LOG = factory.FOLDER / "loop.log"
AT_ONCE = 8  # requests that are under way over HTTP


def step(*command) -> tuple[dict, float]:
    """Run one of our scripts: (its result, seconds). Its output goes to the log, errors to the
    screen; where it fails, this ends with its exit code."""
    script, *flags = map(str, command)
    print(shlex.join(["python", shown(script), *flags]), flush=True)
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "STORE"}
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"--- {shlex.join([script, *flags])}\n")
        command = [sys.executable, script, *flags]
        last = ""
        with factory.child(command, text=True, stdout=subprocess.PIPE, env=environment) as process:
            for line in process.stdout:
                log.write(line)
                last = line
    return json.loads(last) if last.startswith("{") else {}, time.monotonic() - began


def ask(client, model: str, row: dict, most: int, switches: dict) -> tuple[str, list[int]]:
    """What the server answers to a row of answers.json, greedily: (text, tokens)."""
    reply = client.chat.completions.create(
        model=model,
        messages=row["messages"],
        tools=row["tools"] or None,
        temperature=0,
        max_tokens=most,
        extra_body={"return_token_ids": True, "chat_template_kwargs": switches},
    )
    choice = reply.choices[0]
    tokens = list(choice.token_ids)
    if choice.finish_reason != "length":
        tokens = tokens[:-1]  # the end of the turn
    return loop_parts.text_of(choice.message), tokens


def served(name: str, flags: list[str], rows: list[dict], most: int, switches: dict):
    """Start vLLM with these flags, ask for every row, end it: (answers, seconds of all that)."""
    import openai

    began = time.monotonic()
    step(SERVE, *flags)
    server = jobs.running()["vllm"]
    try:
        key = os.environ.get("VLLM_API_KEY", "unused")
        client = openai.OpenAI(base_url=f"{server['address']}/v1", api_key=key, max_retries=0)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda row: ask(client, name, row, most, switches), rows))
    except openai.APIError as e:
        fail(f"the server gave no answer: {e.message}; its log: {shown(server['log'])}")
    finally:
        jobs.stop(server)
    return answers, time.monotonic() - began


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    factory.add_adapter_flag(parser)
    held_out = "held-out data set, by name or file (default: %(default)s)"
    parser.add_argument("--test", default=profile.finetune.test, help=held_out)
    first = "take only the first N rows (default: all)"
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=first)
    parser.add_argument("--train", action="store_true", help="train, though an adapter is there")
    args = parser.parse_args()
    need_vllm()
    if "vllm" in jobs.running():
        fail("a server of this repository runs already: end it with 'make stop' first")
    jobs.refuse_taken_cards()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that each `finally` runs
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("")

    # -----------------------------------------------------------------------------
    # 1. Check and train

    stages = {}  # of each that answers: [(answer, its tokens)] of the questions
    seconds = {}  # of each step
    checked, seconds["check"] = step(HERE / "00_check_data.py", "--held-out", args.test)
    print(f"  {checked['row_count']} rows, {checked['leaked_count']} of them held out")
    lora = ROOT / args.adapter
    if args.train or not (lora / "config.yaml").is_file():
        if lora != factory.FOLDER / "lora":
            fail(f"there is no adapter in {args.adapter}, and lf-train writes another folder")
        _, seconds["train"] = step(HERE / "01_train.py", "--resume-or-begin")
    else:
        print(f"  {args.adapter} is trained already (--train: once more)")
    trained = factory.trained(args.adapter)
    if not trained.base:
        fail(f"{args.adapter} is merged already: give the folder that training wrote")

    # -----------------------------------------------------------------------------
    # 2. Score, merge, score what is merged

    asked = ["--test", args.test, "--limit", args.limit]
    file = factory.FOLDER / "loop_answers.json"
    score = [HERE / "02_score.py", *asked, "--answers", file, "--adapter"]
    metrics, seconds["score"] = step(*score, args.adapter)
    rows = json.loads(file.read_text(encoding="utf-8"))
    most = metrics["most_tok_count"]
    for name in ("base", "tuned"):
        stages[name] = [(row[name], row[f"{name}_tokens"]) for row in rows]
    merged = trained.folder
    why_not = loop_parts.not_for_vllm(trained)
    if trained.is_adapter:
        merged = factory.FOLDER / "merged"
        merge = [HERE / "03_merge.py", "--adapter", args.adapter, "--output", shown(merged)]
        # Of an adapter trained on 4 bits too: the W on which the others put it
        _, seconds["merge"] = step(*merge, "--into", "original")
        _, seconds["score merged"] = step(*score, shown(merged))
        alone = json.loads(file.read_text(encoding="utf-8"))
        stages["merged"] = [(row["tuned"], row["tuned_tokens"]) for row in alone]

    # -----------------------------------------------------------------------------
    # 3. Serve, and score what is served

    common = ["--dtype", profile.finetune.dtype]
    model = ["--model", shown(merged), "--served-model-name", "merged"]
    name = "vLLM, merged"
    stages[name], seconds[name] = served("merged", [*model, *common], rows, most, trained.switches)
    if why_not:
        print(why_not)
    else:
        rank = loop_parts.rank_of(trained.folder)
        lora = ["--enable-lora", "--max-lora-rank", rank, "--lora-modules"]
        model = ["--model", shown(trained.base), *lora, f"tuned={shown(trained.folder)}"]
        name = "vLLM, adapter"
        stages[name], seconds[name] = served(
            "tuned", [*model, *common], rows, most, trained.switches
        )

    # -----------------------------------------------------------------------------
    # 4. One table, one plot

    questions = [loop_parts.question_of(row) for row in rows]
    measured = {"row_count": len(rows), "check_row_count": checked["row_count"]}
    tuned = [tokens for _, tokens in stages["tuned"]]
    for name, of in stages.items():
        key = loop_parts.key(name)
        texts = [scoring.without_thoughts(text) for text, _ in of]
        measured |= scoring.measures(key, questions, texts)
        pairs = zip(tuned, (tokens for _, tokens in of), strict=True)
        measured[f"{key}_same_count"] = sum(one == other for one, other in pairs)
    for name, value in seconds.items():
        measured[f"{loop_parts.key(name)}_s"] = round(value, 1)
    print(f"\n{len(rows)} held-out requests")
    table(
        ["", "exact, %", "95 % interval", "fields, %", "same tokens"],
        [loop_parts.line(name, measured) for name in stages],
    )
    table(["step", "seconds"], [(name, f"{value:.0f}") for name, value in seconds.items()])
    print(f"whole output of the steps: {shown(LOG)}")
    results.picture(__file__, "loop", loop_parts.draw(list(stages), seconds, measured))
    config = {"adapter": args.adapter, "test": args.test, "dtype": profile.finetune.dtype}
    results.finish(__file__, measured, config)


if __name__ == "__main__":
    main()
