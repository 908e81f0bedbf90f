"""The cards: their driver, who holds them, their past errors, how they are under load."""

import re
import subprocess
import sys
import time
from pathlib import Path

from doctor_checks import (
    ABSENT,
    FAILED,
    OK,
    PROGRAMS,
    WARNING,
    Finding,
    installed_lock,
    no_cards,
    program,
    used_cards,
)
from lab import ROOT, jobs, machine

PROC = Path("/proc")


# -----------------------------------------------------------------------------
# The driver


def driver_problem() -> str:
    """What keeps a card that is here from working, with the remedy, as set-up says it."""
    script = ". scripts/machine.sh && nvidia_card && driver_problem"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def driver(profile) -> Finding:
    """The driver runs, is new enough for torch, and a kernel computes right on every card."""
    if not used_cards():
        if not (problem := driver_problem()):
            if installed_lock() == "gpu" and profile.device == "cpu":
                return FAILED, "the gpu lock, and no profile takes a card here: make setup LOCK=cpu"
            return ABSENT, no_cards()
        return (FAILED if installed_lock() == "gpu" else WARNING), problem
    import pynvml

    returncode, last_line = program("cuda_kernel", timeout_s=60)
    pynvml.nvmlInit()
    newest = pynvml.nvmlSystemGetCudaDriverVersion()
    driver = f"driver {used_cards()[0]['driver']} (CUDA {newest // 1000}.{newest % 1000 // 10})"
    built = re.match(r"(\d+)\.(\d+) (\d+)$", last_line)
    if returncode or not built:
        return FAILED, f"{driver}, torch: {last_line[:120]}"
    if int(built[1]) * 1000 + int(built[2]) * 10 > newest:
        return FAILED, f"{driver} is too old for torch's CUDA {built[1]}.{built[2]}"
    if int(built[3]) != len(used_cards()):
        return FAILED, f"{driver}, torch sees {built[3]} cards of {len(used_cards())}"
    return OK, f"{driver}, torch's CUDA {built[1]}.{built[2]} computes right on {built[3]} card(s)"


def wsl(profile) -> Finding:
    """WSL2 keeps half of the memory to Windows and page-locks little: vllm#4411."""
    if "microsoft" not in (PROC / "version").read_text().lower():
        return ABSENT, "no WSL"
    return WARNING, "WSL2: give it memory in .wslconfig, and expect slow page-locked memory"


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
    if not machine.cards() and not driver_problem():
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
    errors = re.findall(r"NVRM: Xid \(PCI:([\w:.]+)\): (\d+)", done.stdout)
    if not errors:
        return OK, "no Xid in the kernel log since the start of the machine"
    lines = []
    for address, number in dict.fromkeys(errors):
        meaning = XIDS.get(int(number), "see the catalogue")
        lines.append(f"Xid {int(number)} at {address}: {meaning}")
    return WARNING, "; ".join(lines[-3:])


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
    seen = []
    bad = []
    for index, card in enumerate(machine.handles()):
        readings, problems = under_load(pynvml, card)
        seen.append(f"card {index}: {readings}")
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
    readings = f"PCIe {generation} x{lanes}, {power:.0f} of {limit:.0f} W, {celsius} C"
    return readings, problems
