"""Where a step's time goes: a stopwatch for its parts, and PyTorch's profiler around it."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lab.table import table

SKIPPED = 1  # steps before the profiler looks: the first one warms up


class StepTime:
    """Seconds of each part of the steps, summed. Without `active` it does nothing."""

    def __init__(self, active: bool, device: torch.device, last: int):
        """`last`: the step after which the profiler looks no more."""
        self.active = active
        self.device = device
        self.last = last
        self.seconds: dict[str, float] = {}
        self.steps = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step, under its name in the trace too. On a GPU it waits for the kernels."""
        if not self.active:
            yield
            return
        began = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def step_done(self) -> None:
        """Forget the first steps; from then on the profiler looks, until the last one is over."""
        self.steps += 1
        if self.active and self.steps == SKIPPED:
            self.seconds.clear()
            self.profiler.start()
        if self.active and self.steps == self.last:
            self.profiler.stop()

    def finish(self, trace: Path) -> tuple[dict[str, float], list]:
        """Seconds a step of each part, and the five operators that cost most themselves.

        Writes the trace, which chrome://tracing and https://ui.perfetto.dev show.
        """
        trace.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(trace))
        counted = self.steps - SKIPPED
        parts = {name: total / counted for name, total in self.seconds.items()}
        kind = "device" if self.device.type == "cuda" else "cpu"
        own = f"self_{kind}_time_total"  # microseconds
        events = [event for event in self.profiler.key_averages() if event.key not in parts]
        costly = sorted(events, key=lambda event: getattr(event, own), reverse=True)[:5]
        operators = [
            [event.key[:60], event.count // counted, getattr(event, own) / counted / 1e6]
            for event in costly
        ]
        return parts, operators


def show(parts: dict[str, float], operators: list) -> None:
    """Both tables."""
    whole = sum(parts.values())
    shares = [[name, f"{each:.3f}", f"{each / whole:.0%}"] for name, each in parts.items()]
    costs = [[name, calls, f"{each:.3f}"] for name, calls, each in operators]
    print()
    table(["part", "s a step", "share"], shares)
    print()
    table(["operator, without what it calls", "calls a step", "s a step"], costs)
