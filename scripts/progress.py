"""Which stages and which tasks are done: `make progress`.

    make progress                       every stage, and the first task of each that is still open
    make progress ARGS="03_vllm"        every task of a stage

A task of modules/*/PLAN.md is done when its command has done its work here (runs/records/history.jsonl keeps what each script and
make target finished), or when you have ticked its box, `- [x]`, as you do for those that leave no result: a diff read, an error understood.
"""

import argparse
import json
import re
import shlex

from lab import ROOT, fail, results

TASK = re.compile(r"- \[([ xX])\] (.*?)[：？]`([^`]+)`")


def words(command: str) -> tuple[str, set[str]]:
    """(profile it asks for, its words): `PROFILE=4090x2 make train-z2 ARGS="--steps 2"` -> ("4090x2", {train-z2, ARGS=--steps 2})."""
    found = shlex.split(command)
    profile = next((w.removeprefix("PROFILE=") for w in found if w.startswith("PROFILE=")), "")
    return profile, {w for w in found if not w.startswith("PROFILE=") and w not in ("make", "python")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", help="show every task of this stage")
    args = parser.parse_args()
    plans = {plan.parent.name: plan for plan in sorted(ROOT.glob("modules/*/PLAN.md"))}
    if args.stage and args.stage not in plans:
        fail(f"unknown stage {args.stage}: choose one of {', '.join(plans)}")
    history = results.FOLDER / "history.jsonl"
    ran = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()] if history.is_file() else []
    finished = [(line["profile"], words(line["command"])[1]) for line in ran] + [(line["profile"], words(line["make"])[1]) for line in ran]

    def is_done(tick: str, command: str) -> bool:
        profile, wanted = words(command)
        return tick != " " or any(wanted <= had and profile in ("", p) for p, had in finished)

    total = done_in_all = 0
    for stage, plan in plans.items():
        tasks = [(is_done(tick, command), text, command) for tick, text, command in TASK.findall(plan.read_text(encoding="utf-8"))]
        done = sum(task[0] for task in tasks)
        total, done_in_all = total + len(tasks), done_in_all + done
        bar = "█" * round(10 * done / len(tasks))
        print(f"{stage:22} {bar:·<10} {done:2}/{len(tasks):<2}", end="")
        left = next((command for ok, _, command in tasks if not ok), None)
        print("" if args.stage else f"   next: {left}" if left else "   all done")
        for ok, text, command in tasks if stage == args.stage else []:
            print(f"    [{'x' if ok else ' '}] {text}: {command}")
    print(f"{done_in_all} of {total} tasks done; the tutorial of a stage: modules/<stage>/readme.md, its tasks: PLAN.md beside it")


if __name__ == "__main__":
    main()
