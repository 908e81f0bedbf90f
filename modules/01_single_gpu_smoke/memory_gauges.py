"""The gauges of 04_where_memory_goes.py: what is held, what the allocator keeps, and the peak."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

from lab.planner.constants import GIB

COLUMNS = ("added", "predicted", "holds", "keeps", "peak")
PROCESS = Path("/proc/self")


class CardMemory:
    """A GPU's, in bytes: PyTorch's allocator counts what it takes from the card."""

    gives_back_by = "torch.cuda.empty_cache()"

    def __init__(self):
        import torch

        self.cuda = torch.cuda

    def holds(self) -> int:
        """Of living tensors."""
        return self.cuda.memory_allocated()

    def keeps(self) -> int:
        """Taken from the card, for tensors and for later."""
        return self.cuda.memory_reserved()

    def give_back(self) -> None:
        """Let the allocator return what no tensor holds."""
        self.cuda.empty_cache()

    def begin_peak(self) -> None:
        self.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The most that tensors held since `begin_peak`."""
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated()


class ProcessMemory:
    """A CPU's, in bytes: the kernel counts what the C library takes for the whole process.

    Pages of files on disk do not count, except in the peak.
    """

    gives_back_by = "malloc_trim"

    def holds(self) -> int:
        self.give_back()
        return self.keeps()

    def keeps(self) -> int:
        return status("RssAnon")

    def give_back(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)

    def begin_peak(self) -> None:
        self.held_before = self.holds()
        (PROCESS / "clear_refs").write_text("5")  # the kernel's own peak begins anew
        self.resident_before = status("VmRSS")

    def peak(self) -> int:
        return self.held_before + status("VmHWM") - self.resident_before


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = re.search(rf"^{name}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.M)
    return int(line[1]) * 1024


def memory_of(device: str) -> CardMemory | ProcessMemory:
    return ProcessMemory() if device == "cpu" else CardMemory()


class Walk:
    """A line of the table for every step, its numbers kept in `metrics`."""

    def __init__(self, device: str):
        self.memory = memory_of(device)
        self.metrics: dict[str, float] = {}
        print(f"  {'GiB':36}" + "".join(f"{column:>11}" for column in COLUMNS))
        if device == "cpu":
            process = self.memory.holds() / GIB
            self.metrics["process_gib"] = round(process, 4)
            print(f"  {'Python, torch, transformers':36}{process:11.3f}")
        else:
            import torch

            free, total = torch.cuda.mem_get_info()  # the first question makes the context
            context = (total - free) / GIB
            self.metrics["context_gib"] = round(context, 4)
            title = "CUDA context, and others on the card"
            print(f"  {title:36}{context:11.3f}   outside of what PyTorch counts")

    def step(self, key: str, title: str, work: Callable, predicted: float) -> float:
        """Do `work`, show the gauges after it and the peak while it ran.

        `predicted` bytes are what arithmetic says it adds. Returns what it did add.
        """
        before = self.memory.holds()
        self.memory.begin_peak()
        work()
        peak = self.memory.peak()
        keeps = self.memory.keeps()
        holds = self.memory.holds()
        added = holds - before
        row = dict(zip(COLUMNS, (added, predicted, holds, keeps, peak), strict=True))
        print(f"  {title:36}" + "".join(f"{n / GIB:11.3f}" for n in row.values()), flush=True)
        self.metrics |= {f"{key}_{name}_gib": round(n / GIB, 4) for name, n in row.items()}
        return added
