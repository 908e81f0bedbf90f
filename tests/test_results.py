"""Records carry their birth certificate, and the tables in the readmes are generated from them."""

import json
import re
import shutil

import pytest
from conftest import ROOT, python, run

RECORDS = sorted(ROOT.glob("results/*/*/*.json"))
PLAIN = {"zero_stage", "world_size", "losses"}  # numbers without a unit
UNITS = r"_(count|ratio|s|ms|gb|gib|gb_per_s|tok_per_s|tflop_per_s|pct|w|mhz|px|bytes)$"


def test_there_are_records():
    assert RECORDS, "results/ holds no evidence: run make evidence"


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: str(f.relative_to(ROOT)))
def test_records_are_complete(file):
    record = json.loads(file.read_text())
    assert record.keys() == {"script", "command", "profile", "commit", "date", "machine", "versions", "config", "metrics"}
    assert record["script"] == f"{file.parent.name}/{file.stem}" and record["machine"]["name"] == file.parent.parent.name
    assert re.fullmatch(r"[0-9a-f]{10}(-dirty)?", record["commit"])
    for name, value in record["metrics"].items():
        assert isinstance(value, str) or name in PLAIN or re.search(UNITS, name), f"{name} has no unit"


def test_tables_do_not_drift():
    """`make tables` has nothing to write."""
    done = python("scripts/tables.py", "--check")
    assert done.returncode == 0, f"{done.stdout}: run make tables"


def test_drift_is_found(tree):
    """A number changed by hand in a readme fails the check, and `make tables` mends it."""
    readme = tree / "modules/03_vllm/readme.md"
    original = readme.read_text()
    row = re.search(r"(?m)^\| .*\| +([\d.,]+)", original.split("<!-- table", 1)[1])
    readme.write_text(original.replace(row[0], row[0].replace(row[1], "9999"), 1))
    assert readme.read_text() != original
    python("scripts/tables.py", "--check", cwd=tree, PYTHONPATH=str(tree), check=1)
    python("scripts/tables.py", cwd=tree, PYTHONPATH=str(tree), check=0)
    assert readme.read_text() == original


def test_a_missing_record_or_metric_is_said(tree):
    shutil.rmtree(tree / "results")
    done = python("scripts/tables.py", cwd=tree, PYTHONPATH=str(tree), check=2)
    assert "make evidence" in done.stderr


def test_finish(tree):
    """The last line of stdout is the JSON; STORE=1 stores the same numbers as evidence, in whole files."""
    script = tree / "modules/01_single_gpu_smoke/99_probe.py"
    script.write_text("from lab import results\nprint('text')\nresults.finish(__file__, {'rate_tok_per_s': 3.5}, {'flag': 1})\n")
    out = run("python", script, "--flag", cwd=tree, PYTHONPATH=str(tree), STORE="1", check=0).stdout.splitlines()
    last = json.loads(out[-1])
    assert last["script"] == "01_single_gpu_smoke/99_probe" and last["rate_tok_per_s"] == 3.5
    stored = json.loads((tree / "results" / last["machine"] / "01_single_gpu_smoke/99_probe.json").read_text())
    assert stored["metrics"] == {"rate_tok_per_s": 3.5} and stored["command"].endswith("99_probe.py --flag") and stored["versions"]["torch"]
    assert not list(tree.rglob("*.tmp"))
