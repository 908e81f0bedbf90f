"""mini_zero's stages, saved by some processes and gone on with by others: {stage: losses}.

zero_resume.py save FOLDER    trains two steps, saves, trains two more
zero_resume.py load FOLDER    loads, trains the two more; on any number of processes
Run by in_processes.py.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "modules/05_DeepSpeed"))
from mini_zero import Engine

what, folder = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
world = dist.get_world_size()
config = Qwen3Config(
    vocab_size=130,
    hidden_size=36,
    intermediate_size=76,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
generator = torch.Generator().manual_seed(0)
steps = torch.randint(130, (4, 6, 16), generator=generator)  # [steps, rows, length]


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for rows in steps[first:last]:
        batch = rows[rank::world]
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def by_stage(stage: int) -> list[float]:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).train()
    engine = Engine(model, stage, 1e-2, layers=list(model.model.layers), bucket_size=9_000)
    state = Path(folder, str(stage))
    if what == "load":
        engine.load_checkpoint(state)
        return train(engine, 2, 4)
    train(engine, 0, 2)
    if rank == 0:
        state.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(state)
    return train(engine, 2, 4)


losses = {f"stage {stage}": by_stage(stage) for stage in range(4)}
if rank == 0:
    print(json.dumps(losses))
dist.destroy_process_group()
