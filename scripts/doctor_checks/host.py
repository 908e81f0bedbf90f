"""The host: memory, disk, limits, ports, the network, and what an earlier run left behind."""

import os
import re
import resource
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from doctor_checks import (
    ABSENT,
    FAILED,
    OK,
    PROGRAMS,
    WARNING,
    Finding,
    end_of,
    start,
)
from lab import RUNS, jobs, machine, models


def ram(profile) -> Finding:
    """Free host memory, held against what the stages of this profile need."""
    import psutil

    need = 8 if profile.device == "cpu" else 38  # the offload of module 05: make plan
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    total = memory.total / 2**30
    description = f"{free:.1f} GiB free of {total:.1f}, the stages need up to {need}"
    return (OK if free >= need else WARNING), description


def shared_memory(profile) -> Finding:
    """64 MiB written to /dev/shm and read back; NCCL and DataLoader want 1 GiB of it."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            content = os.urandom(2**20) * 64
            file.write(content)
            file.flush()
            same = Path(file.name).read_bytes() == content
    except OSError as error:
        return FAILED, f"/dev/shm cannot take 64 MiB ({error.strerror}), {free:.2f} GiB free"
    if not same:
        return FAILED, "/dev/shm gives back other bytes than were written"
    return (OK if free >= 1 else WARNING), f"{free:.1f} GiB free in /dev/shm"


def disk(profile) -> Finding:
    """Room for this profile's models where the hub keeps them, and 10 GB for runs/."""
    names = set()
    for section in profile.values():
        if hasattr(section, "get") and section.get("model"):
            names.add(section.model)
    downloads = sum(models.entry(name)[1].get("download_gb", 0) for name in names)
    hub_folder = Path(os.environ.get("HF_HOME") or Path.home() / ".cache")
    descriptions = []
    short = False
    for use, folder, need in (("models", hub_folder, downloads + 1), ("runs", RUNS, 10)):
        above = (folder, *folder.absolute().parents)
        place = next(existing for existing in above if existing.exists())
        free = shutil.disk_usage(place).free / 1e9
        short |= free < need
        descriptions.append(f"{free:.0f} GB free for {use} (up to {need:.0f})")
    return (WARNING if short else OK), ", ".join(descriptions)


def limits(profile) -> Finding:
    """Open files: a busy server and a DataLoader need more than the smallest default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    lockable = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    enough = soft == resource.RLIM_INFINITY or soft >= 1024
    description = f"{soft} open files (at most {hard}), locked memory {lockable}"
    return (OK if enough else WARNING), description


def ports(profile) -> Finding:
    """Each port that a stage listens on can be bound now, or is held by a job of ours."""
    wanted = {
        profile.serve.port: "make vllm-serve",
        profile.finetune.api_port: "make lf-api",
        profile.finetune.webui_port: "make lf-webui",
        9090: "make monitor",
        5050: "make monitor's exporter",
        29500: "launchers",
    }
    addresses = [job.get("address", "") for job in jobs.running().values()]
    taken = []
    for port, user in wanted.items():
        ours = any(address.endswith(f":{port}") for address in addresses)
        if jobs.port_taken(port) and not ours:
            taken.append(f"{port} ({user})")
    if taken:
        return WARNING, f"in use by another program: {', '.join(taken)}"
    return OK, f"{', '.join(map(str, wanted))} are free or ours"


class Greeter(BaseHTTPRequestHandler):
    """Answers every GET with a word that a proxy would not know."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the doctor himself")

    def log_message(self, *arguments):
        pass


def proxy(profile) -> Finding:
    """What a program in the reader's shell gets from 127.0.0.1 and localhost: us, or a proxy."""
    import psutil

    shell = psutil.Process().environ()  # as we were started; lab keeps its own requests local
    names = [n for n in shell if re.fullmatch("(https?|all)_proxy", n, re.I) and shell[n]]
    if not names:
        return ABSENT, "no proxy is set"
    astray = []
    with HTTPServer(("127.0.0.1", 0), Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for host in ("127.0.0.1", "localhost"):
            command = [PROGRAMS, "ask", f"http://{host}:{server.server_port}"]
            _, last_line = end_of(start(command, shell), 15)
            if last_line != "the doctor himself":
                astray.append(host)
        server.shutdown()
    if astray:
        problem = f"requests from a shell to {' and '.join(astray)} go to the proxy"
        return WARNING, f"{problem}: export no_proxy=127.0.0.1,localhost"
    return OK, f"{', '.join(names)} set, 127.0.0.1 and localhost are asked directly"


def hub(profile) -> Finding:
    """The hub, or the mirror that HF_ENDPOINT names, answers. The CPU profile needs none."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if models.from_modelscope():
        address = "https://modelscope.cn"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=8)
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return WARNING, f"{address} does not answer ({getattr(error, 'reason', error)})"
    return OK, f"{address} answers"


ENGINES = re.compile(
    r"VLLM::|vllm\.entrypoints|deepspeed|llamafactory|torch\.distributed\.run|modules/0\d_"
)


def orphans(profile) -> Finding:
    """Processes of a server or a training that nobody started any more: they hold memory."""
    import psutil

    ours = {process.pid for job in jobs.running().values() for process in jobs.members(job)}
    left = []
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        command = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.pid in ours or not ENGINES.search(command):
            continue
        try:
            parent = process.parent()  # of an orphan: the first process, or the user's systemd
            if parent is None or parent.pid == 1 or parent.name() == "systemd":
                gib = process.info["memory_info"].rss / 2**30
                left.append(f"{process.pid} ({command[:40]}, {gib:.1f} GiB)")
        except psutil.Error:
            continue
    for index, card in enumerate(machine.handles()):
        import pynvml

        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card):
            if process.pid not in ours and not psutil.pid_exists(process.pid):
                gib = (process.usedGpuMemory or 0) / 2**30
                left.append(f"{process.pid} (gone, but holds {gib:.1f} GiB of card {index})")
    if left:
        return WARNING, f"left behind: {', '.join(left[:3])}"
    return OK, f"none; {len(ours)} processes of this repository's own jobs"
