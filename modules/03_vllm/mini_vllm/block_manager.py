"""The paged KV cache's bookkeeping: no tensors here, only block numbers.

PagedAttention: arXiv 2309.06180. A block holds the keys and values of `block_size` tokens of one
sequence. A full block is named by a hash of its tokens and of the block before it, so that equal
names mean equal tokens from the start: a new sequence that starts with the same shares it. A block
of nobody keeps contents and name until the room is needed; the longest unused goes first (LRU).
"""

from array import array
from collections import OrderedDict
from hashlib import sha256

from mini_vllm.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks  # how many sequences hold the block
        self.names = [None] * num_blocks
        self.cached = {}  # name -> block
        self.free = OrderedDict.fromkeys(range(num_blocks))  # of nobody, the longest unused first

    def hashes(self, seq: Sequence) -> list[bytes]:
        """Names of the sequence's full blocks, each chained to the one before."""
        size = self.block_size
        names = seq.block_hashes
        for i in range(len(names), len(seq) // size):
            start = i * size
            tokens = array("q", seq.token_ids[start : start + size]).tobytes()
            before = names[-1] if names else b""
            names.append(sha256(before + tokens).digest())
        return names

    def match(self, seq: Sequence) -> list[int]:
        """Cached blocks with the beginning of `seq`."""
        # At least one token is left to compute: its logits choose the next.
        names = self.hashes(seq)[: (len(seq) - 1) // self.block_size]
        blocks = []
        for name in names:
            if name not in self.cached:
                break
            blocks.append(self.cached[name])
        return blocks

    def allocate(self, seq: Sequence, num_tokens: int, prefix=()) -> bool:
        """Let `seq` hold blocks for `num_tokens` tokens, `prefix` first. False without room."""
        needed = -(-num_tokens // self.block_size)
        new = needed - len(seq.block_table) - len(prefix)
        free_in_prefix = sum(self.ref_counts[block] == 0 for block in prefix)
        if new > len(self.free) - free_in_prefix:
            return False
        for block in prefix:
            self.ref_counts[block] += 1
            self.free.pop(block, None)
        seq.block_table += prefix
        for _ in range(new):
            block, _ = self.free.popitem(last=False)
            self.cached.pop(self.names[block], None)  # evicted: it is about to be overwritten
            self.names[block] = None
            self.ref_counts[block] = 1
            seq.block_table.append(block)
        return True

    def name_blocks(self, seq: Sequence):
        """Offer the blocks that have just been filled to later sequences."""
        first = (seq.num_computed_tokens - seq.num_scheduled_tokens) // self.block_size
        for i in range(first, seq.num_computed_tokens // self.block_size):
            name = self.hashes(seq)[i]
            block = seq.block_table[i]
            if self.cached.setdefault(name, block) == block:  # else another holds the same
                self.names[block] = name

    def deallocate(self, seq: Sequence):
        """Take all blocks from `seq`, the last first: others gain more by a beginning."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free[block] = None
        seq.block_table.clear()
        seq.num_computed_tokens = 0
