"""Stand-in for vLLM in a script's own process: its start is where the script ends.

The engine's arguments are checked.
"""

import fake_road


class SamplingParams:
    def __init__(self, **_):
        pass


class EngineArgs:
    @staticmethod
    def add_cli_args(parser):
        return parser

    @staticmethod
    def from_cli_args(args):
        return args


class LLMEngine:
    @staticmethod
    def from_engine_args(_):
        fake_road.reached("vLLM's engine")


def __getattr__(name: str):
    if not name.startswith("__"):
        fake_road.reached(f"vllm.{name}")
    raise AttributeError(name)
