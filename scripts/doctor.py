"""Is this machine fit for the six stages? Every check does the thing and compares the result: `make doctor`.

    make doctor                              # two minutes the first time, which builds DeepSpeed's CPUAdam; then half of it
    make doctor ARGS="--only ports all-reduce"
    make doctor ARGS="--json"
    make doctor ARGS="--strict"              # exit code 1 for warnings

Look at: the verdicts. `failed` and `warning` name the entry of the FAQ (modules/01_single_gpu_smoke/readme.md) that mends it; a check of
something that this machine does not have is `not applicable`, never `ok`. Exit code 2 where a check failed.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from lab import ROOT, fail, jobs, machine, models, results
from lab.profile import load_profile

OK, WARNING, FAILED, ABSENT = "ok", "warning", "failed", "not applicable"
FAQ = "modules/01_single_gpu_smoke/readme.md"
Finding = tuple[str, str]  # verdict, what was found


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    """Python `code` in a session of its own."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | environment, start_new_session=True)  # fmt: skip


def end_of(process: subprocess.Popen, timeout_s: float) -> tuple[int, str]:
    """(exit code, last line said), 124 and the process ended when it ran out of time: a hang is a finding, too."""
    try:
        said = process.communicate(timeout=timeout_s)[0].strip().splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return 124, f"no answer within {timeout_s:.0f} s"
    return process.returncode, said[-1] if said else "nothing said"


# -----------------------------------------------------------------------------
# Software


def versions(profile) -> Finding:
    """Every package of the lock that belongs to this machine, in the locked version."""
    lock = "gpu" if machine.gpus() and profile.device == "cuda" else "cpu"
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", (ROOT / "locks" / f"{lock}.txt").read_text(), re.M))
    have = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.split("+")[0] for d in metadata.distributions()}
    wrong = [f"{name} {have.get(name, 'absent')} instead of {version}" for name, version in wanted.items() if have.get(name) != version.split("+")[0]]
    return (FAILED, f"{len(wrong)} of {len(wanted)} packages differ from locks/{lock}.txt: {', '.join(wrong[:3])}") if wrong else (OK, f"{len(wanted)} packages as in locks/{lock}.txt")


def driver(profile) -> Finding:
    """The driver is new enough for torch's CUDA, and a kernel that torch runs on every card gives the right numbers."""
    if not machine.gpus():
        return ABSENT, "no NVIDIA GPU"
    import pynvml

    code = (
        "import torch\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    a = torch.arange(4096, device=f'cuda:{i}', dtype=torch.float64); assert (a * 2).sum().item() == 4096 * 4095, f'cuda:{i} computes wrong numbers'\n"
        "print(torch.version.cuda or 'none', torch.cuda.device_count())"
    )
    returncode, said = end_of(start(code), 60)
    number = pynvml.nvmlSystemGetCudaDriverVersion()
    found = f"driver {machine.gpus()[0]['driver']} (CUDA {number // 1000}.{number % 1000 // 10}), torch: {said}"
    built = re.match(r"(\d+)\.(\d+) (\d+)$", said)
    good = returncode == 0 and built and int(built[1]) * 1000 + int(built[2]) * 10 <= number and int(built[3]) == len(machine.gpus())
    return (OK if good else FAILED), found


def nvcc(profile) -> Finding:
    """The CUDA compiler that DeepSpeed builds with is of torch's CUDA."""
    if not machine.gpus():
        return ABSENT, "no NVIDIA GPU"
    program = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return FAILED, "no nvcc: DeepSpeed cannot build its CUDA ops"
    release = re.search(r"release (\d+)\.(\d+)", said)
    _, cuda = end_of(start("import torch; print(torch.version.cuda)"), 60)
    return (OK if cuda.split(".")[0] == release[1] else FAILED), f"nvcc {release[1]}.{release[2]}, torch built for CUDA {cuda}"


def compiler(profile) -> Finding:
    """DeepSpeed's CPUAdam is built (kept for the next time) and takes the step that torch's Adam takes."""
    code = (
        "import torch, time; began = time.time()\n"
        "from deepspeed.ops.adam import DeepSpeedCPUAdam\n"
        "a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in 'ab')\n"
        "for p, kind in ((a, DeepSpeedCPUAdam), (b, torch.optim.Adam)):\n"
        "    p.grad = torch.linspace(3, -2, 1000); o = kind([p], lr=0.1); o.step(); o.step()\n"
        "worst = (a - b).abs().max().item(); assert worst < 1e-5, f'CPUAdam differs from Adam by {worst}'\n"
        "print(f'CPUAdam built or found in {time.time() - began:.0f} s, equal to torch Adam')"
    )
    if not shutil.which("c++") and not shutil.which("g++"):
        return FAILED, "no C++ compiler on PATH: DeepSpeed cannot build CPUAdam"
    if not shutil.which("ninja"):
        return FAILED, "no ninja on PATH: DeepSpeed cannot build CPUAdam"
    returncode, said = end_of(start(code), 170)
    return (OK if returncode == 0 else FAILED), said[:150]


# -----------------------------------------------------------------------------
# The processes' way to each other

PATIENCE_S = 50  # for two processes that should meet and add up
ALL_REDUCE = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
rank, backend, first, second, folder = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group(backend, init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=40))
device = torch.device('cuda', int((first, second)[rank])) if backend == 'nccl' else torch.device('cpu')
for size in (1, 1000, 4_000_000):
    numbers = torch.arange(size, dtype=torch.float32, device=device) % 1000 * (rank + 1)
    dist.all_reduce(numbers)
    wrong = (numbers != torch.arange(size, dtype=torch.float32, device=device) % 1000 * 3).sum().item()
    if wrong:
        print(f'{wrong} of {size} numbers are wrong'); os._exit(3)
dist.barrier()
print('right'); sys.stdout.flush(); os._exit(0)
"""


def pair(backend: str, first: int, second: int, **environment) -> str:
    """What goes wrong when two processes add their numbers up, "" when nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [start(ALL_REDUCE, rank, backend, first, second, folder, **environment) for rank in (0, 1)]
        deadline = time.monotonic() + PATIENCE_S
        ends = [end_of(process, max(1, deadline - time.monotonic())) for process in ranks]
    return next(("hangs" if code == 124 else said[:120] for code, said in ends if said != "right"), "")


def all_reduce(profile) -> Finding:
    """The sum of two processes' numbers, every value compared, under a timeout: gloo on the host."""
    problem = pair("gloo", 0, 0, CUDA_VISIBLE_DEVICES="")
    return (FAILED, f"gloo: {problem}") if problem else (OK, "gloo: 4 million numbers of two processes summed, all right")


def nccl(profile) -> Finding:
    """The same between every two cards, with P2P as the profile sets it and the other way round: it must not hang, and not lie."""
    if len(machine.gpus()) < 2:
        return ABSENT, f"{len(machine.gpus())} NVIDIA GPUs"
    from itertools import combinations

    problems = {}
    for first, second in combinations(range(len(machine.gpus())), 2):
        for disable in ("1", "0"):
            if problem := pair("nccl", first, second, NCCL_P2P_DISABLE=disable):
                problems[disable] = f"cards {first} and {second}, P2P {'off' if disable == '1' else 'on'}: {problem}"
    if "1" in problems:
        return FAILED, problems["1"]
    return (WARNING, problems["0"] + "; the profile keeps P2P off") if problems else (OK, "every pair right, with P2P off and on")


# -----------------------------------------------------------------------------
# Room


def ram(profile) -> Finding:
    """Free host memory, held against what the stages of this profile need."""
    import psutil

    need = 8 if profile.device == "cpu" else 38  # the offload of module 05: make plan
    free = psutil.virtual_memory().available / 2**30
    return (OK if free >= need else WARNING), f"{free:.1f} GiB free of {psutil.virtual_memory().total / 2**30:.1f}, the stages need up to {need}"


def pinned(profile) -> Finding:
    """1 GiB of page-locked memory, copied to the card and back unchanged."""
    if not machine.gpus():
        return ABSENT, "no NVIDIA GPU"
    code = (
        "import torch\n"
        "a = torch.arange(2**28, dtype=torch.int32).pin_memory(); b = a.to('cuda', non_blocking=True).cpu()\n"
        "assert torch.equal(a, b), 'the copy differs'; print('1 GiB page-locked, copied to the card and back')"
    )
    returncode, said = end_of(start(code), 90)
    return (OK if returncode == 0 else FAILED), said[:150]


def shared_memory(profile) -> Finding:
    """64 MiB written to /dev/shm and read back; NCCL and DataLoader want 1 GiB of it."""
    free = shutil.disk_usage("/dev/shm").free / 2**30
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            content = os.urandom(2**20) * 64
            file.write(content)
            file.flush()
            same = Path(file.name).read_bytes() == content
    except OSError as e:
        return FAILED, f"/dev/shm cannot take 64 MiB ({e.strerror}), {free:.2f} GiB free"
    return (FAILED if not same else OK if free >= 1 else WARNING), f"{free:.1f} GiB free in /dev/shm"


def disk(profile) -> Finding:
    """Room for this profile's models where the hub keeps them, and 10 GB for runs/."""
    names = {section.model for section in profile.values() if hasattr(section, "get") and section.get("model")}
    need = {Path(os.environ.get("HF_HOME") or Path.home() / ".cache"): sum(models.entry(name)[1].get("download_gb", 0) for name in names) + 1, ROOT: 10}
    found, short = [], False
    for folder, gb in need.items():
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 1e9
        short |= free < gb
        found.append(f"{free:.0f} GB free for {'models' if folder != ROOT else 'runs'} (up to {gb:.0f})")
    return (WARNING if short else OK), ", ".join(found)


def limits(profile) -> Finding:
    """Open files: a server with many connections and a DataLoader need more than the smallest default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    words = f"{soft} open files (at most {hard}), locked memory {'unlimited' if locked == resource.RLIM_INFINITY else f'{locked / 2**20:.0f} MiB'}"
    return (OK if soft == resource.RLIM_INFINITY or soft >= 1024 else WARNING), words


def ports(profile) -> Finding:
    """Each port that a stage listens on can be bound now, or is held by this repository's own server."""
    wanted = {profile.serve.port: "make vllm-serve", profile.finetune.api_port: "make lf-api", profile.finetune.webui_port: "make lf-webui", 29500: "launchers"}
    own = [job.get("address", "") for job in jobs.running().values()]
    taken = [f"{port} ({user})" for port, user in wanted.items() if jobs.port_taken(port) and not any(address.endswith(f":{port}") for address in own)]
    return (WARNING, f"in use by another program: {', '.join(taken)}") if taken else (OK, f"{', '.join(map(str, wanted))} are free or ours")


def hub(profile) -> Finding:
    """The hub, or the mirror that HF_ENDPOINT names, answers. Only a warning: the CPU profile needs none."""
    import urllib.error
    import urllib.request

    address = "https://modelscope.cn" if models.from_modelscope() else os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=8)
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as e:
        return WARNING, f"{address} does not answer ({getattr(e, 'reason', e)})"
    return OK, f"{address} answers"


def orphans(profile) -> Finding:
    """Processes of a server or a training that nobody started any more: they hold memory, on a GPU for ever."""
    import psutil

    ours = {p.pid for job in jobs.running().values() for p in jobs.members(job)}
    found = []
    for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
        words = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if process.pid in ours or not re.search(r"VLLM::|vllm\.entrypoints|deepspeed|llamafactory|torch\.distributed\.run|modules/0\d_", words):
            continue
        try:
            parent = process.parent()  # of an orphan: the first process, or the user's systemd
            if parent is None or parent.pid == 1 or parent.name() == "systemd":
                found.append(f"{process.pid} ({words[:40]}, {process.info['memory_info'].rss / 2**30:.1f} GiB)")
        except psutil.Error:
            continue
    if machine.gpus():
        import pynvml

        for i in range(pynvml.nvmlDeviceGetCount()):
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(i)):
                if process.pid not in ours and not psutil.pid_exists(process.pid):
                    found.append(f"{process.pid} (gone, but holds {(process.usedGpuMemory or 0) / 2**30:.1f} GiB of card {i})")
    return (WARNING, f"left behind: {', '.join(found[:3])}") if found else (OK, f"none; {len(ours)} processes of this repository's own jobs")


# -----------------------------------------------------------------------------
# The cards under load


def load(profile) -> Finding:
    """Two seconds of matrix products on every card: PCIe link, power limit, clocks held back."""
    if not machine.gpus():
        return ABSENT, "no NVIDIA GPU"
    import pynvml

    code = (
        "import torch, time\n"
        "a = [torch.randn(8192, 8192, device=f'cuda:{i}', dtype=torch.bfloat16) for i in range(torch.cuda.device_count())]\n"
        "print('ready', flush=True); end = time.time() + 4\n"
        "while time.time() < end:\n"
        "    [x @ x for x in a]; [torch.cuda.synchronize(i) for i in range(len(a))]"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(2)
    found, bad = [], []
    slow = pynvml.nvmlClocksThrottleReasonHwThermalSlowdown | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    for i in range(len(machine.gpus())):
        card = pynvml.nvmlDeviceGetHandleByIndex(i)
        link = [f"PCIe {pynvml.nvmlDeviceGetCurrPcieLinkGeneration(card)} x{pynvml.nvmlDeviceGetCurrPcieLinkWidth(card)}",
                f"PCIe {pynvml.nvmlDeviceGetMaxPcieLinkGeneration(card)} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(card)}"]  # fmt: skip
        limit, normal = pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000, pynvml.nvmlDeviceGetPowerManagementDefaultLimit(card) / 1000
        found.append(f"card {i}: {link[0]}, {pynvml.nvmlDeviceGetPowerUsage(card) / 1000:.0f} of {limit:.0f} W, {pynvml.nvmlDeviceGetTemperature(card, 0)} C")
        if link[0] != link[1]:
            bad.append(f"card {i} runs at {link[0]}, it could {link[1]}")
        if limit < 0.95 * normal:
            bad.append(f"card {i} is limited to {limit:.0f} of {normal:.0f} W")
        if pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card) & slow:
            bad.append(f"card {i} is throttled by heat or power")
    process.wait()
    return (WARNING, "; ".join(bad)) if bad else (OK, "; ".join(found))


def wsl(profile) -> Finding:
    """WSL2 keeps half of the memory to Windows and page-locks little: vllm#4411."""
    if "microsoft" not in Path("/proc/version").read_text().lower():
        return ABSENT, "no WSL"
    return WARNING, "WSL2: give it memory in .wslconfig, and expect slow page-locked memory"


# Name, the check, the anchor of its entry in the FAQ.
CHECKS = {
    "versions": (versions, "faq-versions"), "driver": (driver, "faq-driver"), "nvcc": (nvcc, "faq-nvcc"), "compiler": (compiler, "faq-compiler"),
    "all-reduce": (all_reduce, "faq-gloo"), "nccl": (nccl, "faq-p2p"), "ram": (ram, "faq-ram"), "pinned": (pinned, "faq-pinned"),
    "shared-memory": (shared_memory, "faq-shm"), "disk": (disk, "faq-disk"), "limits": (limits, "faq-limits"), "ports": (ports, "faq-ports"),
    "hub": (hub, "faq-hub"), "orphans": (orphans, "faq-orphans"), "load": (load, "faq-load"), "wsl": (wsl, "faq-wsl"),
}  # fmt: skip


def snapshot(found: dict[str, dict], profile) -> None:
    """Put this machine, the versions and the verdicts between the marks of .CLAUDE.md."""
    facts = machine.describe()
    cards = ", ".join(f"{g['name']} ({g['memory_gib']} GiB, driver {g['driver']})" for g in facts["gpus"]) or "no GPU"
    lines = [f"- {facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB; {cards}; profile {profile.name}."]
    lines += ["- " + ", ".join(f"{name} {version}" for name, version in machine.versions().items()) + f"; Python {sys.version.split()[0]}."]
    lines += [f"- {name}: {f['verdict']}, {f['found']}" for name, f in found.items() if f["verdict"] != ABSENT]
    file = ROOT / ".CLAUDE.md"
    text, count = re.subn(r"(<!-- snapshot -->\n).*?(<!-- /snapshot -->)", lambda m: m[1] + "\n".join(lines) + "\n" + m[2], file.read_text(encoding="utf-8"), flags=re.S)
    if not count:
        fail(".CLAUDE.md has no place for a snapshot: put back the lines <!-- snapshot --> and <!-- /snapshot -->")
    file.write_text(text, encoding="utf-8")
    print("written: .CLAUDE.md", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"only these: {', '.join(CHECKS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of lines")
    parser.add_argument("--snapshot", action="store_true", help="write what was found into .CLAUDE.md: make snapshot")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where there is a warning")
    args = parser.parse_args()
    if unknown := set(args.only or []) - CHECKS.keys():
        fail(f"there is no check {', '.join(sorted(unknown))}: choose from {', '.join(CHECKS)}")
    profile = load_profile(check=False)
    found = {}
    for name, (check, anchor) in CHECKS.items():
        if args.only and name not in args.only:
            continue
        began = time.monotonic()
        try:
            verdict, words = check(profile)
        except Exception as e:  # a check that breaks has found something
            verdict, words = FAILED, f"{type(e).__name__}: {e}"
        found[name] = {"verdict": verdict, "found": words, "seconds": round(time.monotonic() - began, 1)}
        if verdict in (WARNING, FAILED):
            found[name]["faq"] = f"{FAQ}#{anchor}"
        if not args.json:
            print(f"{verdict:15} {name:14} {words}" + (f"\n{'':30} -> {found[name]['faq']}" if "faq" in found[name] else ""), flush=True)
    verdicts = [f["verdict"] for f in found.values()]
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        print(", ".join(f"{verdicts.count(v)} {v}" for v in (OK, WARNING, FAILED, ABSENT) if v in verdicts))
    if args.snapshot:
        snapshot(found, profile)
    if os.environ.get("STORE") == "1" and not args.only:
        results.finish(__file__, {name: f"{f['verdict']}: {f['found']}" for name, f in found.items()} | {"took_s": round(sum(f["seconds"] for f in found.values()))})
    else:
        results.note(results.name_of(__file__))
    raise SystemExit(2 if FAILED in verdicts else 1 if args.strict and WARNING in verdicts else 0)


if __name__ == "__main__":
    main()
