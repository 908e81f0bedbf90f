"""A small ZeRO, from scratch on torch.distributed: what DeepSpeed's stages 0 to 3 do, and no more.

engine = Engine(model, stage=2, learning_rate=1e-3)
loss = engine(input_ids=ids, labels=ids).loss
engine.backward(loss)
engine.step()

unit.py        some parameters as one vector, of which each process owns a part
zero12.py      stages 0 to 2: the model is whole, gradients and optimizer are divided
zero3.py       stage 3: the parameters too; a layer is gathered when it is needed
checkpoint.py  states in files, for any number of processes
engine.py      forward, backward, accumulate, step
traffic.py     counts what the processes send each other
"""

from mini_zero.engine import Engine

__all__ = ["Engine"]
