"""The other four ways to divide a training, from scratch on torch.distributed.

engine = TensorParallel(model)                     # or Pipeline, ContextParallel, ExpertParallel
share = engine.forward_backward(input_ids)         # gradients as one process would have them
optimizer.step()

schedule.py    AFAB and 1F1B: in which order a stage of a pipeline works
pipeline.py    the layers divided: activations go down the stages, their gradients come back up
stage.py       ... what a stage has, and its messages
tensor.py      every matrix divided: two all-reduces a layer forward, two backward
ring.py        the sequence divided: keys and values travel around the ring
context.py     ... and the model around that attention
experts.py     the experts divided: tokens travel to theirs and back
gradients.py   the sum of gradients, where several processes have the same parameter

Every process begins with the same whole model and keeps its part. `forward_backward` takes the
whole batch [batch, seq] and returns this process's share of the loss: the shares of all processes
add up to the loss that one process would have.
"""

from mini_parallel.context import ContextParallel
from mini_parallel.experts import ExpertParallel
from mini_parallel.pipeline import Pipeline
from mini_parallel.tensor import TensorParallel

__all__ = ["ContextParallel", "ExpertParallel", "Pipeline", "TensorParallel"]
