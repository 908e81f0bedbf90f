"""A training that has not finished: where it is, and whether a run may go on from it.

A training writes into OUTPUT/unfinished, and what it wrote moves up at its end: until then the last
finished one is in OUTPUT as it was, and nothing of it is mistaken for the new one. `run.json`,
written before the engine starts, says which run it is.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import checkpoints

from lab import ROOT, fail, jobs, shown

RUN = "run.json"
# What a run may change when it goes on: where files lie, what is shown, how memory is spent. Not
# the steps of saving and logging: the Trainer goes on with those in the checkpoint.
FREE = {
    *("output_dir", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint"),
    *("save_total_limit", "enable_jit_checkpoint", "plot_loss", "report_to", "run_name"),
    *("preprocessing_num_workers", "dataloader_num_workers", "disable_gradient_checkpointing"),
}


def add_flags(parser) -> None:
    """Where a training begins."""
    begins = parser.add_mutually_exclusive_group()
    begins.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    begins.add_argument(
        "--resume-or-begin",
        action="store_true",
        help="the same, and begin where there is none: for what restarts by itself",
    )
    begins.add_argument("--fresh", action="store_true", help="remove an unfinished training first")


def inside(output: Path) -> Path:
    return output / "unfinished"


def identity(settings, processes: int) -> dict:
    """What makes a run this run: its settings, the number of processes, DeepSpeed's JSON, the rows.

    Rows of a file are known by the checksum of its text.
    """
    from omegaconf import OmegaConf

    every = OmegaConf.to_container(settings)
    run = {name: value for name, value in every.items() if name not in FREE}
    run["processes"] = processes
    if settings.get("deepspeed"):
        run["deepspeed"] = json.loads((ROOT / settings.deepspeed).read_text())
    folder = ROOT / settings.dataset_dir
    described = json.loads((folder / "dataset_info.json").read_text())
    for name in str(settings.dataset).split(","):
        entry = described[name.strip()]
        file = folder / entry.get("file_name", "")
        text = file.read_bytes() if file.is_file() else b""
        checksum = zlib.crc32(text, zlib.crc32(json.dumps(entry).encode()))
        run[f"rows of {name.strip()}"] = f"{checksum:08x}"
    return run


def differences(then: dict, now: dict) -> list[str]:
    """Each setting that is not as it was, with both values."""

    def value(run: dict, name: str) -> str:
        return json.dumps(run[name]) if name in run else "not set"

    names = [name for name in then | now if then.get(name) != now.get(name)]
    return [f"{name} was {value(then, name)} and is {value(now, name)}" for name in names]


def begin(output: Path, run: dict, args, name: str) -> Path | None:
    """The checkpoint that this run goes on from; None: it begins, in an empty folder.

    `args` are the flags of `add_flags`, `name` is that of the training's job.
    """
    if f"lf-{name}" in jobs.running():
        fail(f"lf-{name} is running already: end it with 'make stop' first")
    folder = inside(output)
    resume = args.resume or args.resume_or_begin
    whole, broken = None, {}
    if not args.fresh:
        whole, broken = checkpoints.last_whole(folder, identity_in(folder))
    if whole and not resume:
        fail(
            f"{shown(folder)} holds an unfinished training, saved at step "
            f"{checkpoints.step_of(whole)}: RESUME=1 goes on from it, FRESH=1 removes it"
        )
    if resume:
        for checkpoint, reason in broken.items():
            print(f"{shown(checkpoint)} is not whole and passed over: {reason}", flush=True)
    if whole:
        others = differences(identity_in(folder), run)
        if others:
            fail(
                f"{shown(folder)} is of another run: {'; '.join(others[:3])}; "
                "give the settings it began with, or FRESH=1 to remove it"
            )
        for checkpoint in broken:  # their steps come again
            shutil.rmtree(checkpoint)
        checkpoints.date_by_step(folder)
        print(f"goes on from {shown(whole)}", flush=True)
        return whole
    if args.resume:
        state = "has finished" if (output / "config.yaml").is_file() else "has no whole checkpoint"
        fail(f"there is nothing to resume: the training in {shown(output)} {state}")
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder / f"{RUN}.tmp"
    try:
        folder.mkdir(parents=True)
        partial.write_text(json.dumps(run, indent=1, ensure_ascii=False), encoding="utf-8")
        partial.replace(folder / RUN)
    except OSError as e:
        fail(f"cannot write {shown(folder)}: {e.strerror}")
    return None


def identity_in(folder: Path) -> dict:
    """The run that the folder is of, as it was written down."""
    file = folder / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"processes": 1}


def way_on(folder: Path) -> str:
    """What an ended training has left, for the sentence that says that it ended."""
    whole, _ = checkpoints.last_whole(folder, identity_in(folder))
    if whole is None:
        return "; it had no whole checkpoint yet"
    return f"; {shown(whole)} is whole: RESUME=1 goes on from it"


def refuse_early_end(output: Path, trained, settings) -> None:
    """Exit code 143 where the engine was told to end: it saves, and ends as if all were done.

    What ends early by itself has done all it was to do.
    """
    by_itself = trained.stopped_by_itself(settings.get("early_stopping_steps"))
    if trained.steps < trained.planned_steps and not by_itself:
        step = f"step {trained.steps} of {trained.planned_steps}"
        print(f"ended from outside at {step}{way_on(inside(output))}", file=sys.stderr)
        raise SystemExit(143)


def finish(output: Path, config: str) -> None:
    """What the training wrote moves up, in place of the last one; other files in OUTPUT stay.

    config.yaml, by which later scripts know a finished training, goes first and comes last.
    """
    written = inside(output)
    (output / "config.yaml").unlink(missing_ok=True)
    for checkpoint in checkpoints.numbered(output):
        shutil.rmtree(checkpoint)
    # Until the last of these has moved, RESUME=1 can repeat the end.
    kept = [*reversed(checkpoints.numbered(written)), written / RUN]
    for path in [*(set(written.iterdir()) - set(kept)), *kept]:
        path.replace(output / path.name)
    written.rmdir()
    (output / "config.yaml").write_text(config, encoding="utf-8")
