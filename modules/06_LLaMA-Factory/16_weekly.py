"""From my logs to a better model, every week: collect, check, train, score, gate, merge, publish.

    make lf-weekly                              # says what it would do, and does nothing
    make lf-weekly GO=1                         # or ARGS=--go: does it; interrupted, it goes on
    make lf-weekly GO=1 ARGS="--log my_log.jsonl --week 2026-W47"
    make lf-weekly GO=1 ARGS="num_train_epochs=2"   # settings of the training, as for lf-train
    make lf-weekly ARGS=--roll-back             # the model before is served again

A log has a request a line: time, messages, answer, and what came of it, a corrected answer or
thumbs up or down. What is right, was not asked before and is not in the test set is trained on
together with the original data. The new model is published only where it has no fewer of the
held-out rows right than the model that is served, and forgot little: else that one stays, which is
a normal end (exit code 0). Each step is the script of its own make target and leaves its file in
runs/06_LLaMA-Factory/weekly/WEEK/.
Look at: why lines of the log are not learnt from, and how many rows are won and lost at the gate.
"""

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path

import factory
import publishing
import request_log
import trials

from lab import ROOT, data, fail, jobs, models, results, shown
from lab.profile import load_profile, read_yaml

HERE = Path(__file__).resolve().parent
WEEKS = factory.FOLDER / "weekly"


def steps(week: Path, args, current: Path | None) -> dict[str, list]:
    """{step: one of our scripts and its flags}; `current` is the model that is served."""
    lora = shown(week / "lora")
    asked = ["--test", args.test, "--limit", args.limit]
    score = ["02_score.py", *asked, "--answers", shown(week / "answers.json"), "--adapter", lora]
    info = shown(week / "dataset_info.json")
    checked = ["--info", info, "--held-out", request_log.name_of(args.test), "--rows", 0]
    both = f"dataset={request_log.name_of(args.dataset)},data"
    train = ["--model", args.model, both, f"dataset_dir={shown(week)}", f"output_dir={lora}"]
    merge = ["03_merge.py", "--adapter", lora, "--output", shown(week / "merged")]
    commands = {
        "check": ["00_check_data.py", shown(week / "data.json"), "--model", args.model, *checked],
        "train": ["01_train.py", "--resume-or-begin", *train, *args.overrides],
        "score": [*score, "--no-base"] if current else score,
        "merge": [*merge, "--into", "original"],  # what was scored, though trained on 4 bits
    }
    if current:
        file = shown(week / "answers_current.json")
        served = ["--answers", file, "--adapter", shown(current), "--no-base"]
        commands["score current"] = ["02_score.py", *asked, *served]
    return {name: [str(part) for part in command] for name, command in commands.items()}


def once(file: Path, step):
    """What a step came to: from its file, where it was done before an interruption."""
    if not file.is_file():
        publishing.write(file, step())
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--go", action="store_true", help="do it (default: only say it)")
    does.add_argument("--roll-back", action="store_true", help="serve the model before again")
    log = shown(HERE / "data" / "example_log.jsonl")
    parser.add_argument("--log", default=log, help="requests, JSONL (default: %(default)s)")
    parser.add_argument("--week", help="such as 2026-W47 (default: that of the log's newest line)")
    usual = (
        profile.finetune.args.get("dataset") or read_yaml(HERE / "configs/sft_lora.yaml")["dataset"]
    )
    parser.add_argument("--dataset", default=usual, help="trained on too (default: %(default)s)")
    parser.add_argument("--test", default=profile.finetune.test, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="first rows of it (default: all)")
    models.add_model_flag(parser, profile.finetune.model)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for 01_train.py")
    rise = "by which the loss of neutral text may rise (default: %(default)s)"
    parser.add_argument("--most-rise", type=float, default=0.1, metavar="SHARE", help=rise)
    args = parser.parse_intermixed_args()
    if args.roll_back:
        before, after = publishing.roll_back()
        print(f"{before} -> {after}: start the server again, it reads the model at its start")
        return results.note(results.name_of(__file__))

    # -----------------------------------------------------------------------------
    # 1. Collect: what of the log is learnt from. Rows of earlier weeks stay

    lines = request_log.read(ROOT / args.log)
    weeks = [request_log.week_of(line) for line in lines if line]
    name = args.week or max(weeks, default="")
    if name not in weeks:
        fail(f"{args.log} has no request of week {name or '(it has none at all)'}")
    week = WEEKS / name
    before = [file for file in sorted(WEEKS.glob("*-W*/data.json")) if file.parent.name < name]
    earlier = json.loads(before[-1].read_text(encoding="utf-8")) if before else []
    added = request_log.collect(lines, name, earlier, data.rows(args.test))
    print(f"{len(lines)} lines of {args.log}, week {name}")
    print(f"  {len(added.rows)} kept, {added.masked} of them with an e-mail address masked")
    for reason, count in added.left_out.items():
        print(f"  {count} not: {reason}")
    print(f"  {len(earlier)} rows of earlier weeks stay")
    if not args.go:
        print("nothing is done without --go; it would write", shown(week), "and run")
        for command in steps(week, args, publishing.current()).values():
            print(shlex.join(["python", shown(HERE / command[0]), *command[1:]]))
        return None
    if not added.rows and not earlier:
        fail("the log has nothing to learn from")
    jobs.refuse_taken_cards()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step ends with us

    def write_rows() -> dict:
        """The week's rows, the original and the held-out ones, as LLaMA-Factory reads them."""
        entry = json.loads((data.FOLDER / "dataset_info.json").read_text())["launch_en_train"]
        entry["tags"]["system_tag"] = "system"
        sets = {request_log.name_of(path): data.rows(path) for path in (args.dataset, args.test)}
        sets["data"] = earlier + added.rows
        info = {named: entry | {"file_name": f"{named}.json"} for named in sets}
        publishing.write(week / "dataset_info.json", info)
        for named, rows in sets.items():
            publishing.write(week / f"{named}.json", rows)
        served = publishing.current()
        return added._asdict() | {"current": served and shown(served)}

    if (week / "collected.json").is_file():
        print(f"{shown(week)} has its rows already: what the log has more is not looked at")
    collected = once(week / "collected.json", write_rows)
    current = collected["current"] and ROOT / collected["current"]
    commands = steps(week, args, current)

    def run(step: str) -> dict:
        """The step's last line, a JSON object; from its file where it was done before."""
        script, *flags = commands[step]
        print(f"--- {step}: {shlex.join(['python', script, *flags])}", flush=True)
        file = week / f"{step.replace(' ', '_')}.json"
        return once(file, lambda: trials.result(script, *flags))

    # -----------------------------------------------------------------------------
    # 2. Check, train, score, each by its own script

    if run("check")["leaked_count"]:
        fail(f"rows of {args.test} are in {shown(week)}/data.json: the score would say nothing")
    run("train")
    score = run("score")
    new = publishing.scored(week / "answers.json", "tuned", score["tuned_neutral_loss"])
    if current:
        loss = run("score current")["tuned_neutral_loss"]
        old = publishing.scored(week / "answers_current.json", "tuned", loss)
    else:  # nothing is published yet: the model before any training
        old = publishing.scored(week / "answers.json", "base", score["base_neutral_loss"])

    # -----------------------------------------------------------------------------
    # 3. The gate; then merge and publish

    gate = once(week / "gate.json", lambda: publishing.decide(new, old, args.most_rise))
    print(
        f"--- gate, on {len(new['right'])} rows: {sum(new['right'])} right, "
        f"{sum(old['right'])} by {shown(current) if current else 'the base model'}\n"
        f"  {gate['won_count']} won, {gate['lost_count']} lost; equally good models differ by so "
        f"much in {gate['luck_ratio']:.1%} of all cases\n"
        f"  loss of the neutral text: {gate['neutral_rise_pct']:+.1f} %"
    )
    results.note(results.name_of(__file__))
    if not gate["publish"]:
        print(f"held back, what is served stays: {'; '.join(gate['reasons'])}")
        print(f"to train this week once more, remove {shown(week)}")
        return None
    run("merge")
    folder = f"weekly/{name}/merged"
    once(week / "published.json", lambda: publishing.publish(folder))
    print(f"published: {shown(publishing.SERVING)} -> {folder}")
    print(f"serve it: make vllm-serve MODEL={shown(publishing.SERVING)}")
    return None


if __name__ == "__main__":
    main()
