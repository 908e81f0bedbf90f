"""scripts/setup.sh, run for real in a small copy of the tree: each way to an environment, each refusal, what a kill leaves.

The copy's locks hold a few small packages, cut with their hashes out of the real ones. PATH is one folder of links to the tools that
the script calls, so that no conda, uv or GPU of this machine shows through; stubs in that folder play conda, nvidia-smi, df and Python.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "awk bash cat cp cut df dirname env grep head ln mkdir mktemp readlink rm sed sha256sum uname".split()
STEERING = ("CONDA", "MAMBA", "LOCK", "ENV", "YES", "VIRTUAL_ENV", "PYTHON")  # variables that must not come from outside
ENTRY = r"(?m)^(?:idna|iniconfig|pip|setuptools|uv)==.*\n(?: .*\n)*"
LOCKS = {name: "".join(re.findall(ENTRY, (ROOT / f"locks/{name}.txt").read_text())) for name in ("cpu", "gpu")}
FILLED = {name: {"lab": "0.1.0", **dict(re.findall(r"(?m)^(\S+)==(\S+)", lock))} for name, lock in LOCKS.items()}  # {package: version}
REAL_PYTHON = f'exec "{sys._base_executable}" "$@"'

pytestmark = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the cpu lock needs Python 3.11")


class Tree:
    """A small copy of the repository, and the machine on which it is set up."""

    def __init__(self, base, empty):
        self.root, self.bin, self.log, self.empty = base / "路径 with space", base / "bin", base / "conda.log", empty
        self.venv, self.conda_prefix = self.root / ".venv", base / "mini forge/envs/videofen"
        for name in ("scripts/setup.sh", "pyproject.toml", "environment.yml", "lab/__init__.py", "locks/cpu.txt", "locks/gpu.txt"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name, lock in LOCKS.items():
            (self.root / f"locks/{name}.txt").write_text(lock)
        self.bin.mkdir()
        self.log.touch()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)} | {"PATH": str(self.bin)}
        self.stub("g++", "")
        self.stub("python3.11", f'[ "$2" != venv ] || exec cp -a "{empty}/." .venv\n{REAL_PYTHON}')  # in no time

    def stub(self, name, script):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def conda(self, name="conda", row="videofen  *  %s", create="mkdir -p '{1}' && cp -a '{0}/.' '{1}'"):
        """A conda that lists `videofen` where its prefix exists, creates it with the script `create`, and logs each call."""
        other = row.replace("videofen", "videofen-old")
        self.stub(name, f"""echo {name} "$@" >> '{self.log}'
case "$*" in
"env list") printf '# environments:\\n{other}\\n' /opt/old; [ ! -d '{self.conda_prefix}' ] || printf '{row}\\n' '{self.conda_prefix}' ;;
"env create -f environment.yml") {create.format(self.empty, self.conda_prefix)} ;;
*) exit 9 ;;
esac""")

    def gpu(self, driver):
        self.stub("nvidia-smi", f'[ "$1" = -L ] && echo "GPU 0: NVIDIA GeForce RTX 4090" || echo {driver}')
        self.stub("df", "echo Filesystem; echo /dev/sda 0 0 104857600")

    def setup(self, *args, kill_at=None, **variables):
        """Returns (exit code, stdout, stderr); killed, with all that it started, once the path `kill_at` is there."""
        job = subprocess.Popen([self.root / "scripts/setup.sh", *args], env=self.environment | variables, cwd="/", text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        while kill_at and not kill_at.exists() and job.poll() is None:
            time.sleep(0.002)
        if kill_at:
            os.killpg(job.pid, signal.SIGKILL)
        out, err = job.communicate()
        return job.returncode, out, err

    def works(self, *args, **variables):
        code, out, err = self.setup(*args, **variables)
        assert code == 0 and "error:" not in err, out + err
        return out

    def refuses(self, sentence, *args, **variables):
        """Set-up ends with code 2 and one line of error, which holds `sentence`."""
        code, out, err = self.setup(*args, **variables)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and sentence in errors[0] and "Traceback" not in out + err, out + err
        return out


def installed(prefix):
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    return json.loads(subprocess.check_output([prefix / "bin/python", "-c", code], cwd="/"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A venv to copy, with pip, setuptools and uv: what a conda environment made from environment.yml has."""
    prefix = tmp_path_factory.mktemp("empty")
    subprocess.run([sys._base_executable, "-m", "venv", prefix], check=True)
    (prefix / "uv.txt").write_text(LOCKS["cpu"][LOCKS["cpu"].index("uv=="):])
    subprocess.run([prefix / "bin/python", "-m", "pip", "install", "--quiet", "-r", prefix / "uv.txt"], check=True)
    return prefix


@pytest.fixture
def tree(tmp_path, empty):
    return Tree(tmp_path, empty)


# ---- .venv

def test_venv_is_made_checked_and_repaired(tree):
    tree.stub("python3.11", REAL_PYTHON)
    tree.refuses("no environment yet: run 'make setup' first", "--check")
    tree.works()
    assert installed(tree.venv) == FILLED["cpu"]
    imports = [tree.venv / "bin/python", "-c", "import idna, iniconfig, setuptools, lab; print(lab.__file__)"]
    assert subprocess.check_output(imports, cwd="/", text=True) == f"{tree.root}/lab/__init__.py\n"
    assert tree.works("--check") == ""
    start = time.monotonic()
    assert "up to date (cpu lock" in tree.works()
    assert time.monotonic() - start < 3

    lock = tree.root / "locks/cpu.txt"
    lock.write_text(re.sub(r"(?ms)^idna==.*?^(?=[a-z])", "", lock.read_text()))
    tree.refuses("not up to date: run 'make setup'", "--check")
    tree.works()
    assert installed(tree.venv) == {k: v for k, v in FILLED["cpu"].items() if k != "idna"}
    tree.works("--check")


def test_killed_while_python_makes_venv(tree):
    tree.stub("python3.11", REAL_PYTHON)
    assert tree.setup(kill_at=tree.venv / "bin/python")[0] == -signal.SIGKILL
    assert installed(tree.venv) == {}
    tree.refuses("not up to date: run 'make setup'", "--check")
    tree.works()
    assert installed(tree.venv) == FILLED["cpu"]


@pytest.mark.parametrize("conda", [False, True], ids=["venv", "conda"])
def test_killed_while_uv_installs(tree, conda):
    """uv takes what it left half-installed for installed, and pip, with which set-up gets uv, may be gone."""
    if conda:
        tree.conda()
    prefix = tree.conda_prefix if conda else tree.venv
    site = prefix / "lib/python3.11/site-packages"
    assert tree.setup(kill_at=site / "iniconfig")[0] == -signal.SIGKILL
    for half in [*site.glob("idna*"), *site.glob("pip*"), *site.glob("uv*")]:  # the worst moment, whenever the kill came
        shutil.rmtree(half)
    (site / f"idna-{FILLED['cpu']['idna']}.dist-info").mkdir()
    (prefix / "bin/uv").unlink(missing_ok=True)
    tree.refuses("not up to date", "--check")
    tree.works()
    assert installed(prefix) == FILLED["cpu"] and (site / "idna/core.py").exists()
    assert tree.log.read_text().count("env create") == conda


def test_moved_tree(tree):
    """The programs in .venv/bin name the folder in which they were made."""
    tree.works()
    tree.root = tree.root.rename(tree.root.with_name("moved"))
    tree.refuses("not up to date", "--check")
    tree.works()
    assert f"{tree.root}/.venv" in subprocess.check_output([tree.root / ".venv/bin/pip", "--version"], text=True)


def test_home_that_is_read_only_or_unset(tree):
    tree.stub("python3.11", REAL_PYTHON)  # without uv: pip too needs no home
    for variable in ("HOME", "UV_CACHE_DIR", "XDG_CACHE_HOME"):
        tree.environment.pop(variable, None)
    tree.works(HOME="/proc")
    assert installed(tree.venv) == FILLED["cpu"] and (tree.root / "runs/cache/uv").is_dir()
    (tree.venv / ".videofen-setup").write_text(f"cpu old {tree.root}")
    tree.works()


# ---- conda

@pytest.mark.parametrize("program", ["conda", "mamba"])
def test_conda_environment_is_created(tree, program):
    """By mamba where both are there. mamba 2 indents the list and pads it with blanks."""
    tree.conda()
    if program == "mamba":
        tree.conda("mamba", row="  videofen         %s   ")
    tree.works()
    assert installed(tree.conda_prefix) == FILLED["cpu"]
    assert tree.venv.is_symlink() and tree.venv.samefile(tree.conda_prefix)
    tree.works("--check")
    assert "up to date" in tree.works()
    assert set(tree.log.read_text().splitlines()) == {f"{program} env list", f"{program} env create -f environment.yml"}


@pytest.mark.parametrize("active", [False, True], ids=["listed", "active"])
def test_conda_environment_of_others_is_left_until_yes(tree, active):
    if not active:
        tree.conda()
    shutil.copytree(tree.empty, tree.conda_prefix, symlinks=True)
    variables = {"CONDA_DEFAULT_ENV": "videofen", "CONDA_PREFIX": str(tree.conda_prefix)} if active else {}
    before, files = installed(tree.conda_prefix), {*tree.conda_prefix.rglob("*")}
    plan = tree.refuses("nothing was changed", **variables)
    assert f"- pip=={before['pip']}\n" in plan and all(f"+ {k}=={v}\n" in plan for k, v in FILLED["cpu"].items() if k not in ("lab", "uv"))
    assert {*tree.conda_prefix.rglob("*")} - files <= {tree.conda_prefix / ".lock"}  # uv's, empty
    assert installed(tree.conda_prefix) == before and not os.path.lexists(tree.venv)

    tree.works(YES="1", **variables)
    assert installed(tree.conda_prefix) == FILLED["cpu"]
    assert tree.venv.is_symlink() and tree.venv.samefile(tree.conda_prefix)
    tree.works("--check", **variables)
    assert "create" not in tree.log.read_text()
    tree.refuses("remove the link", ENV="venv", YES="1")  # rather than clear the conda environment through it


def test_env_venv_passes_conda_by(tree):
    tree.conda()
    shutil.copytree(tree.empty, tree.conda_prefix, symlinks=True)
    tree.works(ENV="venv")
    assert not tree.venv.is_symlink() and installed(tree.venv) == FILLED["cpu"]
    assert tree.log.read_text() == "" and "idna" not in installed(tree.conda_prefix)


@pytest.mark.parametrize("create, sentence", [("exit 1", "could not create videofen"), ("true", "holds no Python")])
def test_conda_that_creates_nothing(tree, create, sentence):
    tree.conda(create=create)
    before = sorted(tree.root.rglob("*"))
    tree.refuses(sentence)
    assert sorted(tree.root.rglob("*")) == before and not tree.conda_prefix.exists()


# ---- Locks, GPUs, and all that stops set-up

def test_gpu_lock(tree):
    tree.gpu(driver="550.54.14")
    tree.refuses("install driver 580 or newer")
    assert not tree.venv.exists()
    tree.gpu(driver="580.95.05")
    tree.works()
    assert installed(tree.venv) == FILLED["gpu"] != FILLED["cpu"]


def test_cpu_lock_on_a_gpu_machine_stays(tree):
    tree.gpu(driver="550.54.14")
    tree.works(LOCK="cpu")
    assert installed(tree.venv) == FILLED["cpu"]
    tree.works("--check")
    assert "up to date (cpu lock" in tree.works()
    tree.refuses("install driver 580 or newer", LOCK="gpu")


@pytest.mark.parametrize("sentence, stubs, variables", [  # a command stubbed with None is missing
    ("LOCK=x is unknown", {}, {"LOCK": "x"}),
    ("ENV=x is unknown", {}, {"ENV": "x"}),
    ("install Miniforge", {}, {"ENV": "conda"}),
    ("install g++", {"g++": None}, {}),
    ("1 GiB free", {"df": "echo; echo sda 0 0 1048576"}, {}),
    ("needs 18 GiB", {"df": "echo; echo sda 0 0 10485760"}, {"LOCK": "gpu"}),
    ("install it (Ubuntu", {"python3.11": "echo 3.9", "python3": "echo 3.9", "python": "exit 1"}, {}),
    ("could not create .venv", {"python3.11": f'[ "$2" != venv ] || exit 1; {REAL_PYTHON}'}, {}),
])
def test_refusal(tree, sentence, stubs, variables):
    for name, script in stubs.items():
        tree.stub(name, script) if script else (tree.bin / name).unlink()
    tree.refuses(sentence, **variables)


def test_folder_of_others_is_left(tree):
    (tree.venv / "bin").mkdir(parents=True)
    tree.refuses("was not made by make setup")
    tree.refuses("conda deactivate", CONDA_DEFAULT_ENV="videofen", CONDA_PREFIX="/opt/forge")
    assert (tree.venv / "bin").is_dir()
