"""A small vLLM under the real engine's names (its tutorial: build_one.md).

What it refuses, it refuses by a ValueError with one sentence.
"""

from mini_vllm.llm import LLM
from mini_vllm.sequence import SamplingParams

__all__ = ["LLM", "SamplingParams"]
