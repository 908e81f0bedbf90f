"""From logs to a better model: what is learnt, when a model goes out, and the way back."""

import importlib
import json
import sys

import pytest
from conftest import ROOT, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "16_weekly.py"
HELPERS = ("request_log", "publishing", "trials", "factory", "loop_parts", "scoring", "16_weekly")


@pytest.fixture
def weekly(monkeypatch, tmp_path):
    """The script and its helpers, in this process; they write below tmp_path."""
    monkeypatch.syspath_prepend(str(MODULE))
    for name in HELPERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    script = importlib.import_module("16_weekly")
    monkeypatch.setattr(script.factory, "FOLDER", tmp_path)
    monkeypatch.setattr(script, "WEEKS", tmp_path / "weekly")
    monkeypatch.setattr(script.publishing, "SERVING", tmp_path / "serving")
    monkeypatch.setattr(script.publishing, "HISTORY", tmp_path / "serving.json")
    monkeypatch.setattr(script.results, "note", lambda name: None)
    yield script
    for name in HELPERS:
        sys.modules.pop(name, None)


def logged(request: str = "Start it.", **more) -> dict:
    row = {"time": "2026-11-18T10:00:00", "answer": "{}", "thumbs": "up"}
    return row | {"messages": [{"role": "user", "content": request}]} | more


LINES = {  # each alone: why it is not learnt from, "" where it is
    "approved": (logged(), ""),
    "corrected": (logged(thumbs="down", corrected='{"a": 1}'), ""),
    "disliked": (logged(thumbs="down"), "nobody wrote what is right"),
    "not judged": (logged(thumbs=None), "nobody said"),
    "last week": (logged(time="2026-11-15T23:59:59"), "another week"),
    "a key asked": (logged(f"Use sk-{'a' * 20} for it."), "key or token"),
    "a key answered": (logged(answer=f"hf_{'b' * 30}"), "key or token"),
    "a test": (logged("  held OUT\nrequest "), "held-out test set"),
    "seen before": (logged("Asked in week 46."), "asked before"),
    "no time": ({"messages": [], "answer": ""}, "no logged request"),
    "no answer": (logged(answer=""), "no logged request"),
    "a list": ([1], "no logged request"),
}


def dialogue(request: str) -> dict:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant"}]}


@pytest.mark.parametrize("case", LINES)
def test_what_is_learnt_from(weekly, case):
    row, reason = LINES[case]
    line = weekly.request_log.logged(json.dumps(row))
    earlier = [dialogue("asked in  week 46.")]
    held_out = [dialogue("Held out request")]
    added = weekly.request_log.collect([line], "2026-W47", earlier, held_out)
    assert len(added.rows) == (not reason)
    assert all(reason in why for why in added.left_out) and bool(added.left_out) == bool(reason)


def test_a_correction_counts_before_an_approval(weekly):
    """Of the same request; an address is masked on both sides."""
    lines = [logged("To a.b@c.org."), logged("to A.B@C.org.", corrected="Sent to a.b@c.org.")]
    added = weekly.request_log.collect(lines, "2026-W47", [], [])
    assert [m["content"] for m in added.rows[0]["messages"]] == ["to <email>.", "Sent to <email>."]
    assert (len(added.rows), added.masked, added.left_out) == (1, 1, {"asked before": 1})


def test_chinese_and_lines_around_what_is_masked(weekly):
    """Neither a character nor a line break beside an address or a key belongs to it."""
    texts = ("联系a.b@c.org吧。\nd@e.org", "密钥sk-0123456789abcdefghij是新的")
    logs = [logged(text) for text in texts]
    added = weekly.request_log.collect(logs, "2026-W47", [], [])
    assert [row["messages"][0]["content"] for row in added.rows] == ["联系<email>吧。\n<email>"]
    assert any("key or token" in reason for reason in added.left_out)


def test_the_example_has_every_reason(weekly):
    lines = weekly.request_log.read(MODULE / "data/example_log.jsonl")
    added = weekly.request_log.collect(lines, "2026-W47", [], weekly.data.rows("launch_en_test"))
    assert (len(added.rows), added.masked) == (26, 3)
    assert sorted(added.left_out.values()) == [1, 3, 3, 3, 3, 3]
    assert all(json.loads(row["messages"][1]["content"])["port"] for row in added.rows)


GATES = {  # (won, lost, rise of the neutral loss): what holds it back
    (0, 0, 0.0): "",
    (6, 0, 0.05): "",
    (3, 3, 0.1): "",
    (2, 3, 0.0): "3 rows that were right are wrong now, and only 2",
    (6, 0, 0.2): "rose by 20.0%, more than 10.0%",
}


@pytest.mark.parametrize("won, lost, rise", GATES)
def test_the_gate(weekly, won, lost, rise):
    new = {"right": [True] * (won + 5) + [False] * lost, "neutral_loss": 3 * (1 + rise)}
    right = [False] * won + [True] * (5 + lost)
    gate = weekly.publishing.decide(new, {"right": right, "neutral_loss": 3.0}, 0.1 + 1e-9)
    reason = GATES[won, lost, rise]
    assert gate["publish"] == (not reason)
    assert reason in "; ".join(gate["reasons"])
    assert (gate["won_count"], gate["lost_count"]) == (won, lost)


def test_switching_and_the_way_back(weekly, tmp_path, capsys):
    publishing = weekly.publishing
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert publishing.current() is None
    publishing.publish("one")
    publishing.publish("two")
    publishing.publish("two")  # after an interruption
    assert publishing.current() == tmp_path / "two"
    assert publishing.history() == ["one", "two"]
    assert publishing.roll_back() == ("two", "one")
    assert publishing.current() == tmp_path / "one"
    with pytest.raises(SystemExit):
        publishing.roll_back()
    with pytest.raises(SystemExit):
        publishing.publish("gone")
    assert publishing.current() == tmp_path / "one" and publishing.history() == ["one"]
    assert "no model before" in capsys.readouterr().err


@pytest.fixture
def road(weekly, monkeypatch, tmp_path):
    """road("--go", ...): the script with stand-ins for its steps, and which of them it ran.

    `road.right` is how many of four rows the trained model has right, `road.ends` the step that
    Ctrl+C ends.
    """

    def result(script: str, *flags: str) -> dict:
        if script == call.ends:
            raise KeyboardInterrupt
        call.ran.append(script)
        value = dict(zip(flags, flags[1:], strict=False))
        if script == "02_score.py":
            tuned = call.right if value["--adapter"].endswith("lora") else call.before
            rows = [answered(number, tuned) for number in range(4)]
            (ROOT / value["--answers"]).write_text(json.dumps(rows))
        if script == "03_merge.py":
            (ROOT / value["--output"]).mkdir()
        return {"leaked_count": 0, "base_neutral_loss": 3.0, "tuned_neutral_loss": 3.1}

    def answered(number: int, right: int) -> dict:
        question = {"request": "", "messages": [], "tools": None, "prompt": "", "target": ""}
        answers = {"tuned": "yes" if number < right else "no", "base": "no"}
        return question | {"wanted": "yes", "is_call": False} | answers

    def call(*flags: str) -> list[str]:
        call.ran = []
        monkeypatch.setattr(sys, "argv", ["16_weekly.py", *flags])
        try:
            weekly.main()
        except KeyboardInterrupt:
            call.ran.append("interrupted")
        return call.ran

    monkeypatch.setenv("PROFILE", "cpu")
    monkeypatch.setattr(weekly.trials, "result", result)
    monkeypatch.setattr(weekly.signal, "signal", lambda *_: None)
    call.ends = ""
    call.right = call.before = 3
    return call


CHECK, TRAIN, SCORE, MERGE = "00_check_data.py", "01_train.py", "02_score.py", "03_merge.py"


def test_the_road(road, weekly, tmp_path, capsys):
    """Interrupted, it goes on; a week that is worse is held back; the next adds to all before."""
    road.ends = SCORE
    assert road("--go") == [CHECK, TRAIN, "interrupted"]
    road.ends = ""
    assert road("--go") == [SCORE, MERGE]
    first = tmp_path / "weekly/2026-W47"
    assert weekly.publishing.current() == first / "merged"
    assert road("--go") == []
    assert "has its rows already" in capsys.readouterr().out

    log = tmp_path / "log.jsonl"
    later = [logged("New one.", time="2026-11-25T10:00:00")]
    log.write_text("".join(json.dumps(row) + "\n" for row in later))
    road.right = 2
    assert road("--go", "--log", str(log)) == [CHECK, TRAIN, SCORE, SCORE]
    out = capsys.readouterr().out
    assert "held back, what is served stays: 1 rows that were right are wrong now" in out
    assert weekly.publishing.current() == first / "merged"
    rows = json.loads((tmp_path / "weekly/2026-W48/data.json").read_text())
    assert len(rows) == 27 and rows[-1]["messages"][0]["content"] == "New one."
    assert not (tmp_path / "weekly/2026-W48/merged").exists()


def test_without_go_nothing_is_done(tmp_path):
    """By the real command: each step with the week's folder, and nothing written."""
    done = run("make", "lf-weekly", check=0, PROFILE="cpu", RUNS=str(tmp_path))
    out = done.stdout
    for script in (CHECK, TRAIN, SCORE, MERGE):
        assert f"python modules/06_LLaMA-Factory/{script}" in out
    assert out.count("weekly/2026-W47/lora") >= 3
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--week 2020-W01", "has no request of week 2020-W01"),
        ("--log nowhere.jsonl", "the log nowhere.jsonl cannot be read"),
        ("--roll-back", "there is no model before"),
        ("--test nothing", "there is no data set"),
    ],
)
def test_what_cannot_be(flags, reason, tmp_path):
    assert reason in refused("python", SCRIPT, *flags.split(), PROFILE="cpu", RUNS=str(tmp_path))


@pytest.mark.long
def test_the_real_road(tiny_model, tmp_path):
    """Two weeks by the real scripts; of the second, the model of the first is scored too."""
    log = tmp_path / "log.jsonl"
    text = (MODULE / "data/example_log.jsonl").read_text()
    log.write_text(text + json.dumps(logged("New one.", time="2026-11-25T10:00:00")) + "\n")
    common = ["--go", "--log", log, "--model", tiny_model, "--limit", 4, "--most-rise", 9]
    for week in ("2026-W47", "2026-W48"):
        flags = [*common, "--week", week, "max_steps=2", "max_samples=16"]
        out = run("python", SCRIPT, *flags, PROFILE="cpu", RUNS=str(tmp_path)).stdout
        assert f"serving -> weekly/{week}/merged" in out
    module = tmp_path / "06_LLaMA-Factory"
    assert (module / "weekly/2026-W48/answers_current.json").is_file()
    assert (module / "serving").resolve() == module / "weekly/2026-W48/merged"
    assert (module / "serving/model.safetensors").is_file()
    run("python", SCRIPT, "--roll-back", PROFILE="cpu", RUNS=str(tmp_path))
    assert (module / "serving").resolve() == module / "weekly/2026-W47/merged"
