r"""What Accelerate really does, seen from two processes: one JSON object, printed by the first.

accelerate launch --config_file YAML accelerate_traps.py     # the YAML: ddp.yaml and a line
                                                             # gradient_accumulation_steps: 4
"""

import gc
import json

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    gather_object,
)
from torch.utils.data import DataLoader, IterableDataset


def fresh(**settings) -> Accelerator:
    """A new Accelerator of this process, which otherwise shares its state with the last one."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(**settings)


def accumulation() -> dict:
    """The number in code, against the launcher's."""
    plugin = GradientAccumulationPlugin(num_steps=1)
    return {
        "given as a number": fresh(gradient_accumulation_steps=1).gradient_accumulation_steps,
        "given by the plugin": fresh(
            gradient_accumulation_plugin=plugin
        ).gradient_accumulation_steps,
    }


def scheduler_steps(micro_steps: int, prepared: bool, **settings) -> int:
    """How far the scheduler is after three optimizer steps of so many micro-steps."""
    plugin = GradientAccumulationPlugin(num_steps=micro_steps)
    accelerator = fresh(gradient_accumulation_plugin=plugin, **settings)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    wrapped = accelerator.prepare(scheduler) if prepared else scheduler
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(3):
        for _ in range(micro_steps):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(2, 4)).sum())
                optimizer.step()
                if prepared:  # as Accelerate's documents write it: in every micro-step
                    wrapped.step()
                optimizer.zero_grad()
        if not prepared:
            wrapped.step()
    return scheduler.last_epoch


def clipped_before_sync() -> dict:
    """The gradient's norm that each process sees in the first and in the last micro-step."""
    accelerator = fresh(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2))
    torch.manual_seed(0)
    model = accelerator.prepare(torch.nn.Linear(4, 1))
    own = torch.full((2, 4), 1.0 + accelerator.process_index)
    norms = []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(own).sum())
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 1e9).item())
    return {"first": gather_object([norms[0]]), "last": gather_object([norms[1]])}


class WithoutLength(IterableDataset):
    def __iter__(self):
        yield from torch.arange(9)


def gathered() -> dict:
    """9 rows in batches of 2: what gather_for_metrics leaves of rows, means, other data sets."""
    accelerator = fresh()
    kept = dict.fromkeys(("rows", "gathered", "means", "dispatched", "without length"), 0)
    for batch in accelerator.prepare(DataLoader(torch.arange(9), batch_size=2)):
        kept["rows"] += len(accelerator.gather_for_metrics(batch))
        kept["gathered"] += len(accelerator.gather(batch))
        mean = batch.float().mean()[None]  # [1]: no longer one number a row
        kept["means"] += len(accelerator.gather_for_metrics(mean))
    for dispatched in (True, False):
        settings = DataLoaderConfiguration(dispatch_batches=dispatched)
        accelerator = fresh(dataloader_config=settings)
        name = "dispatched" if dispatched else "without length"
        for batch in accelerator.prepare(DataLoader(WithoutLength(), batch_size=2)):
            kept[name] += len(accelerator.gather_for_metrics(batch))
    return kept


def uneven() -> list:
    """How many batches each process gets of 9 rows where nothing is repeated."""
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(even_batches=False))
    loader = accelerator.prepare(DataLoader(torch.arange(9), batch_size=2))
    return gather_object([[len(batch) for batch in loader]])


def split() -> list:
    """The rows of a batch of 4 in each process where batches are split."""
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(split_batches=True))
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=4))
    return gather_object([[len(batch) for batch in loader]])


def orders(disturbed: bool, **settings) -> list:
    """The rows that all processes read in the first two epochs, sorted into the order read."""
    torch.manual_seed(0)
    accelerator = fresh(dataloader_config=DataLoaderConfiguration(**settings))
    if disturbed:
        torch.rand(1)  # such as another layer of the model
    loader = accelerator.prepare(DataLoader(torch.arange(8), batch_size=2, shuffle=True))
    epochs = []
    for _ in range(2):
        batches = [accelerator.gather(batch).tolist() for batch in loader]
        epochs.append([row for batch in batches for row in batch])
    return epochs


def early_ends(**settings) -> list:
    """sync_gradients in each micro-step of two steps whose batches were fetched beforehand."""
    accelerator = fresh(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, **settings)
    )
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    loader = iter(accelerator.prepare(DataLoader(torch.ones(8, 1), batch_size=1)))
    synced = []
    for _ in range(2):
        for _ in [next(loader), next(loader)]:
            with accelerator.accumulate(model):
                synced.append(accelerator.sync_gradients)
    return synced


def trackers() -> list:
    """Which trackers are there where one was asked for that is not installed."""
    accelerator = fresh(log_with="aim", project_dir="nowhere")
    accelerator.init_trackers("name")
    return [tracker.name for tracker in accelerator.trackers]


def main() -> None:
    observed = {
        "accumulation": accumulation(),
        "scheduler prepared": scheduler_steps(1, True),
        "scheduler prepared, accumulated": scheduler_steps(2, True),
        "scheduler prepared, split batches": scheduler_steps(
            1, True, dataloader_config=DataLoaderConfiguration(split_batches=True)
        ),
        "scheduler outside": scheduler_steps(2, False),
        "clipped": clipped_before_sync(),
        "gathered": gathered(),
        "uneven": uneven(),
        "split": split(),
        "orders": [orders(False), orders(True)],
        "seeded orders": [
            orders(disturbed, use_seedable_sampler=True, data_seed=1) for disturbed in (False, True)
        ],
        "early ends": early_ends(),
        "no early ends": early_ends(sync_with_dataloader=False),
        "trackers": trackers(),
    }
    accelerator = fresh()
    if accelerator.is_main_process:
        print(json.dumps({"script": "accelerate_traps", **observed}), flush=True)
    gc.collect()  # models before the process group
    accelerator.end_training()


main()
