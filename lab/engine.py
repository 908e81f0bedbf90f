"""vLLM's arguments as a command line, what its server offers and why it stopped, and its engine in this process, step by step: what the scripts share.

`LLM.generate` hides the steps; `vllm.LLMEngine`, which it stands on, does not.
"""

import argparse
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from lab import fail
from lab.profile import need_vllm


@dataclass
class Timing:
    """Of one request, in seconds since the first was sent: when it was sent, had its first token, and had its last; the tokens made."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)


def words(args: dict) -> list[str]:
    """vLLM's command line for arguments by its own names: {"enforce-eager": True, "port": 8000} is --enforce-eager --port 8000."""
    return [word for flag, value in args.items() for word in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])]


def cards_filled(command: list[str]) -> int:
    """How many GPUs the engine with this command line fills: the first ones that it sees."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    sizes, _ = parser.parse_known_args(command)
    return sizes.tensor_parallel_size * sizes.pipeline_parallel_size


def cause(log: Path) -> str:
    """The message that says why the engine stopped: a refused setting, else its first exception, else the last line."""
    prefix = r"^(\((?:APIServer|EngineCore|Worker)\S* pid=\d+\) )?(?:(?:INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^]]+\] ?)?"
    text = re.sub(prefix, "", log.read_text(errors="replace"), flags=re.M)
    text = re.sub(r"^make(\[\d+\])?: .*$", "", text, flags=re.M)  # of a target that failed: only that it did
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it wrote nothing"]
    for pattern in (r"Value error, (.*?)( \[type=.*)?$", r".*?error: (.*)", r"(?:\w*Error|\w*Exception): (.*)"):
        for line in lines:
            if found := re.match(pattern, line):
                return found[1][:300]
    return lines[-1][:300]


def served_model(client):
    """The first model that the server of this `openai.OpenAI` offers. Raises SystemExit(2) with one sentence where it offers none to us."""
    import openai

    try:
        return client.models.list().data[0]
    except openai.AuthenticationError:
        fail(f"the server at {client.base_url} wants an API key: set VLLM_API_KEY to the one that it was started with")
    except openai.APIError as e:
        fail(f"no server answers at {client.base_url} ({e}): start one with 'make vllm-serve'")


def start(folder: Path, dtype: str, args: dict, flags: list[str]):
    """A `vllm.LLMEngine` with these arguments, by vLLM's own names, then the user's `flags`, of which the last one counts."""
    need_vllm()
    from vllm import EngineArgs, LLMEngine
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    print("  vllm: starting the engine", flush=True)
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", str(folder), "--dtype", dtype, *words(args), *flags])
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(parsed))


def drive(engine, requests: list, window: int = 0) -> tuple[float, list[Timing], list[tuple[float, int]]]:
    """Serve `requests`, pairs of a prompt and `SamplingParams`, all at once or with at most `window` in flight.

    Returns seconds, the requests' timings, and after each step (seconds, requests that hold a place in the KV cache).
    """
    timings: list[Timing] = []
    held: list[tuple[float, int]] = []
    finished = 0
    began = reported = time.perf_counter()
    while finished < len(requests):
        while len(timings) < len(requests) and (not window or len(timings) - finished < window):
            prompt, params = requests[len(timings)]
            engine.add_request(str(len(timings)), prompt, params)
            timings.append(Timing(time.perf_counter() - began))
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            timing = timings[int(output.request_id)]
            timing.first, timing.last, timing.tokens = timing.first or now, now, output.outputs[0].token_ids
            finished += output.finished
        held.append((now, sum(bool(t.first) for t in timings) - finished))
        if now + began - reported > 5:
            reported = now + began
            print(f"  {now:4.0f} s  {finished} of {len(requests)} requests", flush=True)
    return time.perf_counter() - began, timings, held


def counters(engine) -> dict[str, float]:
    """vLLM's own counters and gauges by name, without the `vllm:` before it."""
    return {m.name.removeprefix("vllm:"): m.value for m in engine.get_metrics() if hasattr(m, "value")}


def warm_up(engine) -> None:
    """A few tokens, so that nothing is compiled while the clock runs."""
    from vllm import SamplingParams

    drive(engine, [("warm up", SamplingParams(max_tokens=4, ignore_eos=True))] * 4)


def stop(engine) -> None:
    """End the engine's processes before the last line of stdout: it logs while it stops."""
    engine.engine_core.shutdown()
