"""The way of two processes, and of two cards, to each other."""

import os
import re
import struct
import tempfile
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
    no_cards,
    start,
    used_cards,
)
from lab import machine

SYS = Path("/sys")
PATIENCE_S = 50  # for two processes that should meet and add up


def pair(backend: str, first: int, second: int, **environment) -> str:
    """What goes wrong when two processes add their numbers up, "" when nothing does."""
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
