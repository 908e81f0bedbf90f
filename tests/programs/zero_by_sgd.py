"""Losses of mini_zero's four stages under SGD, beside those of one process: {name: losses}.

Adam divides a gradient by its own length, so it does not see a sum where a mean belongs; SGD does.
Run as two processes by in_processes.py.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "modules/05_DeepSpeed"))
from mini_zero import Engine

STEPS = 4
ACCUMULATE = 2
RATE = 0.1

dist.init_process_group("gloo")
rank = dist.get_rank()
world = dist.get_world_size()
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
untrained = Qwen3ForCausalLM(config).train()
start = torch.randint(128, (world * ACCUMULATE, 1))
batch = (start + torch.arange(32)) % 128  # [a row for each process and micro-step, 32]


def by_stage(stage: int) -> list[float]:
    model = copy.deepcopy(untrained)
    layers = list(model.model.layers)
    sizes = {"accumulate": ACCUMULATE, "bucket_size": 20_000}
    engine = Engine(model, stage, RATE, layers=layers, optimizer=torch.optim.SGD, **sizes)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for row in batch.chunk(world)[rank].split(1):
            loss = engine(input_ids=row, labels=row).loss
            engine.backward(loss)
            total += loss.detach() / (ACCUMULATE * world)
        engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def alone() -> list[float]:
    model = copy.deepcopy(untrained)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


losses = {f"stage {stage}": by_stage(stage) for stage in range(4)}
if rank == 0:
    print(json.dumps({"one process": alone()} | losses))
dist.destroy_process_group()
