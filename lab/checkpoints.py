"""Folders of training states that survive: written beside, then renamed, taken only whole.

FOLDER/step-40/...          the state after step 40, in the engine's own files
FOLDER/step-40/run.json     written last: what was trained on what, each file's size and CRC-32
FOLDER/step-60.partial/     what a killed save left; never read, removed by the next save

What belongs to a state stands in the training scripts; here is which folder it goes to, which one
is taken, and when. Where several processes train, each function is called by all of them.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import fail, shown

RUN = "run.json"
GIVE_UP_S = 20  # the launcher's patience is 30 s, that of `make stop` 25 s
saving = threading.Event()  # a state is being written

# -----------------------------------------------------------------------------
# Flags


def add_flags(parser, folder: Path) -> None:
    """--save-every, --keep, --resume, --fresh, --checkpoints; `folder`: where by default."""
    every = "save the state after every N steps, and where Ctrl+C or SIGTERM ends the training"
    parser.add_argument("--save-every", type=int, metavar="N", help=f"{every} (default: never)")
    keep = "how many of the last states to keep (default: %(default)s)"
    parser.add_argument("--keep", type=int, default=2, metavar="K", help=keep)
    resume = "go on from the last whole state; from the start where there is none yet"
    parser.add_argument("--resume", action="store_true", help=resume)
    fresh = "delete the states that are there, and begin anew"
    parser.add_argument("--fresh", action="store_true", help=fresh)
    where = f"folder of the states, seen by every machine (default: {shown(folder)})"
    parser.add_argument("--checkpoints", default=str(folder), metavar="FOLDER", help=where)


def refuse_impossible(args) -> None:
    """Where the flags contradict each other, or a new run would write beside an old one.

    Started again by torchrun, a training goes on, whatever it was told at first.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and args.save_every:
        args.resume = True
        args.fresh = False
    if (args.save_every is not None and args.save_every < 1) or args.keep < 1:
        fail("--save-every and --keep must be at least 1")
    if args.resume and args.fresh:
        fail("--resume goes on and --fresh begins anew: leave one of them out")
    if args.fresh and not args.save_every:
        fail("--fresh deletes states: say --save-every N too, so that new ones take their place")
    folder = Path(args.checkpoints)
    if args.save_every and not (args.resume or args.fresh) and steps_in(folder):
        fail(
            f"{shown(folder)} holds step {steps_in(folder)[-1]} of an earlier run: --resume "
            "goes on with it, --fresh deletes it, --checkpoints names another folder"
        )
    if args.save_every:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            fail(f"cannot save to {shown(folder)}: {e.strerror}")


# -----------------------------------------------------------------------------
# Which run? One checkpoint goes on with the training that wrote it, and with no other


def identity(args, blocks, step_blocks: int, **more) -> dict:
    """What must be the same for a training to go on; `more`: what else decides about its steps.

    `blocks` [blocks, seq_len]: the tokens. The number of processes may change, as long as one step
    reads the same `step_blocks`.
    """
    return {
        "model": args.model,
        "data": args.data,
        "seq_len": args.seq_len,
        "text_crc32": zlib.crc32(blocks.numpy().tobytes()),
        "blocks_of_a_step": step_blocks,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        **more,
    }


def refuse_other(run: dict, now: dict, folder: Path) -> None:
    """Where the state in `folder` is of another run than `now` describes."""
    for name, value in json.loads(json.dumps(now)).items():  # as `run` was written
        if run.get(name) != value:
            fail(
                f"{shown(folder)} is of another run: its {name} is {run.get(name)}, now it is "
                f"{value}; say the same again, --fresh, or another folder by --checkpoints"
            )


# -----------------------------------------------------------------------------
# Which folder? Only one that holds what run.json says


def steps_in(folder: Path) -> list[int]:
    """The steps whose states lie in `folder`, in order; a save that was not finished is none."""
    states = [path for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()]
    numbers = [int(state.name[5:]) for state in states if re.fullmatch(r"step-\d+", state.name)]
    return sorted(number for number in numbers if folder / f"step-{number}" in states)


def remove(state: Path) -> None:
    """A state, if it is one of ours, and what was converted from it."""
    if (state / RUN).is_file():
        shutil.rmtree(state)
    shutil.rmtree(f"{state}.universal", ignore_errors=True)


def files_of(state: Path) -> dict[str, dict[str, int]]:
    """{file: {bytes, crc32}} of everything in the folder but run.json."""
    paths = sorted(path for path in state.rglob("*") if path.is_file() and path.name != RUN)
    with ThreadPoolExecutor() as threads:
        sums = list(threads.map(crc32, paths))
    return {
        path.relative_to(state).as_posix(): {"bytes": path.stat().st_size, "crc32": crc}
        for path, crc in zip(paths, sums, strict=True)
    }


def crc32(path: Path) -> int:
    """The checksum of a file, read in pieces of 16 MiB."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def damage(state: Path) -> str:
    """What is wrong with the folder of a state; "" where it is as it was written."""
    try:
        content = json.loads((state / RUN).read_text())
        written = [(name, each["bytes"], each["crc32"]) for name, each in content["files"].items()]
        dict(content["run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {RUN} is missing or broken"
    for name, size, checksum in written:
        path = state / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if crc32(path) != checksum:
                return f"{name} is not what was written (CRC-32)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as e:
            return f"{name} cannot be read ({e.strerror})"
    return ""


def last(args, now: dict) -> Path | None:
    """With --resume the last whole state of this run, the same one in every process.

    None where the training begins at its start. --fresh empties the folder.
    """
    if not (args.resume or args.fresh):
        return None
    folder = Path(args.checkpoints)
    chosen = None
    if first_process():
        if args.fresh:
            for step in steps_in(folder):
                remove(folder / f"step-{step}")
        if args.resume:
            chosen = last_whole(folder, now, args.steps)
    return from_first(chosen)


def last_whole(folder: Path, now: dict, steps: int) -> Path | None:
    """The highest step that is whole; what is passed over is named."""
    for step in reversed(steps_in(folder)):
        state = folder / f"step-{step}"
        wrong = damage(state)
        if not wrong:
            refuse_other(read(state), now, state)
            if step > steps:
                fail(f"{shown(state)} has {step} steps behind it, more than --steps {steps}")
            print(f"going on after step {step}, from {shown(state)}", flush=True)
            return state
        print(f"passing over {shown(state)}: {wrong}", flush=True)
    print(f"no whole state in {shown(folder)}: from the start", flush=True)
    return None


def read(state: Path) -> dict:
    """The `run` that `written` got: whose state this is, and the losses behind it."""
    return json.loads((state / RUN).read_text())["run"]


# -----------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def written(args, step: int, run: dict):
    """A folder into which every process writes its part; afterwards it is FOLDER/step-N, whole.

    Exit code 2 with one sentence where it cannot be written, a full disk for example: the states
    before it stay, and the part that was written is removed.
    """
    folder = Path(args.checkpoints)
    partial = folder / f"step-{step}.partial"
    saving.set()
    try:
        if first_process():
            for left in folder.glob("step-*.partial"):
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        meet()
        yield partial
        meet()  # every process has written its part
        if first_process():
            finish(partial, run)
            others = steps_in(folder)
            kept = [other for other in others if other <= step][-args.keep :]
            for other in others:  # higher ones are damaged, and were passed over
                if other not in kept:
                    remove(folder / f"step-{other}")
            print(f"saved step {step} in {shown(folder)}", flush=True)
        meet()
    except (OSError, RuntimeError) as e:  # PyTorch's writers say RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(e, "strerror", None) or str(e).strip().partition("\n")[0]
        before = steps_in(folder)
        kept = f"step {before[-1]} is whole" if before else "nothing was saved before"
        free_gib = shutil.disk_usage(folder).free / 2**30  # PyTorch does not say that it was this
        disk = f"{free_gib:.2f} GiB are free there"
        fail(f"cannot save step {step} in {shown(folder)} ({reason}; {disk}): {kept}")
    finally:
        saving.clear()


def finish(partial: Path, run: dict) -> None:
    """Everything on the disk, then run.json, then the name: at no moment a half state has it."""
    content = {"run": run, "files": files_of(partial)}
    (partial / RUN).write_text(json.dumps(content, indent=1))
    for path in partial.rglob("*"):
        if path.is_file():
            sync(path)
    whole = partial.with_suffix("")
    if whole.exists():  # a damaged one that was passed over
        shutil.rmtree(whole)
    partial.rename(whole)
    sync(whole.parent)


def sync(path: Path) -> None:
    """Wait until the file, or the folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


# -----------------------------------------------------------------------------
# When? Every so many steps, and when the training is told to end


class Ending:
    """Hears Ctrl+C and SIGTERM, so that the step is finished and its state saved.

    Only where states are saved; elsewhere the signals end the process at once.
    """

    def __init__(self, args):
        self.saves = bool(args.save_every)
        self.signal = 0
        self.answered = False
        if not self.saves:
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self.hear)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)  # Python writes the signal's number there
        threading.Thread(target=self.give_up, args=[reader], daemon=True).start()

    def hear(self, number, _) -> None:
        self.signal = number

    def give_up(self, reader: int) -> None:
        """A process that waits for one that is gone never comes to its next step."""
        number = os.read(reader, 1)[0]
        time.sleep(GIVE_UP_S)
        while saving.is_set():
            time.sleep(1)
        if not self.answered:
            name = signal.Signals(number).name
            print(f"ended by {name}: the step did not end within {GIVE_UP_S} s", flush=True)
            os._exit(128 + number)

    def heard(self, device) -> bool:
        """Whether any process was told to end: all must stop after the same step."""
        if self.saves:
            self.signal = largest(self.signal, device)
            self.answered = self.signal > 0
        return self.signal > 0

    def leave(self, step: int) -> None:
        """If a signal was heard: end with its exit code, 128 and its number."""
        if not self.signal:
            return
        if first_process():
            name = signal.Signals(self.signal).name
            print(f"ended by {name} after step {step}: --resume goes on from there", flush=True)
        sys.stdout.flush()
        os._exit(128 + self.signal)  # gloo's threads can hang where DDP lets go of them last


def due(args, step: int, ending: bool) -> bool:
    """Whether the state after this step is to be saved."""
    return bool(args.save_every) and (step % args.save_every == 0 or step == args.steps or ending)


# -----------------------------------------------------------------------------
# What is random: PyTorch on the host and on the card, NumPy, Python


def save_random_state(state: Path, rank: int) -> None:
    """Every process its own file."""
    import numpy
    import torch

    kind, keys, *rest = numpy.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.copy()), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, state / f"random_{rank}.pt")


def load_random_state(state: Path, rank: int) -> None:
    """As this process left it; one that was not there then keeps what its seed gave it."""
    import numpy
    import torch

    file = state / f"random_{rank}.pt"
    if not file.is_file():
        return
    states = torch.load(file, weights_only=True)
    kind, keys, *rest = states["numpy"]
    torch.set_rng_state(states["torch"])
    numpy.random.set_state((kind, keys.numpy(), *rest))
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# -----------------------------------------------------------------------------
# Several processes, or one without a process group


def several() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def first_process() -> bool:
    import torch.distributed as dist

    return not several() or dist.get_rank() == 0


def meet() -> None:
    """Wait for all processes. Raises ConnectionError where one is gone."""
    import torch.distributed as dist

    try:
        if several():
            dist.barrier()
    except RuntimeError as e:
        raise ConnectionError("another process has ended") from e


def from_first(value):
    """What the first process has, in every process."""
    import torch
    import torch.distributed as dist

    values = [value]
    if several():
        device = None
        if dist.get_backend() == "nccl":  # DeepSpeed has not yet said which card is this process's
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.broadcast_object_list(values, device=device)
    return values[0]


def largest(number: int, device) -> int:
    """The largest of the processes' numbers."""
    import torch
    import torch.distributed as dist

    numbers = torch.tensor([number], device=device)
    if several():
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers.item())
