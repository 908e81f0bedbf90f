"""Records carry their birth certificate, and the tables in the readmes are generated from them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, refused, run

from lab import machine, results

RECORDS = sorted(ROOT.glob("results/*/*/*.json"))
PLAIN = {  # numbers without a unit
    *("zero_stage", "world_size", "losses", "gradient_norms", "learning_rates"),
    *("validation_loss", "validation_losses", "first_validation_loss"),
    # rows of a table, points of a curve, rewards, of losses
    *("faults", "laps", "rewards", "largest_difference"),
}
ALWAYS = {
    *("script", "command", "profile", "commit", "date"),
    *("machine", "versions", "config", "metrics"),
}
SINCE = "2026-11-27T01"  # records also hold these; older ones do not
NEWER = {"profile_values", "lock", "environment"}
SOMETIMES = {"measured_as", "versions_differ", "notes"}
UNITS = (
    r"_(count|ratio|s|ms|us|gb|gib|gb_per_s|tok_per_s|tflop_per_s|pct|w|mhz|px|bytes|nat"
    r"|bits_per_byte)$"
)


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import tables
    return tables


def test_there_are_records():
    assert RECORDS, "results/ holds no evidence: run make evidence"


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: str(f.relative_to(ROOT)))
def test_records_are_complete(file):
    record = json.loads(file.read_text())
    required = ALWAYS | (NEWER if record["date"] > SINCE else set())
    assert required <= record.keys() <= required | SOMETIMES
    assert all(note.keys() == {"zh", "en"} for note in record.get("notes", []))
    assert record["script"] == f"{file.parent.name}/{file.stem}"
    assert record["machine"]["name"] == file.parent.parent.name
    assert re.fullmatch(r"[0-9a-f]{10}(-dirty)?", record["commit"])
    for name, value in record["metrics"].items():
        plain = name in PLAIN or name.endswith(("_loss", "_losses", "_exit_code"))
        needs_unit = not isinstance(value, str) and not plain
        assert not needs_unit or re.search(UNITS, name), f"{name} has no unit"


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: str(f.relative_to(ROOT)))
def test_records_say_what_differs(file):
    """Versions that are not the lock's of its commit are listed.

    The commit is older than the record and holds script and profile, or a note says so.
    """
    record = json.loads(file.read_text())
    if run("git", "rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("this clone does not have the records' commits")
    commit = record["commit"].removesuffix("-dirty")
    committed = run("git", "show", "-s", "--format=%cI", commit).stdout.strip()
    assert committed, f"{commit} is no commit of this repository"
    lock = record.get("lock") or ("gpu" if record["machine"]["gpus"] else "cpu")
    text = run("git", "show", f"{commit}:locks/{lock}.txt", check=0).stdout
    locked = dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", text))
    differ = {
        name: [version, locked.get(name, "absent")]
        for name, version in record["versions"].items()
        if locked.get(name) != version
    }
    listed = record.get("versions_differ", {}).items()
    assert {name: pair for name, pair in listed if pair[0] != "absent"} == differ

    notes = " ".join(note["en"] for note in record.get("notes", []))
    script = record.get("measured_as") or record["command"].split()[0]
    profile = f"configs/profiles/{record['profile']}.yaml"
    assert committed <= record["date"] or "measured before the commit" in notes
    assert in_commit(commit, script) or "was not committed" in notes
    assert in_commit(commit, profile) or "is in no commit" in notes


def in_commit(commit: str, path: str) -> bool:
    return run("git", "cat-file", "-e", f"{commit}:{path}").returncode == 0


def test_tables_do_not_drift():
    """`make tables` has nothing to write."""
    done = python("scripts/tables.py", "--check")
    assert done.returncode == 0, f"{done.stdout}: run make tables"


def test_drift_is_found(tree, tables):
    """A number changed by hand in a readme fails the check; generated anew, the page is as it was.

    That `make tables` writes what it generates: test_evidence_on_other_versions.
    """
    readme = tree / "modules/03_vllm/readme.md"
    original = readme.read_text()
    row = re.search(r"(?m)^\| .*\| +([\d.,]+)", original.split("<!-- table", 1)[1])
    drifted = original.replace(row[0], row[0].replace(row[1], "9999"), 1)
    assert drifted != original
    readme.write_text(drifted)
    done = python("scripts/tables.py", "--check", cwd=tree, PYTHONPATH=str(tree), check=1)
    assert "modules/03_vllm/readme.md" in done.stdout
    assert readme.read_text() == drifted
    assert tables.filled(drifted, "zh") == original


def test_a_missing_record_or_metric_is_said(tree):
    shutil.rmtree(tree / "results")
    done = python("scripts/tables.py", cwd=tree, PYTHONPATH=str(tree), check=2)
    assert "make evidence" in done.stderr


PROBE = "modules/01_single_gpu_smoke/99_probe.py"
SOURCE = """import sys
from lab import results
from lab.profile import load_profile
if "--plain" not in sys.argv:
    load_profile()
print('text')
results.finish(__file__, {'rate_tok_per_s': 3.5}, {'flag': 1, 'model': '/data/private/model-7b'})
"""


def git(tree: Path, *command: str) -> str:
    reader = ("-c", "user.name=reader", "-c", "user.email=reader@localhost")
    return run("git", "-C", tree, *reader, *command, check=0).stdout.strip()


@pytest.fixture
def checkout(tree) -> Path:
    """A clone of today's files, with a script that measures next to nothing."""
    (tree / PROBE).write_text(SOURCE)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    return tree


def here(tree: Path) -> dict:
    """How a process runs in the clone, and keeps its records there."""
    records = str(tree / "runs/records")
    return {"cwd": tree, "PYTHONPATH": str(tree), "PROFILE": "cpu", "RECORDS": records}


def measure(tree: Path, *flags: str, **env) -> dict:
    """The record that the probe stores, or keeps where STORE is not set."""
    environment = here(tree) | {"STORE": "1"} | env
    done = python(tree / PROBE, *flags, check=0, **environment)
    last = json.loads(done.stdout.splitlines()[-1])
    evidence = tree / "results" / last["machine"]
    folder = evidence if environment["STORE"] == "1" else tree / "runs/records"
    return json.loads((folder / "01_single_gpu_smoke/99_probe.json").read_text())


def test_finish(checkout):
    """STORE=1 stores the numbers of stdout's last line, with all that they depend on, whole."""
    record = measure(checkout, "--flag")
    assert record.keys() == ALWAYS | NEWER
    assert record["script"] == "01_single_gpu_smoke/99_probe"
    assert record["metrics"] == {"rate_tok_per_s": 3.5}
    assert record["command"] == f"{PROBE} --flag"
    assert record["lock"] == "cpu"
    assert record["versions"]["torch"] and record["versions"]["tokenizers"]
    assert record["commit"] == git(checkout, "rev-parse", "--short=10", "HEAD")
    assert record["profile_values"]["smoke"]["model"] == "smollm2-135m"
    assert record["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert record["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert not list(checkout.rglob("*.tmp"))


TEXTS = (
    *("README.md", ".CLAUDE.md", "modules/01_single_gpu_smoke/PLAN.md", "tests/test_results.py"),
    *("my.png", "results/cpu-2c/01_single_gpu_smoke/01_smoke.json"),
)
CODE = (
    *("lab/data.py", "modules/03_vllm/01_serve.py", "Makefile", "locks/cpu.in"),
    *("configs/models.yaml", "configs/profiles/mine.yaml"),
)


def test_code_that_is_not_committed_is_marked(checkout, monkeypatch):
    """Scripts, settings and locks count, also new ones; texts, results and tests do not.

    What a record says of its commit is `machine.commit` (test_finish).
    """
    monkeypatch.setattr(machine, "ROOT", checkout)
    for name in TEXTS:
        with (checkout / name).open("a") as file:
            file.write("\n- [x] done\n")
    assert re.fullmatch("[0-9a-f]{10}", machine.commit.__wrapped__())
    for name in CODE:
        with (checkout / name).open("a") as file:
            file.write("\n")
        assert machine.commit.__wrapped__().endswith("-dirty"), name
        git(checkout, "stash", "-qu")


def test_secrets_and_folders_are_not_kept(checkout):
    home = Path.home()
    secrets = {
        "VLLM_API_KEY": "s3cret",
        "HF_TOKEN": "s3cret",
        "VLLM_S3_SECRET": "s3cret",
        "HF_ENDPOINT": "https://me:s3cret@hub",
        "AWS_KEY": "s3cret",
    }
    folders = {
        "HF_HOME": f"{home}/hub",
        "CUDA_HOME": "/usr/local/cuda",
        "VLLM_CACHE_ROOT": str(checkout / "runs/cache"),
        "TORCH_HOME": str(home),
    }
    variables = {"TOKENIZERS_PARALLELISM": "true"} | secrets | folders
    record = measure(checkout, "--folder", "/data/private/x", **variables)
    kept = record["environment"]
    text = json.dumps(record, ensure_ascii=False)
    assert "s3cret" not in text
    assert "private" not in text
    assert str(checkout) not in text
    assert not {"PATH", "HOME"} & kept.keys()
    assert kept["HF_HOME"] == ".../hub"
    assert kept["CUDA_HOME"] == "/usr/local/cuda"
    assert kept["VLLM_CACHE_ROOT"] == "runs/cache"
    assert kept["TORCH_HOME"] == "~"
    assert kept["TOKENIZERS_PARALLELISM"] == "true"
    assert record["config"]["model"] == ".../model-7b"
    assert record["command"].endswith("--folder .../x")


def test_a_commit_that_cannot_be_named(checkout, monkeypatch):
    """Without the program git, without .git, or in the checkout of something else: unknown.

    What is then refused: test_evidence_without_a_commit_is_refused.
    """
    monkeypatch.setattr(machine, "ROOT", checkout)
    assert machine.commit.__wrapped__() != "unknown"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(checkout))
        assert machine.commit.__wrapped__() == "unknown"
    shutil.rmtree(checkout / ".git")
    assert machine.commit.__wrapped__() == "unknown"
    git(checkout.parent, "init", "-q")
    git(checkout.parent, "commit", "-q", "--allow-empty", "-m", "not ours")
    assert machine.commit.__wrapped__() == "unknown"


def test_evidence_without_a_commit_is_refused(checkout):
    """At the start where a profile is loaded, else at the end, when the numbers are kept.

    And `make evidence` before it measures.
    """
    shutil.rmtree(checkout / ".git")
    environment = here(checkout) | {"STORE": "1"}
    kept = checkout / "runs/records/01_single_gpu_smoke/99_probe.json"
    stored = set(checkout.rglob("results/**/*.json"))
    assert "no git" in refused(sys.executable, PROBE, **environment)
    assert not kept.exists()
    assert "no git" in refused(sys.executable, "scripts/evidence.py", **environment | {"STORE": ""})
    done = run(sys.executable, PROBE, "--plain", check=2, **environment)
    assert "not stored, only kept as" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rate_tok_per_s"] == 3.5
    assert json.loads(kept.read_text())["commit"] == "unknown"
    assert set(checkout.rglob("results/**/*.json")) == stored
    run(sys.executable, PROBE, check=0, **environment | {"STORE": ""})


def test_evidence_on_other_versions_is_refused_or_says_so(checkout):
    """What differs from the lock is refused, or with OTHER_VERSIONS=1 stands in the record.

    It then stands also under the record's table, in the page's language.
    """
    lock = checkout / "locks/cpu.txt"
    text = lock.read_text()
    other = re.sub(r"(?m)^trl==\S+", "trl-not==1", text)
    other = re.sub(r"(?m)^peft==\S+", "peft==9.9", other)
    assert other != text
    lock.write_text(other)
    git(checkout, "commit", "-qam", "another lock")
    why = refused(sys.executable, PROBE, STORE="1", **here(checkout))
    assert "peft" in why
    assert "(lock: 9.9)" in why
    assert "OTHER_VERSIONS=1" in why
    record = measure(checkout, OTHER_VERSIONS="1")
    have = record["versions"]
    assert record["versions_differ"] == {
        "peft": [have["peft"], "9.9"],
        "trl": [have["trl"], "absent"],
    }
    # Kept without a question where it is no evidence.
    assert measure(checkout, STORE="")["versions_differ"] == record["versions_differ"]
    pages = {
        "README.md": f"`：版本（括号里是锁定的）：peft {have['peft']}（9.9）、trl",
        "README.en.md": f"`: versions (those of the lock): peft {have['peft']} (9.9), trl",
    }
    first = "<!-- table 01_single_gpu_smoke/99_probe"
    for name in pages:
        with (checkout / name).open("a") as page:
            page.write(f"\n{first}\nrate_tok_per_s = rate\n-->\n<!-- /table -->\n")
    python("scripts/tables.py", check=0, **here(checkout))
    for name, remark in pages.items():
        assert remark in (checkout / name).read_text().rsplit("<!-- table", 1)[1]


def test_footers(tables):
    """What records share is said once; uncommitted code only of records that know it.

    The notes follow, a line for those concerned.
    """
    plain = {"commit": "0123456789", "environment": {}}
    other = {"versions_differ": {"peft": ["2", "1"]}}
    note = {"notes": [{"zh": "某事", "en": "something"}]}
    assert tables.remarks({"a": plain, "b": plain | {"commit": "0123456789"}}, "en") == []
    used = {"a": plain | other, "b": plain | other | note, "c": {"commit": "0123456789-dirty"}}
    assert tables.remarks(used, "en") == [
        "`a`, `b`: versions (those of the lock): peft 2 (1).  ",
        "`b`: something.  ",
    ]
    assert tables.remarks(used, "zh") == [
        "`a`、`b`：版本（括号里是锁定的）：peft 2（1）。  ",
        "`b`：某事。  ",
    ]
    dirty = plain | {"commit": "0123456789-dirty"} | note
    assert tables.remarks({"a": dirty}, "en") == [
        "`a`: code or settings were changed and not committed; something.  "
    ]
    assert tables.remarks(dict.fromkeys("abcd", plain | note), "en") == [
        "all of this table: something.  "
    ]


@pytest.mark.parametrize("readme", ["README.md", "README.en.md"])
def test_claims_mark_records_that_differ(tables, readme):
    """A measured number whose record has a remark carries the mark †, and no other does.

    The line under the table explains it.
    """
    text = (ROOT / readme).read_text()
    block = re.search(r"<!-- claims (zh|en) -->(.*?)<!-- /claims -->", text, re.S)
    assert tables.WORDS[block[1]]["claims"] in block[2].splitlines()
    for name in ("cpu-2c", "h100-cap24", "h100x2-cap24"):
        numbers = re.findall(rf"`{name}`: (.*?)(?=<br>| \|)", block[2])
        assert numbers
        assert any("†" in number for number in numbers) == (name != "cpu-2c")


def test_no_folder_of_the_machine_in_nested_settings():
    """As DeepSpeed's configuration, which is recorded whole, names the folder of its files."""
    nested = {"zero": {"paths": [f"{ROOT}/runs/nvme", "/data/private/x"], "stage": 3}}
    portable = results.portable_values(nested)
    assert portable == {"zero": {"paths": ["runs/nvme", ".../x"], "stage": 3}}
