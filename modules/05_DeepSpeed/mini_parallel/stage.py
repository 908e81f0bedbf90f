"""What a process of a pipeline has: some layers, and a line to the stage before and behind."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Stage(nn.Module):
    """Some of a decoder's layers; the first stage also embeds, the last one has norm and head."""

    def __init__(self, model: nn.Module, stage: int, stages: int):
        super().__init__()
        decoder = model.get_decoder()
        each, left = divmod(len(decoder.layers), stages)
        if left:
            raise ValueError(f"{len(decoder.layers)} layers are not divided by {stages} stages")
        begin = stage * each
        self.layers = decoder.layers[begin : begin + each]
        self.rotary_emb = decoder.rotary_emb
        self.first = stage == 0
        self.last = stage == stages - 1
        if self.first:
            self.embed_tokens = decoder.embed_tokens
        if self.last:
            self.norm = decoder.norm
            self.lm_head = model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [micro_batch, seq] or hidden [.., .., hidden] -> hidden, or logits at last."""
        positions = torch.arange(x.shape[1], device=x.device)
        if self.first:
            x = self.embed_tokens(x)
        rotary = self.rotary_emb(x, positions[None])
        for layer in self.layers:
            x = layer(x, position_embeddings=rotary)
        if self.last:
            x = self.lm_head(self.norm(x))
        return x

    def tied_weight(self) -> nn.Parameter | None:
        """What the first stage and the last both have, if lm_head is the embedding."""
        if self.first:
            return self.embed_tokens.weight
        return self.lm_head.weight if self.last else None


class Line:
    """Messages of one shape [micro_batch, seq, hidden] in one direction, as a group of their own.

    On a GPU the messages of a group go one after another: in one group, a stage that sends down
    while the next one sends up would wait for ever.
    """

    def __init__(self):
        self.group = dist.new_group()
        self.under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Without waiting; what has gone is let go of at the next message."""
        self.under_way = [each for each in self.under_way if not each[0].is_completed()]
        tensor = tensor.contiguous()
        work = dist.isend(tensor, to, group=self.group)
        self.under_way.append((work, tensor))

    def receive(self, like: Tensor, source: int) -> Tensor:
        arriving = torch.empty_like(like)
        work = dist.irecv(arriving, source, group=self.group)
        work.wait()
        return arriving

    def wait(self) -> None:
        for work, _ in self.under_way:
            work.wait()
        self.under_way.clear()
