"""One training through every fault: killed, told to end, out of disk and memory, its files damaged.

    make train-faults                        # a small model on two processes, a few minutes
    make train-faults ARGS="--kills 3"       # fewer kills at random steps

The training of 01_train_ddp.py is begun, broken, and begun again with --resume, fault after fault,
until it has all its steps. Then it runs once more, undisturbed.

Look at: the table. After each fault the launcher ends by itself, soon, not with exit code 0 and
with no process left; the last whole state is where the next start goes on. `again`: steps that were
computed twice because they came after it. And the last line: the losses of the broken training and
of the undisturbed one are the same, number for number.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from lab import RUNS, fail, models, results, training
from lab.profile import load_profile
from lab.table import table

STATES = RUNS / "04_Accelerate" / "states_faults"
DISK = "FAULTS_DISK"  # variable: STATES is a small disk of its own
SAVE_EVERY = 2


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    small = "two layers of the profile's model, random weights"
    parser.add_argument("--model", help=f"{models.MODEL_FLAG} (default: {small})")
    training.add_flag(parser, "--kills", int, 10, "how many kills at random steps, in one start")
    training.add_flag(parser, "--seed", int, 0, "of the random steps")
    args = parser.parse_args()
    if args.kills < 1:
        fail("--kills must be at least 1")

    # Of a script's background job the shell makes processes that ignore SIGINT, children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import faulty  # the files beside this script
    from fault_curves import draw
    from faulty import Training

    model = (
        models.model_folder(args.model) if args.model else faulty.small_model(profile.train.model)
    )
    if DISK not in os.environ:
        on_a_small_disk(model)
    steps = 40 + 8 * args.kills  # enough that none of the kills comes too late
    flags = ["--model", model, "--seq-len", 32, "--mixed-precision", "no"]
    flags += ["--learning-rate", "1e-3"]
    undisturbed = [*flags, "--steps", steps]
    flags = [*undisturbed, "--save-every", SAVE_EVERY]
    dice = random.Random(args.seed)
    rows = []
    laps = []  # of every start: its (step, loss)

    def broken(what: str, ended: faulty.Ended) -> None:
        """A row of the table, and a line now."""
        again = max(ended.step - ended.whole, computed_twice(laps[-1]))
        ended = ended._replace(seconds=round(ended.seconds, 1))
        rows.append({"broken": what, "again": again, **ended._asdict()})
        print(
            f"{what}: exit code {ended.code} after {ended.seconds:.1f} s: {ended.line}", flush=True
        )

    def start(saved: int = 2, **options) -> Training:
        """The training, gone on with, some states after its beginning."""
        trained = Training(flags, STATES, **options)
        laps.append(trained.points)
        for _ in range(saved):
            trained.until(r"saved step")
        return trained

    def now() -> float:
        return time.monotonic()

    # -----------------------------------------------------------------------------
    # 1. It is told to end: it finishes its step, saves and goes

    for number in (signal.SIGINT, signal.SIGTERM):
        trained = start()
        trained.until("step")
        trained.process.send_signal(number)
        broken(f"{number.name} to the launcher", trained.ended(now()))

    # -----------------------------------------------------------------------------
    # 2. A process is killed: between two saves, and while it saves

    trained = start()
    trained.until("step")
    trained.workers()[1].kill()
    broken("SIGKILL of a process", trained.ended(now()))

    trained = start(saved=1)
    trained.until("step")
    first = trained.workers()[0]
    while not any(STATES.glob("step-*.partial")):
        time.sleep(0.0005)
    first.kill()
    broken("SIGKILL in the middle of a save", trained.ended(now()))

    # -----------------------------------------------------------------------------
    # 3. The disk is full, the host's memory is full

    trained = start()
    if os.environ[DISK]:
        filler = faulty.fill_disk(STATES)
        full = now()
        broken("full disk while saving", trained.ended(full))
        filler.unlink()
    else:
        end(trained)
    trained = start()
    try:
        limit = faulty.MemoryLimit()
        limit.take([trained.process, *trained.processes()])
        limit.leave(8 * 2**20)
        broken("host out of memory (cgroup)", trained.ended(now()))
        limit.remove()
    except OSError as e:
        print(f"host out of memory: not possible here, {e}")
        end(trained)

    # -----------------------------------------------------------------------------
    # 4. A file of the last state is cut short, another has a wrong bit: the state before is taken

    for what, damage in (("truncated file", faulty.truncate), ("wrong bit", faulty.flip_a_bit)):
        last = sorted(STATES.glob("step-*"), key=lambda state: int(state.name[5:]))[-1]
        damage(last / "state.pt")
        since = now()
        trained = start(saved=0)
        line = trained.until("passing over")
        gone_on = trained.until("going on after step")
        whole = int(re.search(r"step (\d+)", gone_on)[1])
        ended = faulty.Ended(None, now() - since, line, 0, int(last.name[5:]), whole)
        broken(f"{what} in the last state", ended)
        trained.until("saved step")
        end(trained)

    # -----------------------------------------------------------------------------
    # 5. The port is taken; the clock falls back an hour

    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port"]
        trained = start(saved=0, launcher=[*place, str(taken.getsockname()[1])])
        broken("port taken", trained.ended(now()))
    try:
        library = faulty.jumping_clock(STATES.parent)
        trained = start(saved=5, LD_PRELOAD=str(library))
        trained.process.terminate()
        broken("clock falls back an hour", trained.ended(now()))
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"clock: not possible here, {e}")

    # -----------------------------------------------------------------------------
    # 6. Killed at random steps, and this time torchrun starts it again itself

    trained = start(saved=0, restarts=args.kills)
    for _ in range(args.kills):
        trained.until("going on after step")
        for _ in range(dice.randint(1, 4)):
            trained.until("step")
        dice.choice(trained.workers()).kill()
    broken(f"SIGKILL at random steps, x{args.kills}, with restarts", trained.ended(now()))
    interrupted = json.loads(trained.process.stdout.read())["losses"]

    # -----------------------------------------------------------------------------
    # 7. The same training, undisturbed

    whole = Training(undisturbed, STATES / "none")
    code = whole.ended(now()).code
    if code:
        fail(f"the undisturbed training failed:\n{whole.lines[-1]}")
    losses = json.loads(whole.process.stdout.read())["losses"]
    worst = max(abs(a - b) for a, b in zip(interrupted, losses, strict=True))
    show(rows)
    print(f"\nlosses of {steps} steps, broken {len(rows)} times: largest difference {worst:g}")
    metrics = {
        "faults": rows,
        "fault_count": len(rows),
        "kill_count": args.kills,
        "step_count": steps,
        "losses": losses,
        "interrupted_losses": interrupted,
        "laps": laps,
        "largest_difference": worst,
        "longest_end_s": max(row["seconds"] for row in rows),
        "left_count": sum(row["left"] for row in rows),
    }
    results.picture(__file__, "faults", draw(losses, laps))
    results.finish(__file__, metrics, vars(args))


def computed_twice(lap: list[tuple[int, float]]) -> int:
    """Steps that one start computed more than once, because it was started again in between."""
    return len(lap) - len({step for step, _ in lap})


def end(trained) -> None:
    """As `make stop` does."""
    trained.process.terminate()
    trained.ended(time.monotonic())


def show(rows: list[dict]) -> None:
    columns = ["what was broken", "exit code", "ended after", "left", "whole", "again"]
    cells = []
    for row in rows:
        where = [str(row[name]) for name in ("left", "whole", "again")]
        cells.append(
            [
                row["broken"],
                "-" if row["code"] is None else str(row["code"]),
                f"{row['seconds']:.1f} s",
                *where,
            ]
        )
    print()
    table(columns, cells)


def on_a_small_disk(model: Path) -> None:
    """Begin again where STATES is a disk in memory with room for four states, if that can be.

    It belongs to this process's own view of the disks, and goes with it.
    """
    shutil.rmtree(STATES, ignore_errors=True)
    STATES.mkdir(parents=True)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    size = 4 * 3 * weights + 2**25  # weights and both moments of Adam
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    for names in (["--mount"], ["--map-root-user", "--mount"]):
        command = ["unshare", *names, "sh", "-c", mount, str(STATES)]
        if shutil.which("unshare") and subprocess.run([*command, "true"]).returncode == 0:
            os.environ[DISK] = str(size)
            os.execvp(command[0], [*command, sys.executable, *sys.orig_argv[1:]])
    print("full disk: not possible here, no disk of its own can be mounted")
    os.environ[DISK] = ""


if __name__ == "__main__":
    main()
