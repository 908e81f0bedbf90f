"""Records carry their birth certificate, and the tables in the readmes are generated from them."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, refused, run

RECORDS = sorted(ROOT.glob("results/*/*/*.json"))
PLAIN = {"zero_stage", "world_size", "losses"}  # numbers without a unit
ALWAYS = {
    "script",
    "command",
    "profile",
    "commit",
    "date",
    "machine",
    "versions",
    "config",
    "metrics",
}
SINCE = "2026-11-27T01"  # records also hold these; older ones do not
NEWER = {"profile_values", "lock", "environment"}
SOMETIMES = {"measured_as", "versions_differ", "notes"}
UNITS = r"_(count|ratio|s|ms|gb|gib|gb_per_s|tok_per_s|tflop_per_s|pct|w|mhz|px|bytes)$"


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
    assert (
        record["script"] == f"{file.parent.name}/{file.stem}"
        and record["machine"]["name"] == file.parent.parent.name
    )
    assert re.fullmatch(r"[0-9a-f]{10}(-dirty)?", record["commit"])
    for name, value in record["metrics"].items():
        assert isinstance(value, str) or name in PLAIN or re.search(UNITS, name), (
            f"{name} has no unit"
        )


@pytest.mark.parametrize("file", RECORDS, ids=lambda f: str(f.relative_to(ROOT)))
def test_records_say_what_differs(file):
    """Versions that are not the lock's of its commit are listed; the commit is older than the
    record and holds script and profile, or a note says so.
    """
    record = json.loads(file.read_text())
    if run("git", "rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("this clone does not have the records' commits")
    commit = record["commit"].removesuffix("-dirty")
    committed = run("git", "show", "-s", "--format=%cI", commit).stdout.strip()
    assert committed, f"{commit} is no commit of this repository"
    lock = record.get("lock") or ("gpu" if record["machine"]["gpus"] else "cpu")
    locked = dict(
        re.findall(
            r"(?m)^([a-z0-9-]+)==(\S+)",
            run("git", "show", f"{commit}:locks/{lock}.txt", check=0).stdout,
        )
    )
    differ = {
        name: [version, locked.get(name, "absent")]
        for name, version in record["versions"].items()
        if locked.get(name) != version
    }
    listed = {
        name: pair
        for name, pair in record.get("versions_differ", {}).items()
        if pair[0] != "absent"
    }
    assert listed == differ
    words = " ".join(note["en"] for note in record.get("notes", []))
    assert committed <= record["date"] or "measured before the commit" in words
    script = record.get("measured_as") or record["command"].split()[0]
    assert (
        run("git", "cat-file", "-e", f"{commit}:{script}").returncode == 0
        or "was not committed" in words
    )
    profile = f"configs/profiles/{record['profile']}.yaml"
    assert (
        run("git", "cat-file", "-e", f"{commit}:{profile}").returncode == 0
        or "is in no commit" in words
    )


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


PROBE = "modules/01_single_gpu_smoke/99_probe.py"
SOURCE = """import sys
from lab import results
from lab.profile import load_profile
if "--plain" not in sys.argv:
    load_profile()
print('text')
results.finish(__file__, {'rate_tok_per_s': 3.5}, {'flag': 1, 'model': '/data/private/model-7b'})
"""


def git(tree: Path, *words: str) -> str:
    return run(
        "git",
        "-C",
        tree,
        "-c",
        "user.name=reader",
        "-c",
        "user.email=reader@localhost",
        *words,
        check=0,
    ).stdout.strip()


@pytest.fixture
def checkout(tree) -> Path:
    """A clone of today's files, with a script that measures next to nothing."""
    (tree / PROBE).write_text(SOURCE)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    return tree


def measure(tree: Path, *flags: str, **env) -> dict:
    """The record that the probe stores, or keeps where STORE is not set."""
    environment = {
        "cwd": tree,
        "PYTHONPATH": str(tree),
        "PROFILE": "cpu",
        "RECORDS": str(tree / "runs/records"),
        "STORE": "1",
    } | env
    last = json.loads(python(tree / PROBE, *flags, check=0, **environment).stdout.splitlines()[-1])
    folder = (
        tree / "results" / last["machine"] if environment["STORE"] == "1" else tree / "runs/records"
    )
    return json.loads((folder / "01_single_gpu_smoke/99_probe.json").read_text())


def test_finish(checkout):
    """The last line of stdout is the JSON; STORE=1 stores the same numbers as evidence, with all
    that they depend on, in whole files.
    """
    record = measure(checkout, "--flag")
    assert record["script"] == "01_single_gpu_smoke/99_probe" and record["metrics"] == {
        "rate_tok_per_s": 3.5
    }
    assert (
        record.keys() == ALWAYS | NEWER
        and record["command"] == f"{PROBE} --flag"
        and record["lock"] == "cpu"
    )
    assert record["versions"]["torch"] and record["versions"]["tokenizers"]
    assert record["commit"] == git(checkout, "rev-parse", "--short=10", "HEAD")
    assert record["profile_values"]["smoke"]["model"] == "smollm2-135m"
    assert (
        record["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
        and record["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    )
    assert not list(checkout.rglob("*.tmp"))


def test_code_that_is_not_committed_is_marked(checkout):
    """Scripts, settings and locks count, also new ones; ticks, the snapshot, results and tests do
    not.
    """
    for name in (
        "modules/01_single_gpu_smoke/PLAN.md",
        ".CLAUDE.md",
        "README.md",
        "tests/test_results.py",
    ):
        (checkout / name).write_text((checkout / name).read_text() + "\n- [x] done\n")
    (checkout / "results/cpu-2c/01_single_gpu_smoke/01_smoke.json").unlink()
    (checkout / "my.png").touch()
    assert re.fullmatch("[0-9a-f]{10}", measure(checkout)["commit"])
    for name in (
        "lab/data.py",
        "modules/03_vllm/01_serve.py",
        "configs/models.yaml",
        "Makefile",
        "locks/cpu.in",
        "configs/profiles/mine.yaml",
    ):
        old = (checkout / name).read_text() if (checkout / name).exists() else ""
        (checkout / name).write_text(old + "\n")
        assert measure(checkout, "--plain")["commit"].endswith("-dirty"), name
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
    record = measure(
        checkout, "--folder", "/data/private/x", TOKENIZERS_PARALLELISM="true", **secrets, **folders
    )
    kept, text = record["environment"], json.dumps(record, ensure_ascii=False)
    assert (
        "s3cret" not in text
        and "private" not in text
        and str(checkout) not in text
        and not {"PATH", "HOME"} & kept.keys()
    )
    assert (kept["HF_HOME"], kept["CUDA_HOME"], kept["VLLM_CACHE_ROOT"], kept["TORCH_HOME"]) == (
        ".../hub",
        "/usr/local/cuda",
        "runs/cache",
        "~",
    )
    assert (
        kept["TOKENIZERS_PARALLELISM"] == "true"
        and record["config"]["model"] == ".../model-7b"
        and record["command"].endswith("--folder .../x")
    )


def no_git(tree: Path) -> dict:
    shutil.rmtree(tree / ".git")
    return {}


def inside_another(tree: Path) -> dict:
    shutil.rmtree(tree / ".git")
    git(tree.parent, "init", "-q")
    git(tree.parent, "commit", "-q", "--allow-empty", "-m", "not ours")
    return {}


def no_git_program(tree: Path) -> dict:
    return {"PATH": str(tree)}


@pytest.mark.parametrize("broken", [no_git, inside_another, no_git_program])
def test_evidence_without_a_commit_is_refused(checkout, broken):
    """At the start where a profile is loaded, else at the end, when the numbers are kept; and `make
    evidence` before it measures.
    """
    environment = {
        "cwd": checkout,
        "PYTHONPATH": str(checkout),
        "PROFILE": "cpu",
        "RECORDS": str(checkout / "runs/records"),
        "STORE": "1",
    } | broken(checkout)
    kept = checkout / "runs/records/01_single_gpu_smoke/99_probe.json"
    stored = set(checkout.rglob("results/**/*.json"))
    assert "no git" in refused(sys.executable, PROBE, **environment) and not kept.exists()
    assert "no git" in refused(sys.executable, "scripts/evidence.py", **environment | {"STORE": ""})
    done = run(sys.executable, PROBE, "--plain", check=2, **environment)
    assert (
        "not stored, only kept as" in done.stderr
        and json.loads(done.stdout.splitlines()[-1])["rate_tok_per_s"] == 3.5
    )
    assert (
        json.loads(kept.read_text())["commit"] == "unknown"
        and set(checkout.rglob("results/**/*.json")) == stored
    )
    run(sys.executable, PROBE, check=0, **environment | {"STORE": ""})


def test_evidence_on_other_versions_is_refused_or_says_so(checkout):
    """What differs from the lock is refused, or with OTHER_VERSIONS=1 stands in the record and
    under its table, in the page's language.
    """
    lock = checkout / "locks/cpu.txt"
    text = lock.read_text()
    lock.write_text(
        re.sub(r"(?m)^peft==\S+", "peft==9.9", re.sub(r"(?m)^trl==\S+", "trl-not==1", text))
    )
    assert lock.read_text() != text
    git(checkout, "commit", "-qam", "another lock")
    environment = {
        "cwd": checkout,
        "PYTHONPATH": str(checkout),
        "PROFILE": "cpu",
        "RECORDS": str(checkout / "runs/records"),
    }
    why = refused(sys.executable, PROBE, STORE="1", **environment)
    assert "peft" in why and "(lock: 9.9)" in why and "OTHER_VERSIONS=1" in why
    record = measure(checkout, OTHER_VERSIONS="1")
    have = record["versions"]
    assert record["versions_differ"] == {
        "peft": [have["peft"], "9.9"],
        "trl": [have["trl"], "absent"],
    }
    assert (
        measure(checkout, STORE="")["versions_differ"] == record["versions_differ"]
    )  # kept without a question
    pages = {
        "README.md": f"`：版本（括号里是锁定的）：peft {have['peft']}（9.9）、trl",
        "README.en.md": f"`: versions (those of the lock): peft {have['peft']} (9.9), trl",
    }
    rows = (
        "\n<!-- table 01_single_gpu_smoke/99_probe\nrate_tok_per_s = rate\n-->\n<!-- /table -->\n"
    )
    for name in pages:
        (checkout / name).write_text((checkout / name).read_text() + rows)
    python("scripts/tables.py", check=0, **environment)
    for name, words in pages.items():
        assert words in (checkout / name).read_text().rsplit("<!-- table", 1)[1]


def test_footers(tables):
    """What records share is said once; uncommitted code is said of records that know it; the notes
    follow, a line for those concerned.
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
    """A measured number whose record has a remark carries the mark that the line under the table
    explains, and no other does.
    """
    text = re.search(
        r"<!-- claims (zh|en) -->(.*?)<!-- /claims -->", (ROOT / readme).read_text(), re.S
    )
    language, lines = text[1], text[2].splitlines()
    assert tables.WORDS[language]["claims"] in lines
    for machine in ("cpu-2c", "h100-cap24", "h100x2-cap24"):
        numbers = [
            n for line in lines for n in re.findall(rf"`{machine}`: (.*?)(?=<br>| \|)", line)
        ]
        assert numbers and any("†" in n for n in numbers) == (machine != "cpu-2c")
