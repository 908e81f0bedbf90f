"""Which tasks are done, and the one next step: `make progress`.

    make progress                       every stage, and what to do next
    make progress ARGS="03_vllm"        every task of a stage, and what to do next in it

A task of modules/*/PLAN.md is done when its command has done its work here: what each script and
make target finished is in runs/records/history.jsonl; a command of another program writes the file
under runs/ that it ends with. A box that you tick, `- [x]`, counts too.
"""

import argparse
import json
import os
import re
import shlex
from dataclasses import dataclass

from lab import ROOT, RUNS, fail, results, shown
from lab.profile import FOLDER, detect, read_yaml

TASK = re.compile(r"- \[([ xX])\] (.*?)[：？]`([^`]+)`")
# Work that is divided over two devices: two processes of a CPU, or two cards.
DIVIDED = re.compile(
    r"\b(mini-(tp|accelerate|zero|parallel)|vllm-tp|train-ddp|train-accelerate|train-z[0-3]"
    r"|real-loop|train-trainer|loss-weights|zero-buckets|lf-train-z2"
    r"|accelerate-overhead|train-costs|train-compressed|train-faults)\b"
    r"|\bdeepspeed --num_gpus\b"
)


@dataclass
class Task:
    text: str
    command: str
    ticked: bool

    @property
    def profile(self) -> str:
        """The profile that it asks for; "" where any will do."""
        return typed(self.command)[0]


def typed(command: str) -> tuple[str, set[str]]:
    """The profile that it asks for, and its words.

    `PROFILE=4090x2 make train-z2 ARGS="--steps 2"` -> ("4090x2", {train-z2, ARGS=--steps 2}).
    """
    parts = shlex.split(command)
    profiles = [part.removeprefix("PROFILE=") for part in parts if part.startswith("PROFILE=")]
    profile = profiles[0] if profiles else ""
    if parts[:1] == ["cd"]:
        # cd FOLDER && deepspeed ... SCRIPT ...: known by the script's path from here.
        script = next(place for place, part in enumerate(parts) if part.endswith(".py"))
        parts = [f"{parts[1]}/{parts[script]}", *parts[script + 1 :]]
    return profile, set(parts) - {"make", "python", f"PROFILE={profile}"}


def read(plan) -> list[Task]:
    lines = TASK.findall(plan.read_text(encoding="utf-8"))
    return [Task(text, command, tick != " ") for tick, text, command in lines]


def finished() -> list[tuple[str, set[str]]]:
    """(profile, words) of every command that did its work here, as typed and as make was told."""
    history = results.FOLDER / "history.jsonl"
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    ran = []
    for line in map(json.loads, lines):
        for how in ("command", "make"):
            command = line[how].replace(f"{shown(RUNS)}/", "runs/")  # as PLAN.md writes it
            ran.append((line["profile"], typed(command)[1]))
    return ran


def is_done(task: Task, ran: list[tuple[str, set[str]]]) -> bool:
    if task.ticked:
        return True
    if task.command == "make setup":
        marker = ROOT / ".venv" / ".videofen-setup"  # set-up fills it last
        return marker.is_file() and marker.stat().st_size > 0
    last = shlex.split(task.command)[-1]
    if last.startswith("runs/"):
        file = RUNS / last.removeprefix("runs/")
        return file.is_file() and file.stat().st_size > 0
    profile, wanted = typed(task.command)
    dry = "--dry-run" in task.command
    return any(
        wanted <= had and profile in ("", ran_under) and any("--dry-run" in w for w in had) == dry
        for ran_under, had in ran
    )


def possible(task: Task, profile: str) -> bool:
    """Whether a machine with this profile can do the task."""
    cards = read_yaml(FOLDER / f"{profile}.yaml").get("requires", {}).get("gpus", 0)
    if "--dry-run" in task.command:
        return True
    if task.profile not in ("", "cpu", profile):
        return False
    if cards and re.search("two-(nodes|machines)", task.command):  # they compute on CPUs
        return False
    return cards != 1 or not DIVIDED.search(task.command)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("stage", nargs="?", help="show every task of this stage")
    args = parser.parse_args()
    plans = {plan.parent.name: plan for plan in sorted(ROOT.glob("modules/*/PLAN.md"))}
    if args.stage and args.stage not in plans:
        fail(f"unknown stage {args.stage}: choose one of {', '.join(plans)}")
    ran = finished()
    profile = os.environ.get("PROFILE") or detect()
    if not (FOLDER / f"{profile}.yaml").is_file():
        fail(f"unknown PROFILE={profile}: leave it out to detect, or see configs/profiles/")

    total = done_in_all = elsewhere = 0
    following = None  # the first open task that this machine can do, and its plan
    for stage, plan in plans.items():
        tasks = [(task, is_done(task, ran)) for task in read(plan)]
        done = sum(ok for _, ok in tasks)
        total += len(tasks)
        done_in_all += done
        bar = "█" * round(10 * done / len(tasks))
        print(f"{stage:22} {bar:·<10} {done:2}/{len(tasks)}")
        for task, ok in tasks:
            if args.stage == stage:
                print(f"    [{'x' if ok else ' '}] {task.text}: {task.command}")
            if ok:
                continue
            if not possible(task, profile):
                elsewhere += 1
            elif following is None and args.stage in (None, stage):
                following = task, plan
    rest = f"; {elsewhere} of the others need another machine than {profile}" if elsewhere else ""
    print(f"\n{done_in_all} of {total} tasks done{rest}")
    if following:
        task, plan = following
        print(f"next: {task.command}\n      {task.text} ({shown(plan)}: tick it to pass over it)")
    else:
        print("next: nothing is left to do here" + (f" in {args.stage}" if args.stage else ""))


if __name__ == "__main__":
    main()
