"""What the tests share: running a command as a reader would, a copy of the tree, one running
server.
"""

import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import workers
from workers import pytest_xdist_auto_num_workers, pytest_xdist_make_scheduler  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
RUNS = workers.settle(os.environ.pop("PYTEST_XDIST_WORKER", "gw0"), ROOT)
RECORDS = RUNS / "tests" / "records"  # the reader's own stay as they are
os.environ["RECORDS"] = str(RECORDS)
# A shell's `&` ignores Ctrl+C, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# `make test ARGS=...` means pytest; make would pass it on to every make that a test runs.
os.environ.pop("ARGS", None)
ENVIRONMENT = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}

# Seconds until a command counts as hung: no limit on how slow a busy machine may be.
PATIENCE = 1200

# Programs that tests use beside those README asks for, and the Debian package of each; .ci/run
# installs them all.
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "curl": "curl",
    "ip": "iproute2",
    "nginx": "nginx-light",
    "chromium": "chromium",
    "openssl": "openssl",
    "libaio.h": "libaio-dev",  # a header, not a program
}


def pytest_configure(config):
    workers.separate(config)
    config.addinivalue_line(
        "markers", "needs(*programs): skipped without them, a failure where CI is true"
    )


@pytest.hookimpl(tryfirst=True)  # before skipif, whose reason would hide this one
def pytest_runtest_setup(item):
    """@pytest.mark.needs("promtool", ...): without one of these programs skip the test; where CI is
    true, fail.
    """
    late = time.time() > float(os.environ.get("TESTS_END_AT", "inf"))
    if late and item.get_closest_marker("long"):
        pytest.skip("the time of this run is used up: run it by make test-long")
    for mark in item.iter_markers("needs"):
        missing = [name for name in mark.args if not installed(name)]
        if missing:
            packages = {PACKAGES[name] for name in missing}
            words = (
                f"{', '.join(missing)} not installed: sudo apt install {' '.join(sorted(packages))}"
            )
            if os.environ.get("CI") == "true":
                pytest.fail(words, pytrace=False)
            pytest.skip(words)


def installed(name: str) -> bool:
    """Whether a program, or a header, of this name is there."""
    header = Path("/usr/include", name)
    return bool(shutil.which(name, path=ENVIRONMENT["PATH"])) or header.is_file()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """The last words: how many tests lacked a package, and how to get them all."""
    yield
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    lacking = [
        found[1]
        for reason in reasons
        if (found := re.search(r"sudo apt install ([\w -]+)", reason))
    ]
    if lacking:
        packages = " ".join(sorted(set(" ".join(lacking).split())))
        count = f"{len(lacking)} test{'s'[: len(lacking) != 1]}"
        terminalreporter.write_line(
            f"{count} skipped for missing Debian packages: sudo apt install {packages}", yellow=True
        )


def pytest_collection_modifyitems(items):
    """The first worker's files, then fast ones, whose failures are soon said, then the longest."""
    order = [
        *workers.FIRST_WORKER,
        *("test_profile", "test_results", "test_data", "test_quickstart", "test_smoke"),
        *("test_llamafactory", "test_accelerate", "test_image_edit", "test_deepspeed"),
    ]
    places = {f"{name}.py": place for place, name in enumerate(order)}
    items.sort(key=lambda item: places.get(item.path.name, len(order)))


def run(*command, cwd=ROOT, timeout=PATIENCE, check=None, **env) -> subprocess.CompletedProcess:
    """Run a command in a session of its own with the environment's programs first on PATH; `check`
    is the exit code it must have.
    """
    words = [str(w) for w in command]
    # Not inherited: what pytest's own run set for its children, such as the profile of an
    # in-process test; and a copy of the tree has a folder of its own for what it writes.
    dropped = {"PROFILE", "STORE", "MAKEFLAGS", "MAKELEVEL"}
    if not Path(cwd).is_relative_to(ROOT):
        dropped.add("RUNS")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in dropped} | env
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{words} ran longer than {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    if check is not None:
        ended = f"{words}: exit code {process.returncode}, expected {check}"
        assert process.returncode == check, f"{ended}\n{out[-3000:]}\n{err[-3000:]}"
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def refused(*command, **kwargs) -> str:
    """Run a command that must be refused: exit code 2 and exactly one sentence. Returns the
    sentence.
    """
    done = run(*command, check=2, **kwargs)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    return sentences[0]


def python(*command, **kwargs):
    return run(sys.executable, *command, **kwargs)


def recipe(target: str, *flags, **variables) -> list[str]:
    """The launcher's command that a make target runs."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    arguments = " ".join(map(str, flags))
    lines = run("make", "-n", target, *settings, f"ARGS={arguments}", check=0).stdout.splitlines()
    (line,) = [line for line in lines if "lab.launch" in line]
    return shlex.split(line.partition(" lab.launch ")[2])[1:]


def in_processes(modules: str, commands: dict[str, list], **kwargs) -> dict[str, dict]:
    """{name: result} of commands whose processes are forked from one that imported the modules:
    launchers' commands, or a script and its flags.
    """
    words = [[str(word) for word in command] for command in commands.values()]
    words = [["python", *each] if each[0].endswith(".py") else each for each in words]
    program = ROOT / "tests/programs/in_processes.py"
    done = python(program, modules, json.dumps(words), check=0, **kwargs)
    lines = map(json.loads, done.stdout.splitlines())
    return dict(zip(commands, lines, strict=True))


@pytest.fixture
def module06(monkeypatch):
    """Its helper files, imported as its scripts import them."""
    names = ("checkpoints", "unfinished", "factory", "rows", "fitting", "entries", "checks")
    names += ("views", "scoring", "showing", "trials")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "modules/06_LLaMA-Factory"))
    monkeypatch.setenv("PROFILE", "cpu")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@functools.cache
def network_namespaces() -> bool:
    """Whether two machines can be made here: their scripts compute on CPUs, and lay their cable or
    say why it cannot be laid.
    """
    from lab import cable
    from lab.profile import detect

    if detect() != "cpu":
        return False
    try:
        return bool(cable.way_to_machine_0())
    except SystemExit:
        return False


@pytest.fixture
def two_machines():
    if not network_namespaces():
        pytest.skip("no network namespaces can be made here")


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the repository's files under a path with a space and Chinese characters, using this
    environment.
    """
    target = tmp_path / "路径 with space"
    for name in run("git", "ls-files", "-co", "--exclude-standard", "-z", check=0).stdout.split(
        "\0"
    ):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def trl():
    """trl, made ready as module 06 does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "modules/06_LLaMA-Factory"))
        importlib.import_module("trl_ready").make_ready()
    return importlib.import_module("trl")


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """filled("gpu"): the python of an environment that set-up filled from the gpu lock, by its
    marker; the packages are ours.
    """

    def python_of(lock: str) -> Path:
        folder = tmp_path_factory.mktemp("filled") / lock
        folder.mkdir()
        for name in ("bin", "lib", "pyvenv.cfg"):
            (folder / name).symlink_to(Path(sys.prefix, name))
        (folder / ".videofen-setup").write_text(f"{lock} 0123456789abcdef /somewhere\n")
        return folder / "bin" / "python"

    return functools.cache(python_of)


@pytest.fixture(scope="session")
def small_model() -> Path:
    """Folder of the cpu profile's model, converted at most once."""
    from lab.models import model_folder

    return model_folder("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_model(small_model, tmp_path_factory) -> Path:
    """The small model's shape with 2 layers and 64 dimensions, random weights, its tokenizer:
    trains a step in no time.
    """
    from lab.models import two_layers

    return two_layers(small_model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server():
    """Address of a server started as the readme says, ended afterwards; nothing of it may stay."""
    run("make", "stop", check=0)
    run("make", "vllm-serve", check=0)
    yield "http://127.0.0.1:8000"
    run("make", "stop", check=0)
    assert "nothing of this repository is running" in run("make", "stop", check=0).stdout
