"""Continuous batching (Orca, OSDI 2022): before every step, decide who computes how many tokens.

There is no prefill phase and no decode phase. Every sequence has tokens that are known and tokens
that are computed; a step computes some of the difference, at most `max_num_batched_tokens` over all
sequences. A decoding sequence lacks one token, a new one its whole prompt, and a long prompt is
computed in several steps beside others' decoding (chunked prefill).
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from mini_vllm.block_manager import BlockManager
from mini_vllm.sequence import Sequence


@dataclass
class Scheduler:
    block_manager: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: list = ()
    waiting: deque = field(default_factory=deque)
    running: list = field(default_factory=list)  # in order of admission
    # Steps, computed tokens, tokens that were in the cache at admission, preemptions.
    stats: Counter = field(default_factory=Counter)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: `num_scheduled_tokens` set, blocks for those held."""
        manager = self.block_manager
        budget = self.max_num_batched_tokens
        scheduled = []
        # 1. Who runs goes on. A sequence without room takes the youngest's, which may be itself.
        while len(scheduled) < len(self.running) and budget:
            seq = self.running[len(scheduled)]
            count = min(len(seq) - seq.num_computed_tokens, budget)
            if manager.allocate(seq, seq.num_computed_tokens + count):
                seq.num_scheduled_tokens = count
                budget -= count
                scheduled.append(seq)
            else:
                self.preempt(self.running.pop())
        # 2. What is left of the budget admits who waits, in order of arrival, while there is room
        # for all of its known tokens.
        while self.waiting and budget and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            prefix = manager.match(seq)
            if not manager.allocate(seq, len(seq), prefix):
                break
            seq.num_computed_tokens = len(prefix) * manager.block_size
            seq.num_scheduled_tokens = min(len(seq) - seq.num_computed_tokens, budget)
            budget -= seq.num_scheduled_tokens
            self.stats["cached_tokens"] += seq.num_computed_tokens
            self.running.append(self.waiting.popleft())
            scheduled.append(seq)
        self.stats.update(steps=1, computed_tokens=self.max_num_batched_tokens - budget)
        return scheduled

    def preempt(self, seq: Sequence):
        """Give its blocks away and let it wait at the front, to be computed again."""
        self.stats["preemptions"] += 1
        self.block_manager.deallocate(seq)
        self.waiting.appendleft(seq)

    def postprocess(self, scheduled: list[Sequence], token_ids: list[int]) -> list[Sequence]:
        """A step's `token_ids`, one for each that is computed to its end. Returns who finished."""
        tokens = iter(token_ids)
        for seq in scheduled:
            seq.num_computed_tokens += seq.num_scheduled_tokens
            self.block_manager.name_blocks(seq)
            if seq.num_computed_tokens < len(seq):
                continue  # in the middle of its prompt
            token = next(tokens)
            seq.token_ids.append(token)
            is_eos = token in self.eos_token_ids and not seq.params.ignore_eos
            if is_eos or len(seq) - seq.num_prompt_tokens >= seq.params.max_tokens:
                seq.finished = True
                self.block_manager.deallocate(seq)
        self.running = [seq for seq in self.running if not seq.finished]
        return [seq for seq in scheduled if seq.finished]

    def abort(self, seq: Sequence):
        """Forget a request that nobody wants any more, and free its blocks. Between two steps."""
        if not seq.finished:
            (self.running if seq in self.running else self.waiting).remove(seq)
            self.block_manager.deallocate(seq)
            seq.finished = True
