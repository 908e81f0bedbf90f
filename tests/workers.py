"""Several tests at a time (pytest-xdist, `-n auto`), none in another's way.

The first worker has the machine as it is. Each further one has a network of its own, in which the
ports 8000, 29500 ... are free, a /dev/shm of its own, whose files DeepSpeed names by its port, and
a folder of its own for what runs write (RUNS).
"""

import fcntl
import os
import shlex
import socket
import struct
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# What these read lies where a reader's commands write it (`runs/...`), or comes from a package
# index: the first worker's, in this order.
FIRST_WORKER = (
    *("test_layout", "test_setup", "test_long"),
    *("test_readmes", "test_claims", "test_tuned_in_vllm"),
)
# Modules whose slow blocks name nothing that another command has written: any worker's. 05 compares
# itself with 04.
ELSEWHERE = {"01_": "01", "02_": "02", "04_": "04 and 05", "05_": "04 and 05"}
MEMORY_GIB = 5  # a worker's engines
ALONE = ["unshare", "--net", "--mount"]
if os.geteuid() != 0:  # who is not root gets the right to it in a user namespace
    ALONE += ["--user", "--map-current-user", "--keep-caps"]
OWN_SHM = ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]


def can_be_alone() -> bool:
    try:
        return subprocess.run([*ALONE, *OWN_SHM], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker a core, as far as memory goes; one where workers would share GPUs or ports."""
    from lab.profile import detect

    if detect() != "cpu" or not can_be_alone():
        return 1
    memory_gib = psutil.virtual_memory().available / 2**30
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(memory_gib / MEMORY_GIB), 8))


def separate(config) -> None:
    """Start every worker but the first alone."""
    workers = config.getoption("tx", None) or []
    command = shlex.join([*ALONE, sys.executable])
    workers[1:] = [f"popen//python={command}"] * (len(workers) - 1)


def settle(worker: str, root: Path) -> Path:
    """The folder that this worker's commands write into; makes its network and its /dev/shm."""
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
        # OpenMP threads sleep while they wait: spinning, they hold cores that other workers need.
        os.environ["GOMP_SPINCOUNT"] = "0"
    if worker == "gw0":
        os.environ.pop("RUNS", None)
        return root / "runs"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sh", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    subprocess.run(OWN_SHM, check=True)
    runs = root / "runs" / "tests" / worker
    runs.mkdir(parents=True, exist_ok=True)
    for shared in ("models", "cache"):
        (root / "runs" / shared).mkdir(exist_ok=True)
        if not (runs / shared).is_symlink():
            (runs / shared).symlink_to(root / "runs" / shared)
    os.environ["RUNS"] = str(runs)
    return runs


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of one file stay together: they share a server, an adapter, a training."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        @property
        def nodes(self) -> list:
            """Not in the order in which they were ready: the first worker gets the first unit."""
            return sorted(self.assigned_work, key=lambda node: node.gateway.id)

        def _split_scope(self, nodeid: str) -> str:
            """Which unit a test belongs to: a worker runs a unit whole, in order."""
            file = Path(nodeid.split("::")[0]).stem
            for module in ELSEWHERE:
                if f"test_readme_long[modules/{module}" in nodeid:
                    return f"long blocks of {ELSEWHERE[module]}"
            return "first worker" if file in FIRST_WORKER else file

    config.option.loadscopereorder = False  # in the order of collection
    return ByFile(config, log)
