"""What is broken in a training, and what comes of it: `make train-faults` with a small model."""

import json

import pytest
from conftest import ROOT, python, refused, run

from lab import checkpoints

MODULE = ROOT / "modules/04_Accelerate"
# {what is broken: its exit code}; MAYBE: needs rights, or a compiler, that a machine may lack
CODES = {
    "SIGINT to the launcher": 130,
    "SIGTERM to the launcher": 143,
    "SIGKILL of a process": 1,
    "SIGKILL in the middle of a save": 2,
    "full disk while saving": 2,
    "host out of memory (cgroup)": 1,
    "truncated file in the last state": 0,
    "wrong bit in the last state": 0,
    "port taken": 1,
    "clock falls back an hour": 143,
    "SIGKILL at random steps, x2, with restarts": 0,
}
MAYBE = ("full disk while saving", "host out of memory (cgroup)", "clock falls back an hour")
SAID = {
    "SIGTERM to the launcher": "was ended by SIGTERM; step 12 in",
    "SIGKILL of a process": "one of its processes was killed (SIGKILL)",
    "SIGKILL in the middle of a save": "error: cannot save step",
    "full disk while saving": "0.00 GiB are free there): step",
    "truncated file in the last state": "were written",
    "wrong bit in the last state": "is not what was written (CRC-32)",
    "port taken": "EADDRINUSE",
}


@pytest.fixture(scope="module")
def faults(tiny_model) -> dict:
    arguments = f"ARGS=--model {tiny_model} --kills 2"
    done = run("make", "-s", "train-faults", arguments, check=0, PROFILE="cpu")
    return json.loads(done.stdout.splitlines()[-1])


def test_every_fault_ends_soon_and_leaves_nothing(faults):
    rows = {row["broken"]: row for row in faults["faults"]}
    assert rows.keys() | set(MAYBE) == CODES.keys()
    for name, row in rows.items():
        assert row["code"] == CODES[name], row
        assert row["left"] == 0 and row["seconds"] < 60, row  # 30 on a machine with nothing else
        assert row["whole"] > 0 and row["again"] <= 2, row
        assert SAID.get(name, "") in row["line"], row


def test_nothing_is_lost(faults):
    assert faults["interrupted_losses"] == faults["losses"]
    assert faults["losses"][-1] < faults["losses"][0] - 1
    laps = [lap for lap in faults["laps"] if lap]
    assert len(laps) > 6 and all(lap[0][0] > 1 for lap in laps[1:])  # each goes on


# -----------------------------------------------------------------------------
# Which state is taken


def state(folder, step: int, run: dict) -> None:
    partial = folder / f"step-{step}.partial"
    partial.mkdir(parents=True)
    (partial / "state.pt").write_bytes(b"x" * 100)
    checkpoints.finish(partial, run)


def test_only_a_whole_state_of_the_same_run_is_taken(tmp_path, capsys):
    run = {"model": "a", "losses": [1.0]}
    for step in (2, 10, 9):
        state(tmp_path, step, run)
    (tmp_path / "step-12.partial").mkdir()
    (tmp_path / "step-11").mkdir()  # no run.json
    assert checkpoints.steps_in(tmp_path) == [2, 9, 10, 11]
    assert checkpoints.last_whole(tmp_path, {"model": "a"}, 20) == tmp_path / "step-10"
    assert "passing over" in capsys.readouterr().out
    (tmp_path / "step-10" / "state.pt").write_bytes(b"x" * 99 + b"y")
    assert checkpoints.last_whole(tmp_path, {"model": "a"}, 20) == tmp_path / "step-9"
    (tmp_path / "step-9" / "state.pt").unlink()
    assert checkpoints.last_whole(tmp_path, {"model": "a"}, 20) == tmp_path / "step-2"
    with pytest.raises(SystemExit):
        checkpoints.last_whole(tmp_path, {"model": "b"}, 20)
    assert "its model is a, now it is b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        checkpoints.last_whole(tmp_path, {"model": "a"}, 2)
    assert "has all 2 steps behind it" in capsys.readouterr().err


def test_flags_that_are_refused(tmp_path):
    script = MODULE / "01_train_ddp.py"
    state(tmp_path, 4, {"losses": []})
    at = ["--checkpoints", tmp_path]

    def words(*flags) -> str:
        return refused("python", script, *flags, *at, PROFILE="cpu")

    assert "holds step 4 of an earlier run: --resume goes on" in words("--save-every", 2)
    assert "--resume goes on and --fresh begins anew" in words("--resume", "--fresh")
    assert "--fresh deletes states" in words("--fresh")
    assert "must be at least 1" in words("--save-every", 0)
    assert (tmp_path / "step-4").is_dir()


def test_faults_refuses():
    done = python(MODULE / "11_faults.py", "--kills", 0, check=2, PROFILE="cpu")
    assert "--kills must be at least 1" in done.stderr
