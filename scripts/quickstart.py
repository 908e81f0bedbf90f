"""One headline command of each stage, in order, for real, and a report of it: `make quickstart`.

    make quickstart              an interrupted or partly failed run goes on with what is not done
    make quickstart FRESH=1      everything again
    make quickstart ARGS="--only 03_vllm"

While a stage works, a line says which it is, what it does, and how long it has taken beside what
it usually takes: in your own last run, else in the record of a machine with the same profile. A
stage's whole output goes to runs/quickstart/<stage>.log. A failed stage is named with its reason
and its log, the rest go on, and the exit code is 1. Headline results go to
runs/quickstart/summary.json, the page with plots to runs/report.html.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

from lab import ROOT, RUNS, engine, fail, jobs, machine, results, shown
from lab.profile import load_profile


@dataclass
class Stage:
    doing: str  # in words
    section: str  # of the profile, which names the model that it loads
    target: list[str]  # of make
    headline: dict[str, str]  # which results are shown: {name in the record: words for people}


STAGES = {
    "01_single_gpu_smoke": Stage(
        "matrix products, memory bandwidth, the first words of a model",
        "smoke",
        ["smoke"],
        {"wrong_count": "wrong results", "decode_tok_per_s": "tokens/s of one sequence"},
    ),
    "02_qwen_image_edit": Stage(
        "a picture edited by words",
        "image_edit",
        ["image-edit"],
        {"step_s": "seconds a step", "total_s": "seconds a picture"},
    ),
    "03_vllm": Stage(
        "the same requests answered by transformers, then by vLLM",
        "throughput",
        ["vllm-throughput"],
        {
            "transformers_tok_per_s": "tokens/s, transformers",
            "vllm_tok_per_s": "tokens/s, vLLM",
            "vllm_over_transformers_ratio": "vLLM / transformers",
        },
    ),
    "04_Accelerate": Stage(
        "a training by Accelerate",
        "train",
        ["train-accelerate"],
        {
            "world_size": "processes",
            "losses": "loss, first and last step",
            "throughput_tok_per_s": "tokens/s, training",
        },
    ),
    "05_DeepSpeed": Stage(
        "a training by DeepSpeed with ZeRO-2, which compiles an operator the first time",
        "zero",
        ["train-z2"],
        {
            "zero_stage": "ZeRO stage of the engine",
            "world_size": "processes",
            "losses": "loss, first and last step",
        },
    ),
    "06_LLaMA-Factory": Stage(
        "a LoRA fine-tuning by LLaMA-Factory, and 24 questions before and after it",
        "finetune",
        ["lf-score", "ARGS=--train --limit 24"],
        {
            "base_exact_pct": "exact answers, untuned (%)",
            "tuned_exact_pct": "exact answers, tuned (%)",
        },
    ),
}
# What stands in for the stages that divide their work over two cards, where the profile has one.
ONE_CARD = {
    "04_Accelerate": replace(
        STAGES["04_Accelerate"],
        doing="one card: the training that Accelerate would divide over two",
        target=["train-one"],
    ),
    "05_DeepSpeed": replace(
        STAGES["05_DeepSpeed"],
        doing="one card: what ZeRO would save with two, by formula",
        target=["zero-theory"],
        headline={f"mixed_z{z}_gb": f"GB a card of two, 7B, ZeRO-{z}" for z in range(4)},
    ),
}
# Beside a stage's own folder, what can change its result; texts cannot.
SHARED = ("lab", "scripts", "configs", "locks", "Makefile", "modules/06_LLaMA-Factory/data")
FOLDER = RUNS / "quickstart"
SUMMARY = FOLDER / "summary.json"
REPORT_EVERY_S = 15


def state(stage: str) -> str:
    """A hash of the code, values and locks behind a stage's result."""
    digest = hashlib.sha256()
    for place in (*SHARED, f"modules/{stage}"):
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.suffix != ".md" and "__pycache__" not in file.parts:
                digest.update(shown(file).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def usual_seconds(profile: str, last_run: dict) -> dict[str, float]:
    """{stage: seconds} of the last run here, else of the record of a machine with this profile."""
    seconds = {}
    for file in sorted(ROOT.glob("results/*/scripts/quickstart.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["profile"] == profile:
            seconds = {stage: record["metrics"][f"{stage}_s"] for stage in STAGES}
    if last_run.get("profile") == profile:
        seconds |= last_run.get("usual_s", {})
    return seconds


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run_stage(name: str, target: list[str], where: str, usual_s: float | None) -> dict:
    """Run the stage's make target: {ok, seconds, log, result}, its last line of JSON."""
    log, began = FOLDER / f"{name}.log", time.monotonic()
    usually = f" of usually {clock(usual_s)}" if usual_s else ""
    # What was said to `make quickstart` (ARGS, STORE) is not meant for the stages.
    command = ["env"]
    for variable in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "ARGS", "STORE"):
        command += ["-u", variable]
    command += ["make", "--no-print-directory", *target]
    process = jobs.start(name, command, log)
    reported_s = 0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            elapsed_s = time.monotonic() - began
            if sys.stdout.isatty():
                print(f"\r\033[K  {where} working, {clock(elapsed_s)}{usually}", end="", flush=True)
            elif elapsed_s - reported_s >= REPORT_EVERY_S:
                reported_s = elapsed_s
                print(f"  {where} working, {clock(elapsed_s)}{usually}", flush=True)
    finally:
        if name in (running := jobs.running()):  # interrupted, or the script left something behind
            jobs.stop(running[name])
        if sys.stdout.isatty():
            print("\r\033[K", end="")
    result = {}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"script"'):
            result = json.loads(line)
    ok = process.returncode == 0 and bool(result)
    return {
        "ok": ok,
        "seconds": round(time.monotonic() - began, 1),
        "log": shown(log),
        "result": result,
    }


def show(outcome: dict, headline: dict[str, str]) -> None:
    """What came of a stage, for people."""
    if outcome["ok"]:
        print(f"  done in {clock(outcome['seconds'])}")
    else:
        print(f"  FAILED after {clock(outcome['seconds'])}: {engine.cause(ROOT / outcome['log'])}")
        print(f"  whole log: {outcome['log']}")
    for name, label in headline.items():
        value = outcome["result"].get(name)
        if value is not None:
            text = f"{value[0]:.3f} -> {value[-1]:.3f}" if isinstance(value, list) else f"{value}"
            print(f"  {label:32} {text:>16}")
    sys.stdout.flush()


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    known = ", ".join(STAGES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--only", nargs="+", default=list(STAGES), metavar="STAGE", help=f"of {known}"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has done")
    args = parser.parse_args()
    if unknown := set(args.only) - set(STAGES):
        fail(f"unknown stage {', '.join(sorted(unknown))}: choose from {known}")
    profile = load_profile()

    import download  # the script beside this one

    # So that a running stage is ended with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    # -----------------------------------------------------------------------------
    # 1. What an unfinished run with this profile has done already

    FOLDER.mkdir(parents=True, exist_ok=True)
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
    usual = usual_seconds(profile.name, summary)
    if args.fresh or summary.get("finished") or summary.get("profile") != profile.name:
        summary = {"profile": profile.name, "stages": {}}
    summary |= {"finished": False, "usual_s": usual}
    print(f"quickstart on {machine.name()}, profile {profile.name}")
    stages = STAGES | (ONE_CARD if profile.get("requires", {}).get("gpus") == 1 else {})
    sections = tuple(stage.section for stage in stages.values())
    text, download_gb = download.listing(profile, sections)
    if download_gb:
        print(text)
        print("A stage fetches what it lacks; 'make download' fetches all beforehand, resumably.")

    # -----------------------------------------------------------------------------
    # 2. The stages

    for number, name in enumerate(args.only, 1):
        stage, where = stages[name], f"[{number}/{len(args.only)}] {name}:"
        now = state(name)
        before = summary["stages"].get(name, {})
        if before.get("ok") and before.get("state") == now:
            print(f"{where} done before", flush=True)
            continue
        gigabytes = download.listing(profile, (stage.section,))[1]
        fetches = f", fetches up to {gigabytes:.1f} GB first" if gigabytes else ""
        print(f"{where} {stage.doing}{fetches}")
        print(
            f"  make {' '.join(stage.target)}; its output: {shown(FOLDER / name)}.log", flush=True
        )
        try:
            outcome = run_stage(name, stage.target, where, usual.get(name))
        except KeyboardInterrupt:
            print(f"interrupted in {name}: 'make quickstart' goes on from here")
            raise SystemExit(130) from None
        summary["stages"][name] = outcome | {"state": now}
        if outcome["ok"]:
            usual[name] = outcome["seconds"]
        SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False))
        show(outcome, stage.headline)

    # -----------------------------------------------------------------------------
    # 3. The end

    seconds = {name: o["seconds"] for name, o in summary["stages"].items() if o["ok"]}
    failed = [name for name in args.only if name not in seconds]
    summary["finished"] = not failed
    SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    # The page shows what there is, failed stages or not.
    subprocess.run([sys.executable, ROOT / "scripts/report.py"], check=False)
    done = [name for name in args.only if name in seconds]
    total = clock(sum(seconds[name] for name in done))
    print(f"\n{len(done)} of {len(args.only)} stages done in {total}", end="; ")
    print(f"results: {shown(SUMMARY)}, records: {shown(results.FOLDER)}")
    if failed:
        print(f"failed: {', '.join(failed)}; 'make quickstart' tries them again")
        raise SystemExit(1)
    print("Where to go on: make progress")
    # What a stage usually takes, for others to see.
    if os.environ.get("STORE") == "1" and len(seconds) == len(STAGES):
        metrics = {f"{name}_s": seconds[name] for name in STAGES}
        results.finish(__file__, metrics | {"total_s": round(sum(seconds.values()), 1)})


if __name__ == "__main__":
    main()
