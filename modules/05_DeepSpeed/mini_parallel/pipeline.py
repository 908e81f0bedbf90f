"""A pipeline: the layers divided over processes.

    stage 0   embedding, layers 0 1   --- activations [micro_batch, seq, hidden] -->   stage 1
    stage 1   layers 2 3, norm, lm_head   --- their gradients, the same shape -->      stage 0

With more processes than stages there are several replicas of the pipeline, each with its own share
of the batch (data parallelism): process = replica * stages + stage.

The trap: a model whose lm_head is its embedding (tied weights) has that matrix twice now, in the
first stage and in the last. Each sees half of the gradient, so both must have the sum.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mini_parallel.gradients import all_reduce_gradients
from mini_parallel.schedule import SCHEDULES, Action
from mini_parallel.stage import Line, Stage


class Pipeline:
    """`stages` processes in a row, and as many such rows (replicas) as there are processes for.

    `actions`: what this stage did in the last step, in order. `most_kept`: the most micro-batches
    whose activations lay here at the same time.
    """

    def __init__(self, model: nn.Module, stages: int, micro_batches: int, schedule: str = "1f1b"):
        self.rank = dist.get_rank()
        self.replicas = dist.get_world_size() // stages
        self.replica = self.rank // stages
        self.stage = self.rank % stages
        self.stages = stages
        self.micro_batches = micro_batches
        self.schedule = SCHEDULES[schedule]
        self.hidden_size = model.config.hidden_size
        self.module = Stage(model, self.stage, stages)
        self.most_kept = 0
        # Every process makes all groups, its own or not, and in the same order.
        self.down = Line()
        self.up = Line()
        begins = [replica * stages for replica in range(self.replicas)]
        same_stage = [[begin + stage for begin in begins] for stage in range(stages)]
        self.of_stage, _ = dist.new_subgroups_by_enumeration(same_stage)
        ends = [[begin, begin + stages - 1] for begin in begins]
        self.of_ends, _ = dist.new_subgroups_by_enumeration(ends)
        self.tied = None
        if model.config.tie_word_embeddings:
            self.tied = self.module.tied_weight()

    def forward_backward(self, input_ids: Tensor) -> Tensor:
        """A step without its update. input_ids [batch, seq] -> this process's share of the loss."""
        mine = input_ids.chunk(self.replicas)[self.replica]
        self.micro = mine.chunk(self.micro_batches)  # each [micro_batch, seq]
        self.kept: dict[int, tuple] = {}  # micro-batch -> what arrived, what was made of it
        self.actions: list[Action] = []
        self.loss = torch.zeros((), device=input_ids.device)
        for kind, i in self.schedule(self.stage, self.stages, self.micro_batches):
            if kind == "F":
                self.forward(i)
            else:
                self.backward(i)
            self.actions.append((kind, i))
        self.down.wait()
        self.up.wait()
        self.reduce_gradients()
        return self.loss / self.replicas

    def forward(self, i: int) -> None:
        ids = self.micro[i]
        if self.module.first:
            arrived = ids
        else:
            like = torch.empty(*ids.shape, self.hidden_size, device=ids.device)
            arrived = self.down.receive(like, self.rank - 1)
            arrived.requires_grad_()
        made = self.module(arrived)
        if self.module.last:
            logits = made[:, :-1].flatten(0, 1)
            labels = ids[:, 1:].flatten()
            made = F.cross_entropy(logits, labels) / self.micro_batches
            self.loss += made.detach()
        else:
            self.down.send(made.detach(), self.rank + 1)
        self.kept[i] = (arrived, made)
        self.most_kept = max(self.most_kept, len(self.kept))

    def backward(self, i: int) -> None:
        arrived, made = self.kept.pop(i)
        if self.module.last:
            made.backward()
        else:
            gradient = self.up.receive(made, self.rank + 1)
            made.backward(gradient)
        if not self.module.first:
            self.up.send(arrived.grad, self.rank - 1)

    def reduce_gradients(self) -> None:
        """The tied matrix of both ends, then the mean over the replicas."""
        if self.tied is not None:
            all_reduce_gradients([self.tied], group=self.of_ends)
        if self.replicas > 1:
            weights = self.module.parameters()
            all_reduce_gradients(weights, 1 / self.replicas, self.of_stage)
