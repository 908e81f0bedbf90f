"""A small vLLM: the real engine's parts under the real engine's names, tested for the same greedy tokens (readme, section 8).

What it refuses, such as an architecture it does not compute or a request that could never fit, raises ValueError with one sentence.
"""

from mini_vllm.llm import LLM
from mini_vllm.sequence import SamplingParams

__all__ = ["LLM", "SamplingParams"]
