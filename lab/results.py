"""Result records: every number a script prints, with its birth certificate.

A script ends with `finish(__file__, metrics, config)`. The last line of its stdout is one JSON
object; the same numbers with command, commit, date, machine, versions, environment and the
profile's values go to runs/records/, and with STORE=1 to results/<machine>/ as evidence. Evidence
is refused without a commit to name, and, unless OTHER_VERSIONS=1 is said, from packages that differ
from the lock; the tables then say what differed.
"""

import json
import os
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from lab import ROOT, RUNS, fail, machine, shown

# RECORDS=folder: the tests keep theirs apart from yours.
FOLDER = Path(os.environ.get("RECORDS") or RUNS / "records")
# Variables that engines go by, as their names begin. Never kept: a secret, an address.
ENGINES = (
    *("ACCELERATE_", "DS_", "HF_", "TOKENIZERS_", "TRANSFORMERS_", "VLLM_"),
    *("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "FLASHINFER_"),
    *("CUDA_", "NCCL_", "GLOO_", "MEMORY_CAP_GIB"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD"),
)
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH", re.I)
OUTSIDE = re.compile(r"(?<![\w./])/(?!/)[^\s:,;]+")  # an absolute path
USED: dict = {}  # the profile that this process runs under: `began` fills it

# -----------------------------------------------------------------------------
# What ran


def name_of(script: str) -> str:
    """`03_vllm/05_throughput` for that module script: the folder's name, and its own."""
    path = Path(script).resolve().with_suffix("")
    return f"{path.parent.name}/{path.name}"


def command() -> str:
    """The command line of this process, as a reader at the repository root would type it."""
    return shlex.join([shown(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def note(name: str) -> None:
    """Keep in history.jsonl that this command has done its work: `make progress` goes by it."""
    line = {
        "date": now(),
        "script": name,
        "profile": os.environ.get("PROFILE", ""),
        "command": command(),
        "make": os.environ.get("MAKE_COMMAND", ""),  # the Makefile sets it
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "history.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")


def portable(text: str) -> str:
    """`text` without this machine's folders.

    Paths of the repository become relative; of others that are not the system's the name is left.
    """
    text = text.replace(f"{sys.prefix}/", ".venv/").replace(f"{ROOT}/", "")

    def short(path: re.Match) -> str:
        if path[0].startswith(("/usr/", "/opt/", "/lib")):
            return path[0]
        return "~" if Path(path[0]) == Path.home() else f".../{Path(path[0]).name}"

    return OUTSIDE.sub(short, text)


def portable_values(values):
    """The same lists and dictionaries, with every text in them portable."""
    if isinstance(values, dict):
        return {key: portable_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [portable_values(value) for value in values]
    return portable(values) if isinstance(values, str) else values


def environment() -> dict[str, str]:
    """The variables that the engines of this process see."""
    kept = {}
    for name, value in sorted(os.environ.items()):
        address = "://" in value.replace("ext://", "")  # `ext://` is Python's logging
        if name.startswith(ENGINES) and not SECRET.search(name) and not address:
            kept[name] = portable(value)
    return kept


# -----------------------------------------------------------------------------
# Whether it may be evidence


def lock() -> str:
    """The lock to compare with: the one that filled this environment, else the installed vLLM's."""
    return machine.lock() or ("gpu" if "vllm" in machine.versions() else "cpu")


def versions_differ() -> dict[str, list[str]]:
    """{package: [installed, locked]} of the recorded packages that are not as in the lock."""
    text = (ROOT / "locks" / f"{lock()}.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.M))
    installed = machine.versions(machine.COMPARED)
    differ = {}
    for name in machine.COMPARED:
        pair = [installed.get(name, "absent"), locked.get(name, "absent")]
        if pair[0] != pair[1]:
            differ[name] = pair
    return differ


def obstacle() -> str:
    """Why what is measured here cannot be evidence; "" where it can, or without STORE=1."""
    if os.environ.get("STORE") != "1":
        return ""
    if machine.commit() == "unknown":
        return (
            "a record under results/ names its commit, and there is no git or no git checkout "
            "here: measure in a clone, or without STORE=1"
        )
    differ = versions_differ()
    if not differ or os.environ.get("OTHER_VERSIONS") == "1":
        return ""
    pairs = [f"{name} {have} (lock: {locked})" for name, (have, locked) in differ.items()]
    return (
        f"installed is not what locks/{lock()}.txt says, {', '.join(pairs)}: run 'make setup', "
        "or say OTHER_VERSIONS=1, and the tables will tell"
    )


def began(profile: dict) -> None:
    """Keep the profile's values, and refuse at the start what `finish` would not store.

    lab.profile calls this.
    """
    USED.update(profile)
    if {"-h", "--help", "--dry-run"} & set(sys.argv):
        return
    why = obstacle()
    if why:
        fail(why)


# -----------------------------------------------------------------------------
# Storing


def evidence(path: str) -> list[Path]:
    """[results/<machine>/`path`], the file; [] where nothing is to be stored as evidence."""
    if os.environ.get("STORE") != "1" or obstacle():
        return []
    return [ROOT / "results" / machine.name() / path]


def picture(script: str, name: str, figure) -> None:
    """Save a figure of matplotlib in runs/<module>/ and, with STORE=1, beside the records."""
    path = f"{Path(script).resolve().parent.name}/{name}.png"
    files = [RUNS / path, *evidence(path)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)
    print(f"plot: {shown(files[-1])}")


def record_of(name: str, metrics: dict, config: dict) -> dict:
    """The record as it is stored: the numbers, and all that they depend on."""
    settings = portable_values(config)
    record = {
        "script": name,
        "command": portable(command()),
        "profile": os.environ.get("PROFILE", ""),
        "profile_values": USED,
        "commit": machine.commit(),
        "date": now(),
        "machine": machine.describe(),
        "lock": lock(),
        "versions": machine.versions(machine.COMPARED),
        "environment": environment(),
        "config": settings,
        "metrics": metrics,
    }
    differ = versions_differ()
    return record | {"versions_differ": differ} if differ else record


def finish(script: str, metrics: dict, config: dict | None = None, variant: str = "") -> None:
    """Store the record, and print the metrics as one JSON object, the last line of stdout.

    Keys of `metrics` end in their unit (throughput_tok_per_s, start_s, speedup_ratio). `variant`
    keeps several records of one script apart. What cannot be evidence is kept in runs/records/ all
    the same; STORE=1 then ends with exit code 2.
    """
    name = name_of(script) + (f"-{variant}" if variant else "")
    record = record_of(name, metrics, config or {})
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    files = [FOLDER / f"{name}.json", *evidence(f"{name}.json")]
    note(name)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    print(f"record: {shown(files[-1])}", file=sys.stderr)
    last_line = {"script": name, "machine": machine.name(), **metrics}
    print(json.dumps(last_line, ensure_ascii=False), flush=True)
    why = obstacle()
    if why:
        fail(f"not stored, only kept as {shown(files[0])}: {why}")
