"""The closed loop that the scripts beside this file measure with.

A request's place is filled as soon as it is free, and every step of the engine is timed.

`LLM.generate` hides the steps. `vllm.LLMEngine`, which it stands on, does not: `add_request` puts a
request into the scheduler's queue, `step` lets the scheduler form one batch, computes one token for
each of its requests (or reads prompts) and returns the requests that have a new one.
"""

import time
from dataclasses import dataclass, field


@dataclass
class Timing:
    """What became of one request; times in seconds since the first was sent."""

    sent: float
    first: float = 0.0  # had its first token
    last: float = 0.0  # had its last token
    tokens: list[int] = field(default_factory=list)


@dataclass
class Run:
    """What `drive` saw: seconds, each request's `Timing`, and the places taken after each step."""

    seconds: float
    timings: list[Timing]
    held: list[tuple[float, int]]  # (seconds, requests that hold a place in the KV cache)

    @property
    def tok_per_s(self) -> float:
        return sum(len(timing.tokens) for timing in self.timings) / self.seconds

    @property
    def step_s(self) -> float:
        """Seconds a step while all decode: from the last first token to the last token."""
        all_began = max(timing.first for timing in self.timings)
        all_ended = max(timing.last for timing in self.timings)
        return (all_ended - all_began) / (len(self.timings[0].tokens) - 1)


def drive(engine, requests: list, window: int = 0) -> Run:
    """Serve `requests`, pairs of a prompt and `SamplingParams`.

    All are sent at once, or, with a `window`, as many as keep that number in flight.
    """
    timings: list[Timing] = []
    held: list[tuple[float, int]] = []
    finished = 0
    began = time.perf_counter()
    reported = 0.0
    while finished < len(requests):
        # Send: whatever has a place in the window.
        in_flight = len(timings) - finished
        free = window - in_flight if window else len(requests)
        for prompt, params in requests[len(timings) :][:free]:
            engine.add_request(str(len(timings)), prompt, params)
            timings.append(Timing(sent=time.perf_counter() - began))

        # One step: a token for every request that runs, or a piece of somebody's prompt.
        outputs = engine.step()
        now = time.perf_counter() - began

        for output in outputs:
            timing = timings[int(output.request_id)]
            timing.first = timing.first or now
            timing.last = now
            timing.tokens = output.outputs[0].token_ids
            finished += output.finished
        started = sum(timing.first > 0 for timing in timings)
        held.append((now, started - finished))
        if now - reported > 5:
            reported = now
            print(f"  {now:4.0f} s  {finished} of {len(requests)} requests", flush=True)
    return Run(time.perf_counter() - began, timings, held)


def warm_up(engine) -> None:
    """A few tokens, so that nothing is compiled while the clock runs."""
    from vllm import SamplingParams

    drive(engine, [("warm up", SamplingParams(max_tokens=4, ignore_eos=True))] * 4)
