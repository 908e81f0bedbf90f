"""One request: its tokens, the blocks that hold its keys and values, how far it is computed."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens (temperature 0: the likeliest) and when to stop."""

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None  # makes the draws of this request repeatable
    ignore_eos: bool = False

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "max_tokens must be positive, temperature at least 0, top_p above 0 and at most 1"
            )


@dataclass(eq=False)  # two requests with the same tokens are still two
class Sequence:
    token_ids: list[int]  # of the prompt, then the generated ones
    num_prompt_tokens: int
    params: SamplingParams = SamplingParams()
    num_computed_tokens: int = 0  # their keys and values are in the cache
    num_scheduled_tokens: int = 0  # will be computed in this step
    # Tokens [i * block_size, (i + 1) * block_size) are in block block_table[i].
    block_table: list[int] = field(default_factory=list)
    # Names of its full blocks: tokens are only appended, so these stay right.
    block_hashes: list[bytes] = field(default_factory=list)
    finished: bool = False

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
