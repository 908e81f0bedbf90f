"""What is broken in a training, and what comes of it: `make train-faults` with a small model."""

import json
from types import SimpleNamespace

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
    "truncated file in the last state": None,
    "wrong bit in the last state": None,
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
        assert row["whole"] > 0 and row["again"] <= 6, row
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
    assert checkpoints.last_whole(tmp_path, {"model": "a"}, 2)  # all is done but its end
    with pytest.raises(SystemExit):
        checkpoints.last_whole(tmp_path, {"model": "a"}, 1)
    assert "has 2 steps behind it, more than --steps 1" in capsys.readouterr().err


def test_run_json_and_files_that_cannot_be_read(tmp_path):
    for step, content in enumerate(("null", "[]", '{"files": []}', '{"files": {}}'), 1):
        state(tmp_path, step, {"losses": []})
        (tmp_path / f"step-{step}" / checkpoints.RUN).write_text(content)
        assert "is missing or broken" in checkpoints.damage(tmp_path / f"step-{step}")
    state(tmp_path, 9, {"losses": []})
    (tmp_path / "step-9" / "state.pt").unlink()
    (tmp_path / "step-9" / "state.pt").mkdir()
    assert "bytes" in checkpoints.damage(tmp_path / "step-9")
    (tmp_path / "step-7.pt").touch()
    (tmp_path / "step-0008").mkdir()
    (tmp_path / "step-10").symlink_to(tmp_path / "step-1")
    assert checkpoints.steps_in(tmp_path) == [1, 2, 3, 4, 9]


def test_a_damaged_state_does_not_count_as_kept(tmp_path):
    """Nor are the folders of others removed."""
    state(tmp_path, 8, {"losses": []})
    (tmp_path / "step-8" / "state.pt").write_bytes(b"")
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "others.bin").touch()
    args = SimpleNamespace(checkpoints=str(tmp_path), keep=1)
    for step in (2, 3):
        with checkpoints.written(args, step, {"losses": []}) as partial:
            (partial / "state.pt").touch()
    assert checkpoints.steps_in(tmp_path) == [1, 3]
    assert (tmp_path / "step-1" / "others.bin").is_file()


def test_started_again_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    state(tmp_path, 4, {"losses": []})
    args = SimpleNamespace(
        checkpoints=str(tmp_path), keep=1, save_every=2, fresh=True, resume=False
    )
    checkpoints.refuse_impossible(args)
    assert args.resume and not args.fresh


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
