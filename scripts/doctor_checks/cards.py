"""The cards: their driver, their way to each other, who holds them, how they are under load."""

import os
import re
import struct
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

from doctor_checks import (
    ABSENT,
    FAILED,
    OK,
    PROGRAMS,
    WARNING,
    Finding,
    end_of,
    installed_lock,
    no_cards,
    program,
    start,
    used_cards,
)
from lab import jobs, machine

SYS, PROC, DEV = Path("/sys"), Path("/proc"), Path("/dev")
WSL_LIBRARIES = Path("/usr/lib/wsl/lib")  # put there by the NVIDIA driver of Windows
REINSTALL = "reinstall the driver (Ubuntu: sudo apt install nvidia-driver-580), then reboot"


# -----------------------------------------------------------------------------
# The driver


def on_wsl() -> bool:
    return "microsoft" in (PROC / "version").read_text().lower()


def in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()


def seen_on_the_bus() -> list[Path]:
    """NVIDIA's display devices on PCI, whatever their driver."""
    devices = []
    for device in sorted((SYS / "bus/pci/devices").glob("*")):
        vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            devices.append(device)
    return devices


def why_no_driver() -> str:
    """What keeps a card that is here from being used, with the remedy; "" where no card is here."""
    import pynvml

    devices = seen_on_the_bus()
    through_windows = (DEV / "dxg").exists() and (WSL_LIBRARIES / "libcuda.so.1").exists()
    if not devices and not through_windows:
        return ""
    try:
        pynvml.nvmlInit()
        return "" if pynvml.nvmlDeviceGetCount() else "the driver runs and lists no card: reboot"
    except pynvml.NVMLError as error:
        problem = str(error)
    if through_windows:
        return (
            f"WSL2 ({problem}): update the NVIDIA driver of Windows, then run wsl --shutdown there"
        )
    if re.search("version mismatch", problem, re.I):
        return f"{problem}: the driver was updated while the old one runs: reboot the machine"
    bound = {
        os.path.basename(os.readlink(d / "driver")) for d in devices if (d / "driver").exists()
    }
    if "nouveau" in bound:
        return f"nouveau drives the card: {REINSTALL} (the package blocks nouveau)"
    if "vfio-pci" in bound:
        return "the card is bound to vfio-pci, for a virtual machine: give it back to the host"
    if in_container():
        return f"a container without the cards ({problem}): start it with --gpus all"
    if "nvidia" in bound:
        return (
            f"the kernel's part of the driver runs, its libraries do not ({problem}): {REINSTALL}"
        )
    return f"no driver drives the card ({problem}): {REINSTALL}"


def driver(profile) -> Finding:
    """The driver runs, is new enough for torch, and a kernel computes right on every card."""
    if not used_cards():
        if not (problem := why_no_driver()):
            return ABSENT, no_cards()
        return (
            FAILED if installed_lock() == "gpu" else WARNING
        ), f"an NVIDIA card is here: {problem}"
    import pynvml

    returncode, last_line = program("cuda_kernel", timeout_s=60)
    pynvml.nvmlInit()
    newest = pynvml.nvmlSystemGetCudaDriverVersion()
    words = f"driver {used_cards()[0]['driver']} (CUDA {newest // 1000}.{newest % 1000 // 10})"
    built = re.match(r"(\d+)\.(\d+) (\d+)$", last_line)
    if returncode or not built:
        return FAILED, f"{words}, torch: {last_line[:120]}"
    if int(built[1]) * 1000 + int(built[2]) * 10 > newest:
        return FAILED, f"{words} is too old for torch's CUDA {built[1]}.{built[2]}"
    if int(built[3]) != len(used_cards()):
        return FAILED, f"{words}, torch sees {built[3]} cards of {len(used_cards())}"
    return OK, f"{words}, torch's CUDA {built[1]}.{built[2]} computes right on {built[3]} card(s)"


def wsl(profile) -> Finding:
    """WSL2 keeps half of the memory to Windows and page-locks little: vllm#4411."""
    if not on_wsl():
        return ABSENT, "no WSL"
    return WARNING, "WSL2: give it memory in .wslconfig, and expect slow page-locked memory"


# -----------------------------------------------------------------------------
# The processes' way to each other

PATIENCE_S = 50  # for two processes that should meet and add up


def pair(backend: str, first: int, second: int, **environment) -> str:
    """What goes wrong when two processes add their numbers up, "" when nothing does."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in (0, 1):
            command = [PROGRAMS, "all_reduce", rank, backend, first, second, folder]
            processes.append(start(command, os.environ | environment))
        deadline = time.monotonic() + PATIENCE_S
        ends = [end_of(process, max(1, deadline - time.monotonic())) for process in processes]
    for returncode, last_line in ends:
        if last_line != "right":
            return "hangs" if returncode == 124 else last_line[:120]
    return ""


def all_reduce(profile) -> Finding:
    """The sum of two processes' numbers, every value compared, in limited time: gloo."""
    if problem := pair("gloo", 0, 0, CUDA_VISIBLE_DEVICES=""):
        return FAILED, f"gloo: {problem}"
    return OK, "gloo: 4 million numbers of two processes summed, all right"


def nccl(profile) -> Finding:
    """The same between every two cards, P2P off and on: it must not hang, and not lie."""
    if len(used_cards()) < 2:
        return ABSENT, "one NVIDIA GPU" if used_cards() else no_cards()
    problems = {}
    for first, second in combinations(range(len(used_cards())), 2):
        for disable in ("1", "0"):
            if problem := pair("nccl", first, second, NCCL_P2P_DISABLE=disable):
                state = "off" if disable == "1" else "on"
                problems[disable] = f"cards {first} and {second}, P2P {state}: {problem}"
    if "1" in problems:
        return FAILED, problems["1"]
    if problems:
        return WARNING, problems["0"] + "; the profile keeps P2P off"
    return OK, "every pair right, with P2P off and on"


def redirects(bridge: Path) -> bool | None:
    """Whether ACS on this PCI bridge sends card-to-card traffic up to the CPU; None: not readable.

    PCIe extended capabilities begin at 0x100 (16 bits id, 4 version, 12 the next one's offset);
    ACS is id 0x0D, its control word at +6, request and completion redirect its bits 2 and 3.
    Only root may read beyond byte 64.
    """
    try:
        content = (bridge / "config").read_bytes()
    except OSError:
        return None
    if len(content) < 0x104:
        return None
    offset = 0x100
    while offset:
        (header,) = struct.unpack_from("<I", content, offset)
        if header & 0xFFFF == 0x0D:
            return bool(struct.unpack_from("<H", content, offset + 6)[0] & 0b1100)
        offset = header >> 20
    return False


def iommu(profile) -> Finding:
    """Whether an IOMMU translates the cards' addresses, or ACS sends P2P through the CPU."""
    if len(used_cards()) < 2:
        return ABSENT, "one NVIDIA GPU" if used_cards() else no_cards()
    import pynvml

    translated, redirected, unreadable = [], [], False
    for index, card in enumerate(machine.handles()):
        address = pynvml.nvmlDeviceGetPciInfo(card).busId
        address = address.decode() if isinstance(address, bytes) else address
        device = (SYS / "bus/pci/devices" / address.lower()[-12:]).resolve()
        kind = device / "iommu_group/type"
        if kind.exists() and kind.read_text().startswith("DMA"):
            translated.append(str(index))
        for bridge in device.parents:
            if re.fullmatch(r"[\da-f]{4}:[\da-f]{2}:[\da-f]{2}\.\d", bridge.name):
                state = redirects(bridge)
                unreadable |= state is None
                redirected += [bridge.name] if state else []
    sightings = []
    if translated:
        sightings.append(f"an IOMMU translates for card {', '.join(translated)}")
    if redirected:
        sightings.append(f"ACS redirects at {', '.join(sorted(set(redirected)))}")
    if not sightings:
        unknown = "; ACS can be read by root only" if unreadable else ", ACS redirects nothing"
        return OK, f"no IOMMU translates for the cards{unknown}"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return OK, f"{' and '.join(sightings)}: no harm while NCCL_P2P_DISABLE is 1"
    return WARNING, f"{' and '.join(sightings)}: P2P can hang; boot with iommu=pt, ACS off"


# -----------------------------------------------------------------------------
# Who holds the cards, and what they have been through

CONTEXT_GIB = 0.5  # of the CUDA context, which vLLM opens before it looks


def desktop(profile) -> Finding:
    """Memory that others hold on the cards, and whether vLLM would still start."""
    if not used_cards():
        return ABSENT, no_cards()
    import psutil
    import pynvml

    ours = {process.pid for job in jobs.running().values() for process in jobs.members(job)}
    share = float(profile.serve.args.get("gpu-memory-utilization", 0.9))
    descriptions, short = [], False
    for index, card in enumerate(machine.handles()):
        memory = pynvml.nvmlDeviceGetMemoryInfo(card, version=pynvml.nvmlMemory_v2)
        processes = {
            process.pid: process
            for kind in ("Graphics", "Compute")
            for process in getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses")(card)
        }
        held, names = memory.used, []
        for pid, process in processes.items():
            if pid in ours:
                held -= process.usedGpuMemory or 0
            elif psutil.pid_exists(pid):
                names.append(psutil.Process(pid).name())
        if held < 0.3 * 2**30:  # a driver that nobody uses keeps a little
            continue
        total = (memory.total - memory.reserved) / 2**30
        left = total - held / 2**30 - CONTEXT_GIB
        short |= left < share * total
        owners = f" by {', '.join(sorted(set(names)))}" if names else ""
        descriptions.append(
            f"card {index}: {held / 2**30:.1f} of {total:.1f} GiB held{owners}, "
            f"gpu-memory-utilization up to {max(0, int(left / total * 100) / 100):.2f} starts"
        )
    if not descriptions:
        return OK, f"nobody else holds memory on {len(used_cards())} card(s)"
    refused = f"; the profile's {share} is refused" if short else f"; the profile's {share} starts"
    return WARNING, "; ".join(descriptions) + refused


XIDS = {
    13: "a kernel's exception (a program's error, or overclocking)",
    31: "a memory access outside of what was allocated (a program's error)",
    43: "a program's work was stopped (a program's error)",
    45: "a program was ended",
    48: "two wrong bits in the card's memory",
    63: "a memory row was replaced: reboot",
    64: "a memory row could not be replaced",
    74: "an NVLink error",
    79: "the card fell off the bus: power, slot or heat",
    119: "the card's own processor (GSP) does not answer: reboot",
}


def xid(profile) -> Finding:
    """Errors that the driver wrote to the kernel log since the start of the machine."""
    if not used_cards() and not seen_on_the_bus():
        return ABSENT, "no NVIDIA GPU"
    for command in (["dmesg"], ["journalctl", "-k", "-b", "-q", "--no-pager"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            break
    else:
        return ABSENT, "the kernel log cannot be read: sudo dmesg | grep Xid"
    found = re.findall(r"NVRM: Xid \(PCI:([\w:.]+)\): (\d+)", done.stdout)
    if not found:
        return OK, "no Xid in the kernel log since the start of the machine"
    last = {(address, int(number)): None for address, number in found}
    words = [f"Xid {n} at {address}: {XIDS.get(n, 'see the catalogue')}" for address, n in last]
    return WARNING, "; ".join(words[-3:])


def pinned(profile) -> Finding:
    """1 GiB of page-locked memory, copied to the card and back unchanged."""
    if not used_cards():
        return ABSENT, no_cards()
    returncode, last_line = program("pinned", timeout_s=90)
    return (OK if returncode == 0 else FAILED), last_line[:150]


# -----------------------------------------------------------------------------
# Under load


def load(profile) -> Finding:
    """Two seconds into matrix products on every card: PCIe link, power, throttling."""
    if not used_cards():
        return ABSENT, no_cards()
    import pynvml

    command = [sys.executable, PROGRAMS, "load"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if process.stdout.readline().strip() != "ready":
        process.wait()
        return FAILED, "no matrix product could be started on the cards"
    time.sleep(2)
    seen, bad = [], []
    for index, card in enumerate(machine.handles()):
        words, problems = under_load(pynvml, card)
        seen.append(f"card {index}: {words}")
        bad += [f"card {index} {problem}" for problem in problems]
    process.wait()
    return (WARNING, "; ".join(bad)) if bad else (OK, "; ".join(seen))


def under_load(pynvml, card) -> tuple[str, list[str]]:
    """A busy card's link, power and temperature in words, and what is wrong with them.

    Half the lanes (x8 and x8) is what consumer boards give two cards. Clocks fall on every card
    that reaches its power limit: only the driver's reasons tell heat and a failing supply apart.
    """
    generation = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(card)
    lanes = pynvml.nvmlDeviceGetCurrPcieLinkWidth(card)
    best_generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(card)
    best_lanes = pynvml.nvmlDeviceGetMaxPcieLinkWidth(card)
    power = pynvml.nvmlDeviceGetPowerUsage(card) / 1000
    limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000
    normal = pynvml.nvmlDeviceGetPowerManagementDefaultLimit(card) / 1000
    celsius = pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
    heat = (
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
    )
    problems = []
    if generation < best_generation or lanes < min(8, best_lanes):
        best = f"PCIe {best_generation} x{best_lanes}"
        problems.append(f"runs at PCIe {generation} x{lanes}, it could {best}")
    if limit < 0.95 * normal:
        problems.append(f"is limited to {limit:.0f} of {normal:.0f} W")
    if reasons & heat:
        problems.append(f"is throttled by heat ({celsius} C)")
    if reasons & pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown:
        problems.append("is throttled by its power supply")
    words = f"PCIe {generation} x{lanes}, {power:.0f} of {limit:.0f} W, {celsius} C"
    return words, problems
