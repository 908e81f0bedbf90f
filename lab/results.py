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

FOLDER = Path(
    os.environ.get("RECORDS") or RUNS / "records"
)  # the tests keep theirs apart from yours
# Variables that engines go by, as their names begin. Never kept: a secret, an address.
ENGINES = ("ACCELERATE_", "CUDA_", "DS_", "FLASHINFER_", "GLOO_", "GOMP_", "HF_", "KMP_", "LD_PRELOAD", "MALLOC_", "MEMORY_CAP_GIB",
           "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TORCHINDUCTOR_", "TRANSFORMERS_", "TRITON_", "VLLM_")  # fmt: skip
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASS|CREDENTIAL|AUTH", re.I)
OUTSIDE = re.compile(r"(?<![\w./])/(?!/)[^\s:,;]+")  # an absolute path
USED: dict = {}  # the profile that this process runs under: `began` fills it


def name_of(script: str) -> str:
    """`03_vllm/05_throughput` for that module script; scripts outside modules/ keep their own
    folder's name.
    """
    path = Path(script).resolve().with_suffix("")
    return f"{path.parent.name}/{path.name}"


def command() -> str:
    """The command line of this process, as a reader at the repository root would type it."""
    return shlex.join([shown(Path(sys.argv[0]).resolve()), *sys.argv[1:]])


def note(name: str) -> None:
    """Keep in history.jsonl that this command has done its work: `make progress` goes by it.
    MAKE_COMMAND is set by the Makefile.
    """
    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "script": name,
        "profile": os.environ.get("PROFILE", ""),
    }
    line |= {"command": command(), "make": os.environ.get("MAKE_COMMAND", "")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "history.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")


def portable(text: str) -> str:
    """`text` without this machine's folders: paths of the repository relative, of others that are
    not the system's only the name.
    """
    text = text.replace(f"{sys.prefix}/", ".venv/").replace(f"{ROOT}/", "")

    def short(path: re.Match) -> str:
        if path[0].startswith(("/usr/", "/opt/", "/lib")):
            return path[0]
        return "~" if Path(path[0]) == Path.home() else f".../{Path(path[0]).name}"

    return OUTSIDE.sub(short, text)


def environment() -> dict[str, str]:
    """The variables that the engines of this process see."""
    kept = {}
    for name, value in sorted(os.environ.items()):
        address = "://" in value.replace("ext://", "")  # `ext://` is Python's logging
        if name.startswith(ENGINES) and not SECRET.search(name) and not address:
            kept[name] = portable(value)
    return kept


def lock() -> str:
    """The lock to compare with: the one that set-up filled this environment from, else that of the
    installed vLLM.
    """
    return machine.lock() or ("gpu" if "vllm" in machine.versions() else "cpu")


def versions_differ() -> dict[str, list[str]]:
    """{package: [installed, locked]} of the recorded packages that are not as in the lock."""
    text = (ROOT / "locks" / f"{lock()}.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.M))
    installed = machine.versions(machine.COMPARED)
    pairs = {
        name: [installed.get(name, "absent"), locked.get(name, "absent")]
        for name in machine.COMPARED
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def obstacle() -> str:
    """Why what this process measures cannot be stored as evidence; "" where it can or where nobody
    asked (STORE=1).
    """
    if os.environ.get("STORE") != "1":
        return ""
    if machine.commit() == "unknown":
        return "a record under results/ names its commit, and there is no git or no git checkout here: measure in a clone, or without STORE=1"
    differ = versions_differ()
    if differ and os.environ.get("OTHER_VERSIONS") != "1":
        pairs = ", ".join(
            f"{name} {installed} (lock: {locked})" for name, (installed, locked) in differ.items()
        )
        return f"installed is not what locks/{lock()}.txt says, {pairs}: run 'make setup', or say OTHER_VERSIONS=1, and the tables will tell"
    return ""


def began(profile: dict) -> None:
    """Keep the profile's values for the record, and refuse at the start what `finish` would not
    store (lab.profile calls this).
    """
    USED.update(profile)
    if not {"-h", "--help", "--dry-run"} & set(sys.argv) and (why := obstacle()):
        fail(why)


def picture(script: str, name: str, figure) -> None:
    """Save a matplotlib figure as runs/<module>/<name>.png and, with STORE=1, beside the records;
    say where.
    """
    targets = [RUNS / Path(script).resolve().parent.name / f"{name}.png"]
    if os.environ.get("STORE") == "1" and not obstacle():
        targets.append(ROOT / "results" / machine.name() / targets[0].parent.name / targets[0].name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
    print(f"plot: {shown(targets[-1])}")


def finish(script: str, metrics: dict, config: dict | None = None, variant: str = "") -> None:
    """Store the record and print `{"script": ..., "machine": ..., **metrics}` as the last line of
    stdout.

    Keys of `metrics` end in their unit (throughput_tok_per_s, start_s, speedup_ratio). `variant`
    keeps several records of one script apart. What cannot be evidence is kept in runs/records/ all
    the same; STORE=1 then ends with exit code 2.
    """
    name = name_of(script) + (f"-{variant}" if variant else "")
    record = {
        "script": name,
        "command": portable(command()),
        "profile": os.environ.get("PROFILE", ""),
        "profile_values": USED,
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "lock": lock(),
        "versions": machine.versions(machine.COMPARED),
        "environment": environment(),
        "config": {
            key: portable(value) if isinstance(value, str) else value
            for key, value in (config or {}).items()
        },
        "metrics": metrics,
    }
    if differ := versions_differ():
        record["versions_differ"] = differ
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    targets, why = [FOLDER / f"{name}.json"], obstacle()
    if os.environ.get("STORE") == "1" and not why:
        targets.append(ROOT / "results" / machine.name() / f"{name}.json")
    note(name)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".tmp")
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    print(f"record: {shown(targets[-1])}", file=sys.stderr)
    print(
        json.dumps({"script": name, "machine": machine.name(), **metrics}, ensure_ascii=False),
        flush=True,
    )
    if why:
        fail(f"not stored, only kept as {shown(targets[0])}: {why}")
