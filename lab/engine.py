"""vLLM as the scripts share it.

Its arguments as a command line, what its server offers, why it stopped, and its engine in this
process. modules/03_vllm/closed_loop.py drives that engine step by step.
"""

import argparse
import re
from pathlib import Path

from lab import fail
from lab.profile import need_vllm

# What vLLM writes before a message: which process, then level, date, time, file and line.
PROCESS = r"(\((?:APIServer|EngineCore|Worker)\S* pid=\d+\) )?"
STAMP = r"(?:(?:INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^]]+\] ?)?"
OF_MAKE = r"^make(\[\d+\])?: .*$"  # of a target that failed: only that it did
REASONS = (
    r"Value error, (.*?)( \[type=.*)?$",  # a setting that vLLM refuses
    r".*?error: (.*)",  # a flag that its parser refuses
    r"(?:\w*Error|\w*Exception): (.*)",
)


def words(args: dict) -> list[str]:
    """vLLM's command line for arguments by its own names.

    {"enforce-eager": True, "port": 8000} is --enforce-eager --port 8000.
    """
    line = []
    for name, value in args.items():
        line.append(f"--{name}")
        if value is not True:
            line.append(str(value))
    return line


def cards_filled(command: list[str]) -> int:
    """How many GPUs the engine with this command line fills: the first ones that it sees."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    sizes, _ = parser.parse_known_args(command)
    return sizes.tensor_parallel_size * sizes.pipeline_parallel_size


def add_address_flag(parser: argparse.ArgumentParser, profile) -> None:
    """--address, of the server that `make vllm-serve` starts under this profile."""
    parser.add_argument(
        "--address",
        default=f"http://127.0.0.1:{profile.serve.port}",
        help="the server (default: %(default)s)",
    )


def cause(log: Path) -> str:
    """Why the engine stopped: a refused setting, else its first exception, else the last line."""
    text = log.read_text(errors="replace")
    text = re.sub(f"^{PROCESS}{STAMP}", "", text, flags=re.M)
    text = re.sub(OF_MAKE, "", text, flags=re.M)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for reason in REASONS:
        for line in lines:
            if match := re.match(reason, line):
                return match[1][:300]
    return lines[-1][:300] if lines else "it wrote nothing"


def served_model(client):
    """The first model that the server of this `openai.OpenAI` offers.

    Raises SystemExit(2) with one sentence where it offers none to us.
    """
    import openai

    try:
        return client.models.list().data[0]
    except openai.AuthenticationError:
        way_out = "set VLLM_API_KEY to the one that it was started with"
        fail(f"the server at {client.base_url} wants an API key: {way_out}")
    except openai.APIError as e:
        fail(f"no server answers at {client.base_url} ({e}): start one with 'make vllm-serve'")


def start(folder: Path, dtype: str, args: dict, flags: list[str]):
    """A `vllm.LLMEngine` with these arguments, by vLLM's own names, then the user's `flags`.

    Of a flag that is there twice the last one counts.
    """
    need_vllm()
    from vllm import EngineArgs, LLMEngine
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    print("  vllm: starting the engine", flush=True)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parsed = parser.parse_args(["--model", str(folder), "--dtype", dtype, *words(args), *flags])
    return LLMEngine.from_engine_args(EngineArgs.from_cli_args(parsed))


def counters(engine) -> dict[str, float]:
    """vLLM's own counters and gauges by name, without the `vllm:` before it."""
    single = [metric for metric in engine.get_metrics() if hasattr(metric, "value")]
    return {metric.name.removeprefix("vllm:"): metric.value for metric in single}


def stop(engine) -> None:
    """End the engine's processes before the last line of stdout: it logs while it stops."""
    engine.engine_core.shutdown()
