"""One headline command of each stage, in order, for real, and a report of it: `make quickstart`.

    make quickstart              an interrupted or partly failed run goes on with what is not done yet
    make quickstart FRESH=1      everything again
    make quickstart ARGS="--only 03_vllm"

Each stage's whole output goes to runs/quickstart/<stage>.log. A failed stage is named with its log, the rest go on, and the exit
code is 1. Headline results go to runs/quickstart/summary.json, the page with plots to runs/report.html.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import ROOT, RUNS, fail, jobs, machine, shown
from lab.profile import load_profile

# stage: its headline make target, and which of its results are the headline (name in the record: words for people)
STAGES = {
    "01_single_gpu_smoke": (["smoke"], {"wrong_count": "wrong results", "decode_tok_per_s": "tokens/s of one sequence"}),
    "02_qwen_image_edit": (["image-edit"], {"step_s": "seconds a step", "total_s": "seconds a picture"}),
    "03_vllm": (
        ["vllm-throughput"],
        {"transformers_tok_per_s": "tokens/s, transformers", "vllm_tok_per_s": "tokens/s, vLLM", "vllm_over_transformers_ratio": "vLLM / transformers"},
    ),
    "04_Accelerate": (["train-accelerate"], {"world_size": "processes", "losses": "loss, first and last step", "throughput_tok_per_s": "tokens/s, training"}),
    "05_DeepSpeed": (["train-z2"], {"zero_stage": "ZeRO stage of the engine", "world_size": "processes", "losses": "loss, first and last step"}),
    "06_LLaMA-Factory": (["lf-score", "ARGS=--train --limit 24"], {"base_exact_pct": "exact answers, untuned (%)", "tuned_exact_pct": "exact answers, tuned (%)"}),
}
# Sections of the profile whose models these targets load.
SECTIONS = ("smoke", "image_edit", "throughput", "train", "zero", "finetune")
FOLDER = RUNS / "quickstart"
SUMMARY = FOLDER / "summary.json"


def last_line(log: Path) -> str:
    with log.open("rb") as f:
        f.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in f.read().decode(errors="replace").replace("\r", "\n").splitlines() if line.strip() and not line.startswith("make:")]
    return lines[-1][:100] if lines else ""


def run_stage(stage: str, target: list[str]) -> dict:
    """Run one make target as a job; its last JSON line is its result. Returns {ok, seconds, log, result}."""
    log, began = FOLDER / f"{stage}.log", time.monotonic()
    process = jobs.start(stage, ["make", "--no-print-directory", *target], log)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if sys.stdout.isatty():
                print(f"\r\033[K  {time.monotonic() - began:4.0f} s  {last_line(log)}", end="", flush=True)
            elif (time.monotonic() - began) % 10 < 0.2:
                print(f"  {time.monotonic() - began:4.0f} s  {last_line(log)}", flush=True)
    finally:
        if stage in (running := jobs.running()):  # interrupted, or the script left something behind
            jobs.stop(running[stage])
        if sys.stdout.isatty():
            print("\r\033[K", end="")
    result = {}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"script"'):
            result = json.loads(line)
    ok = process.returncode == 0 and bool(result)
    return {"ok": ok, "seconds": round(time.monotonic() - began, 1), "log": shown(log), "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(STAGES), metavar="STAGE", help=f"run only these of {', '.join(STAGES)}")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run has done")
    args = parser.parse_args()
    if unknown := set(args.only) - set(STAGES):
        fail(f"unknown stage {', '.join(sorted(unknown))}: choose from {', '.join(STAGES)}")
    profile = load_profile()

    import download  # the script beside this one

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running stage is ended with us

    # -----------------------------------------------------------------------------
    # 1. What an unfinished run under the same commit and profile has done already

    now = {"profile": profile.name, "commit": machine.commit()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() and not args.fresh else {}
    if {key: summary.get(key) for key in now} != now or summary.get("finished"):
        summary = {**now, "finished": False, "stages": {}}
    print(f"quickstart on {machine.name()}, profile {profile.name}")
    text, download_gb = download.listing(profile, SECTIONS)
    if download_gb:
        print(f"{text}\nA stage fetches what it lacks; 'make download' fetches everything beforehand, and goes on where it was interrupted.", flush=True)

    # -----------------------------------------------------------------------------
    # 2. The stages

    for number, stage in enumerate(args.only, 1):
        target, headline = STAGES[stage]
        if summary["stages"].get(stage, {}).get("ok"):
            print(f"[{number}/{len(args.only)}] {stage}: done before", flush=True)
            continue
        print(f"[{number}/{len(args.only)}] {stage}: make {' '.join(target)}", flush=True)
        try:
            outcome = run_stage(stage, target)
        except KeyboardInterrupt:
            print(f"interrupted in {stage}: 'make quickstart' goes on from here")
            raise SystemExit(130) from None
        summary["stages"][stage] = outcome
        SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False))
        if not outcome["ok"]:
            print(f"  FAILED after {outcome['seconds']:.0f} s: {last_line(ROOT / outcome['log'])}\n  whole log: {outcome['log']}", flush=True)
        for name, words in headline.items():
            if (value := outcome["result"].get(name)) is not None:
                text = f"{value[0]:.3f} -> {value[-1]:.3f}" if isinstance(value, list) else f"{value}"
                print(f"  {words:32} {text:>16}", flush=True)

    # -----------------------------------------------------------------------------
    # 3. The end

    failed = [stage for stage in args.only if not summary["stages"][stage]["ok"]]
    summary["finished"] = not failed
    SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    subprocess.run([sys.executable, ROOT / "scripts/report.py"], check=False)  # the page shows what there is, failed stages or not
    total = sum(s["seconds"] for s in summary["stages"].values())
    print(f"\n{len(args.only) - len(failed)} of {len(args.only)} stages done in {total:.0f} s; results: {shown(SUMMARY)}, records: {shown(RUNS / 'records')}")
    if failed:
        print(f"failed: {', '.join(failed)}; 'make quickstart' tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
