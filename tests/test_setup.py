"""scripts/setup.sh in a small copy of the tree: ways to an environment, refusals, kills.

The copy's locks hold a few small packages, cut with their hashes out of the real ones. PATH is one
folder of links to the tools that the scripts call, so that no conda or GPU of this machine shows
through; stubs in that folder play conda, nvidia-smi, df and Python, and a folder of files plays
/sys, /dev and /etc. Python has neither pip nor venv, as on a bare Debian or Ubuntu.
"""

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = (
    "awk bash cat chmod cp cut df dirname env grep head id ln mkdir mktemp mv readlink rm sed "
    "sha256sum sort timeout uname"
).split()
# Variables that must not come from outside, by their beginnings.
STEERING = (
    *("CONDA", "MAMBA", "LOCK", "ENV", "YES"),
    *("VIRTUAL_ENV", "PYTHON", "UV_PYTHON", "XDG_DATA", "KUBERNETES"),
)
ENTRY = r"(?m)^(?:idna|iniconfig|pip|setuptools|uv)==.*\n(?: .*\n)*"
LOCKS = {
    name: "".join(re.findall(ENTRY, (ROOT / f"locks/{name}.txt").read_text()))
    for name in ("cpu", "gpu")
}
FILLED = {
    name: {"lab": "0.1.0", **dict(re.findall(r"(?m)^(\S+)==(\S+)", lock))}
    for name, lock in LOCKS.items()
}  # {package: version}
REAL_PYTHON = f'exec "{sys._base_executable}" "$@"'
BARE_PYTHON = f"""case "$*" in
*"-m pip"*|*"-m venv"*|*ensurepip*) echo "No module named $2" >&2; exit 1 ;;
esac
{REAL_PYTHON}"""
NEWER_PYTHON = f'case "$2" in *version_info[[]*) echo 3.13; exit ;; esac\n{BARE_PYTHON}'

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the cpu lock needs Python 3.11"
)


class Tree:
    """A small copy of the repository, and the machine on which it is set up."""

    def __init__(self, base, empty):
        self.root = base / "路径"
        self.bin = base / "bin"
        self.log = base / "conda.log"
        self.empty = empty
        self.conda_prefix = base / "miniforge/envs/videofen"
        self.machine = base / "machine"
        for name in (
            *("scripts/setup.sh", "scripts/machine.sh", "scripts/get_uv.py"),
            *("pyproject.toml", "environment.yml", "lab/__init__.py"),
            *("locks/cpu.txt", "locks/gpu.txt"),
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name, lock in LOCKS.items():
            (self.root / f"locks/{name}.txt").write_text(lock)
        self.bin.mkdir()
        self.log.touch()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)}
        self.environment |= {
            "PATH": str(self.bin),
            "MACHINE_ROOT": str(self.machine),
            "XDG_DATA_HOME": str(base / "data"),
        }
        self.file("etc/os-release", 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"')
        self.stub("g++", "")
        self.stub("python3", BARE_PYTHON)
        (self.bin / "uv").symlink_to(empty / "bin/uv")

    @property
    def venv(self):
        return self.root / ".venv"

    def file(self, name, text=""):
        """A file of the machine, such as dev/dxg."""
        (self.machine / name).parent.mkdir(parents=True, exist_ok=True)
        (self.machine / name).write_text(text + "\n")

    def stub(self, name, script):
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def conda(
        self, name="conda", row="videofen  *  %s", create="mkdir -p '{1}' && cp -a '{0}/.' '{1}'"
    ):
        """A conda that lists `videofen` where its prefix exists, and logs each call.

        It creates the environment with the script `create`.
        """
        other = row.replace("videofen", "videofen-old")
        self.stub(
            name,
            f"""echo {name} "$@" >> '{self.log}'
case "$*" in
"env list")
    printf '# environments:\\n{other}\\n' /opt/old
    [ ! -d '{self.conda_prefix}' ] || printf '{row}\\n' '{self.conda_prefix}' ;;
"env create -f environment.yml") {create.format(self.empty, self.conda_prefix)} ;;
*) exit 9 ;;
esac""",
        )

    def card(self):
        self.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de")
        self.file("sys/bus/pci/devices/0000:01:00.0/class", "0x030000")

    def gpu(self, driver, capability="8.9", memory_mib=24564):
        self.card()
        query = f"echo {driver}, {memory_mib}, {capability}"
        if not capability:  # a driver so old that it does not know the field
            query = "echo Field compute_cap is not a valid field to query.; exit 2"
        self.stub(
            "nvidia-smi",
            f"""case $1 in
-L) echo "GPU 0: NVIDIA GeForce RTX 4090" ;;
--query-gpu=driver_version,memory.total,compute_cap) {query} ;;
--query-gpu=driver_version,memory.total) echo {driver}, {memory_mib} ;;
esac""",
        )
        self.stub("df", "echo Filesystem; echo /dev/sda 0 0 104857600")

    def setup(self, *args, kill_at=None, **variables):
        """(exit code, stdout, stderr); killed, with all it started, once `kill_at` is there."""
        job = subprocess.Popen(
            [self.root / "scripts/setup.sh", *args],
            env=self.environment | variables,
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
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
        assert code == 2 and len(errors) == 1 and sentence in errors[0], out + err
        assert "Traceback" not in out + err
        return out


def installed(prefix):
    code = (
        "import json\n"
        "from importlib.metadata import distributions\n"
        "print(json.dumps({package.name: package.version for package in distributions()}))"
    )
    return json.loads(subprocess.check_output([prefix / "bin/python", "-c", code], cwd="/"))


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An environment with pip, setuptools and uv, to copy: what conda makes of environment.yml."""
    prefix = tmp_path_factory.mktemp("empty")
    subprocess.run([sys._base_executable, "-m", "venv", prefix], check=True)
    (prefix / "conda-meta").mkdir()
    (prefix / "uv.txt").write_text(LOCKS["cpu"][LOCKS["cpu"].index("uv==") :])
    subprocess.run(
        [prefix / "bin/python", "-m", "pip", "install", "--quiet", "-r", prefix / "uv.txt"],
        check=True,
    )
    return prefix


@pytest.fixture
def tree(tmp_path, empty):
    return Tree(tmp_path, empty)


# ---- .venv


def test_venv_is_made_checked_and_repaired(tree):
    """uv too comes from the package index."""
    (tree.bin / "uv").unlink()
    tree.refuses("no environment yet: run 'make setup' first", "--check")
    tree.works()
    assert installed(tree.venv) == FILLED["cpu"]
    imports = [
        tree.venv / "bin/python",
        "-c",
        "import idna, iniconfig, setuptools, lab; print(lab.__file__)",
    ]
    assert subprocess.check_output(imports, cwd="/", text=True) == f"{tree.root}/lab/__init__.py\n"
    assert tree.works("--check") == ""
    start = time.monotonic()
    assert "up to date (cpu lock" in tree.works()
    assert time.monotonic() - start < 3

    settings = tree.root / "pyproject.toml"
    settings.write_text(settings.read_text().replace("line-length = 100", "line-length = 99"))
    tree.works("--check")  # set-up reads nothing of ruff's or pytest's

    lock = tree.root / "locks/cpu.txt"
    lock.write_text(re.sub(r"(?ms)^idna==.*?^(?=[a-z])", "", lock.read_text()))
    tree.refuses("not up to date: run 'make setup'", "--check")
    tree.works()
    assert installed(tree.venv) == {k: v for k, v in FILLED["cpu"].items() if k != "idna"}
    tree.works("--check")


def test_killed_while_venv_is_made(tree):
    assert tree.setup(kill_at=tree.venv / "bin/python")[0] == -signal.SIGKILL
    tree.refuses("not up to date: run 'make setup'", "--check")
    tree.works()
    assert installed(tree.venv) == FILLED["cpu"]


@pytest.mark.parametrize("conda", [False, True], ids=["venv", "conda"])
def test_killed_while_uv_installs(tree, conda):
    """uv takes what it left half-installed for installed."""
    if conda:
        tree.conda()
    prefix = tree.conda_prefix if conda else tree.venv
    site = prefix / "lib/python3.11/site-packages"
    assert tree.setup(kill_at=site / "iniconfig")[0] == -signal.SIGKILL
    for half in [
        *site.glob("idna*"),
        *site.glob("pip*"),
        *site.glob("uv*"),
    ]:  # the worst moment, whenever the kill came
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
    assert f"{tree.root}/.venv" in subprocess.check_output(
        [tree.root / ".venv/bin/pip", "--version"], text=True
    )


def test_home_that_is_read_only_or_unset(tree):
    for variable in ("HOME", "UV_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        tree.environment.pop(variable, None)
    tree.works(HOME="/proc")
    assert installed(tree.venv) == FILLED["cpu"] and (tree.root / "runs/cache/uv").is_dir()
    (tree.venv / ".videofen-setup").write_text(f"cpu 01d {tree.root}")  # as set-up once wrote it
    assert "creating" not in tree.works()


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
    assert set(tree.log.read_text().splitlines()) == {
        f"{program} env list",
        f"{program} env create -f environment.yml",
    }


@pytest.mark.parametrize("active", [False, True], ids=["listed", "active"])
def test_conda_environment_of_others_is_left_until_yes(tree, active):
    if not active:
        tree.conda()
    shutil.copytree(tree.empty, tree.conda_prefix, symlinks=True)
    variables = (
        {"CONDA_DEFAULT_ENV": "videofen", "CONDA_PREFIX": str(tree.conda_prefix)} if active else {}
    )
    before, files = installed(tree.conda_prefix), {*tree.conda_prefix.rglob("*")}
    plan = tree.refuses("nothing was changed", **variables)
    assert f"- pip=={before['pip']}\n" in plan and all(
        f"+ {k}=={v}\n" in plan for k, v in FILLED["cpu"].items() if k not in ("lab", "uv")
    )
    assert {*tree.conda_prefix.rglob("*")} - files <= {tree.conda_prefix / ".lock"}  # uv's, empty
    assert installed(tree.conda_prefix) == before and not os.path.lexists(tree.venv)

    tree.works(YES="1", **variables)
    assert installed(tree.conda_prefix) == FILLED["cpu"]
    assert tree.venv.is_symlink() and tree.venv.samefile(tree.conda_prefix)
    tree.works("--check", **variables)
    assert "create" not in tree.log.read_text()
    tree.refuses(
        "remove the link", ENV="venv", YES="1"
    )  # rather than clear the conda environment through it


def test_env_venv_passes_conda_by(tree):
    tree.conda()
    shutil.copytree(tree.empty, tree.conda_prefix, symlinks=True)
    tree.works(ENV="venv")
    assert not tree.venv.is_symlink() and installed(tree.venv) == FILLED["cpu"]
    assert tree.log.read_text() == "" and "idna" not in installed(tree.conda_prefix)


@pytest.mark.parametrize(
    "create, sentence", [("exit 1", "could not create videofen"), ("true", "holds no Python")]
)
def test_conda_that_creates_nothing(tree, create, sentence):
    tree.conda(create=create)
    before = sorted(tree.root.rglob("*"))
    tree.refuses(sentence)
    assert sorted(tree.root.rglob("*")) == before and not tree.conda_prefix.exists()


# ---- Locks, GPUs, and all that stops set-up


def test_gpu_lock(tree):
    tree.gpu(driver="550.54.14")
    tree.refuses(
        "NVIDIA driver 550.54.14 is too old for the gpu lock (CUDA 13, driver 580 or newer)"
    )
    tree.gpu(driver="470.256.02", capability="")
    tree.refuses("NVIDIA driver 470.256.02 is too old")
    assert not tree.venv.exists()
    tree.gpu(driver="580.95.05", capability="6.1")
    tree.refuses("older than CUDA 13 supports")
    tree.gpu(driver="580.95.05", memory_mib=16376)
    tree.refuses(
        "has 16 GiB, and the profiles take cards of 22 GiB and more: "
        "compute on the CPU: make setup LOCK=cpu"
    )
    tree.gpu(driver="580.95.05", capability="7.5")
    tree.refuses("(compute capability 7.5) has no bfloat16")
    tree.gpu(driver="580.95.05")
    tree.works()
    assert installed(tree.venv) == FILLED["gpu"] != FILLED["cpu"]
    assert "gpu lock" in tree.works()


def test_asked_lock_is_kept(tree):
    tree.gpu(driver="550.54.14")
    tree.works(LOCK="cpu")
    assert installed(tree.venv) == FILLED["cpu"]
    tree.gpu(driver="580.95.05")
    tree.works("--check")
    assert "up to date (cpu lock" in tree.works()


def test_found_lock_is_not_kept(tree):
    """The card comes, or its driver works, after the set-up."""
    tree.works()
    tree.card()
    tree.works("--check")  # no driver yet: the cpu lock is all that runs
    tree.refuses("not its driver")
    tree.gpu(driver="580.95.05")
    tree.refuses("an NVIDIA GPU is usable now, the environment has the cpu lock", "--check")
    tree.works(LOCK="cpu")
    tree.works("--check")
    tree.works(LOCK="gpu")
    assert installed(tree.venv) == FILLED["gpu"]


WSL_SMI = "usr/lib/wsl/lib/nvidia-smi"
NO_ANSWER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    "sentence, files, smi",
    [  # nvidia-smi stubbed with None is missing
        ("install -y nvidia-driver-580-open', then reboot", {}, None),
        (
            "install nvidia-open from NVIDIA's own repository",
            {"etc/os-release": "ID=debian\nVERSION_ID=13"},
            None,
        ),
        ("akmod-nvidia", {"etc/os-release": "ID=fedora"}, None),
        ("nouveau, which cannot compute, holds the card", {"sys/module/nouveau/version": ""}, None),
        (
            "nvidia-smi, which belongs to it, is missing",
            {"sys/module/nvidia/version": "580.95.05"},
            None,
        ),
        (
            "updated while its old version is still loaded",
            {},
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
        ),
        (
            "installed, but not loaded",
            {},
            f'echo "{NO_ANSWER}"; exit 9',
        ),
        ("finds no card that it can use", {}, "echo 'No devices were found'; exit 6"),
        ("nvidia-smi fails (Unknown Error)", {}, "echo Unknown Error; exit 255"),
        ("docker run --gpus all", {".dockerenv": ""}, None),
        ("docker run --gpus all", {"run/.containerenv": ""}, None),
        (
            "restart the container from the host",
            {".dockerenv": ""},
            "echo 'Failed to initialize NVML: Unknown Error'; exit 255",
        ),
        (
            "install the newest NVIDIA driver in Windows",
            {"dev/dxg": "", WSL_SMI: ""},
            "echo GPU access blocked; exit 1",
        ),
    ],
)
def test_card_without_a_working_driver(tree, sentence, files, smi):
    """It is said, with what to do on this machine; LOCK=cpu goes on."""
    tree.card()
    for name, text in files.items():
        tree.file(name, text)
    if smi:
        tree.stub("nvidia-smi", smi)
    tree.refuses(sentence)
    tree.refuses("then repeat make setup, or compute on the CPU: make setup LOCK=cpu")
    assert not tree.venv.exists()
    # Past the driver, stopped by the next thing.
    tree.stub("df", "echo; echo sda 0 0 1048576")
    assert "not used" in tree.refuses("1 GiB free", LOCK="cpu")


def test_wsl2_without_an_nvidia_card(tree):
    """Every WSL2 has /dev/dxg, whichever card Windows has."""
    tree.file("dev/dxg")
    tree.stub("df", "echo; echo sda 0 0 1048576")
    assert "the cpu lock" in tree.refuses("1 GiB free")


def test_old_driver_in_wsl2(tree):
    tree.gpu(driver="550.54.14")
    tree.file("dev/dxg")
    tree.refuses("install the newest NVIDIA driver in Windows")


def test_sound_of_the_card_is_no_card(tree):
    tree.card()
    tree.file("sys/bus/pci/devices/0000:01:00.0/class", "0x040300")
    tree.stub("df", "echo; echo sda 0 0 1048576")
    tree.refuses("the cpu lock needs")


@pytest.mark.parametrize(
    "sentence, stubs, variables",
    [  # a command stubbed with None is missing
        ("LOCK=x is unknown", {}, {"LOCK": "x"}),
        ("ENV=x is unknown", {}, {"ENV": "x"}),
        ("install Miniforge", {}, {"ENV": "conda"}),
        ("apt-get install -y g++", {"g++": None}, {}),
        ("1 GiB free", {"df": "echo; echo sda 0 0 1048576"}, {}),
        ("needs 18 GiB", {"df": "echo; echo sda 0 0 10485760"}, {"LOCK": "gpu"}),
        ("no Python 3.8 or newer on PATH", {"python3": None}, {}),
        (
            "could not create",
            {"uv": 'case $1 in venv) exit 1 ;; --version) exec "%s/bin/uv" --version ;; esac'},
            {},
        ),
    ],
)
def test_refusal(tree, sentence, stubs, variables):
    for name, script in stubs.items():
        tree.stub(name, script.replace("%s", str(tree.empty))) if script else (
            tree.bin / name
        ).unlink()
    tree.refuses(sentence, **variables)


def test_folder_of_others_is_left(tree):
    (tree.venv / "bin").mkdir(parents=True)
    tree.refuses("was not made by make setup")
    tree.refuses("conda deactivate", CONDA_DEFAULT_ENV="videofen", CONDA_PREFIX="/opt/forge")
    assert (tree.venv / "bin").is_dir()


# ---- Python and uv where neither is there


def uv_stub(tree, install):
    """The real uv, but it finds no Python here, and fetches one by the script `install`."""
    tree.stub(
        "uv",
        f"""case "$*" in
"python find 3.11") exit 1 ;;
"python install --no-bin 3.11") {install} ;;
*) exec "{tree.empty}/bin/uv" "$@" ;;
esac""",
    )


@pytest.fixture(scope="module")
def offered_python(tmp_path_factory):
    """A list of downloads for uv with one archive: this Python, its library and headers."""
    folder = tmp_path_factory.mktemp("offered")
    archive, prefix = folder / "python.tar.gz", Path(sys.base_prefix)
    parts = [
        prefix / "bin/python3.11",
        *map(Path, map(sysconfig.get_path, ("stdlib", "include"))),
        *prefix.glob("lib/libpython3.11.so*"),
    ]
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        for part in parts:
            skip = {part / name for name in ("test", "site-packages", "ensurepip", "idlelib")}
            for path in [part, *part.rglob("*")]:
                if (
                    not skip & {path, *path.parents}
                    and "__pycache__" not in path.parts
                    and path.suffix not in (".a", ".o")
                ):
                    file.add(path, f"python/{path.relative_to(prefix)}", recursive=False)
    key = f"cpython-3.11.{sys.version_info.micro}-linux-x86_64-gnu"
    build = {
        "name": "cpython",
        "arch": {"family": "x86_64", "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": 3,
        "minor": 11,
    }
    build |= {
        "patch": sys.version_info.micro,
        "prerelease": "",
        "variant": None,
        "build": None,
        "url": archive.as_uri(),
    }
    build["sha256"] = hashlib.sha256(archive.read_bytes()).hexdigest()
    (folder / "downloads.json").write_text(json.dumps({key: build}))
    return folder / "downloads.json"


@pytest.mark.parametrize(
    "python",
    [NEWER_PYTHON, f'case "$2" in *Python.h*) echo /none/Python.h; exit ;; esac\n{BARE_PYTHON}'],
    ids=["another version", "without headers"],
)
def test_python_is_fetched_by_uv(tree, offered_python, python):
    """uv downloads, verifies and unpacks a real 3.11, as one of python-build-standalone."""
    tree.stub("python3", python)
    uv_stub(tree, "echo no route to github >&2; exit 1")
    tree.refuses(
        "could not be fetched (see above): set UV_PYTHON_INSTALL_MIRROR to a mirror of "
        "python-build-standalone's releases"
    )
    tree.refuses("no environment yet", "--check")
    uv_stub(tree, f'exec "{tree.empty}/bin/uv" "$@"')
    tree.works(UV_PYTHON_DOWNLOADS_JSON_URL=str(offered_python))
    tree.works("--check")
    assert installed(tree.venv) == FILLED["cpu"]
    ask = "import sys, sysconfig; print(sys.base_prefix, sysconfig.get_path('include'), sep='\\n')"
    prefix, include = subprocess.check_output(
        [tree.venv / "bin/python", "-c", ask], text=True
    ).splitlines()
    assert Path(prefix).parent == tree.venv / "python" and (Path(include) / "Python.h").exists()


@pytest.mark.parametrize(
    "release, remedy",
    [
        ("ID=debian\nVERSION_ID=12", "apt-get install -y python3.11-dev"),
        ("ID=debian\nVERSION_ID=13", "Miniforge"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"', "ppa:deadsnakes/ppa"),
        ("ID=fedora\nVERSION_ID=42", "dnf install -y python3.11-devel"),
    ],
)
def test_python_that_cannot_be_fetched(tree, release, remedy):
    tree.file("etc/os-release", release)
    tree.stub("python3", NEWER_PYTHON)
    uv_stub(tree, "exit 1")
    tree.refuses(remedy)


class Index(http.server.BaseHTTPRequestHandler):
    """A package index, or a proxy before one: `pages` has what it answers to a path."""

    def do_GET(self):
        content = self.server.pages.get(re.sub("^http://[^/]*", "", self.path))
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def index(tmp_path):
    """An index with uv 1.2.3 and a lock that names its hash."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("uv-1.2.3.data/scripts/uv", "#!/bin/sh\necho uv 1.2.3\n")
    names = [
        f"uv-{version}-py3-none-{system}.whl"
        for version in ("1.2.30", "1.2.3")
        for system in ("win32", "manylinux_2_17_x86_64")
    ]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.pages = {
        "/simple/uv/": "".join(
            f'<a href="../../files/{name}#sha256=0">{name}</a>\n' for name in names
        ).encode()
    }
    server.pages[f"/files/{names[-1]}"] = wheel.getvalue()
    server.lock = tmp_path / "lock.txt"
    digests = ("0" * 64, hashlib.sha256(wheel.getvalue()).hexdigest())
    hashes = " \\\n".join(f"    --hash=sha256:{digest}" for digest in digests)
    server.lock.write_text(f"uv==1.2.3 \\\n{hashes}\nx==1\n")
    server.folder = tmp_path / "uv here"
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get_uv(index, **variables):
    environment = {"PATH": "/usr/bin:/bin", "PIP_INDEX_URL": f"{index.address}/simple/"} | variables
    command = [sys._base_executable, ROOT / "scripts/get_uv.py", index.lock, index.folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("way", ["direct", "by a proxy"])
def test_uv_is_fetched(index, way):
    proxy = (
        {"PIP_INDEX_URL": "http://mirror.invalid/simple", "http_proxy": index.address}
        if way == "by a proxy"
        else {}
    )
    done = get_uv(index, **proxy)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.check_output([done.stdout.strip()], text=True) == "uv 1.2.3\n"


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("another hash", "none of the hashes in"),
        ("no such version", "has no uv 1.2.3 for Linux on x86-64"),
        (
            "no page",
            "(Not Found): check the network, the variable https_proxy, or set PIP_INDEX_URL",
        ),
        ("nobody answers", "Connection refused"),
        ("no address", "set PIP_INDEX_URL"),
    ],
)
def test_uv_that_cannot_be_fetched(index, what, sentence):
    variables = {}
    if what == "another hash":
        index.pages = {
            path: page if path.endswith("/") else page + b" " for path, page in index.pages.items()
        }
    elif what == "no such version":
        index.pages["/simple/uv/"] = index.pages["/simple/uv/"].replace(b"1.2.3-", b"1.2.4-")
    elif what == "no page":
        index.pages = {}
    else:
        variables["PIP_INDEX_URL"] = (
            "http://127.0.0.1:9/simple" if what == "nobody answers" else "mirror/simple"
        )
    done = get_uv(index, **variables)
    assert done.returncode == 2 and sentence in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (index.folder / "uv").exists()


# ---- A path with which compilers cannot cope


def test_blank_in_the_path(tree):
    """The environment stands elsewhere, and .venv is a link to it.

    Python that is started by the link does not learn of the blank.
    """
    tree.root = tree.root.rename(tree.root.with_name("路径 with space"))
    tree.conda()
    tree.refuses("make setup ENV=venv")
    assert ".venv is a link to it" in tree.works(ENV="venv")
    first = tree.venv.readlink()
    assert first.parent == Path(tree.environment["XDG_DATA_HOME"], "videofen")
    assert " " not in str(first)
    ask = (
        "import sys, sysconfig\n"
        "paths = sysconfig.get_paths().values()\n"
        "print(sys.prefix, sys.executable, *paths, sep='\\n')"
    )
    for program in ("python", "python3"):
        paths = subprocess.check_output([tree.venv / "bin" / program, "-c", ask], text=True)
        assert paths.startswith(f"{first}\n") and " " not in paths
    assert installed(tree.venv) == FILLED["cpu"]
    tree.works("--check")
    assert "up to date" in tree.works()

    tree.root = tree.root.rename(tree.root.with_name("moved place"))
    tree.refuses("not up to date", "--check")
    tree.works(ENV="venv")
    assert tree.venv.readlink() != first and not first.exists()
    tree.root = tree.root.rename(tree.root.with_name("plain"))
    tree.works(ENV="venv")
    assert not tree.venv.is_symlink() and installed(tree.venv) == FILLED["cpu"]


def test_blank_everywhere(tree):
    tree.root = tree.root.rename(tree.root.with_name("a blank"))
    tree.refuses("set XDG_DATA_HOME to another folder", XDG_DATA_HOME=str(tree.root / "data"))
    tree.refuses(
        "cannot be written: set XDG_DATA_HOME to another folder", XDG_DATA_HOME="/proc/data"
    )
