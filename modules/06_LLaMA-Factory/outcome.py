"""What a training of LLaMA-Factory came to, read from the files that the engines wrote."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import checkpoints


class Outcome(NamedTuple):
    losses: list[float]  # of every `logging_steps` steps
    steps: int
    planned_steps: int  # more than `steps`: it ended early
    seconds: float  # of the training itself, without loading
    processes: int
    zero_stage: int  # 0: no DeepSpeed, or one that divides nothing
    is_fsdp: bool
    trained_parameters: int
    tokens_per_s: float  # of all processes, without padding; without the first logged steps
    peak_gib: float  # the most a GPU held, of process 0; on a CPU 0: nobody records it
    eval_losses: list[float]  # on rows kept apart, every `eval_steps` steps
    best_step: int | None  # of the lowest of them

    def stopped_by_itself(self, patience: int | None) -> bool:
        """Whether early stopping ended it: `patience` evaluations in a row, none of them better."""
        if not patience or not self.eval_losses:
            return False
        since_best = len(self.eval_losses) - 1 - self.eval_losses.index(min(self.eval_losses))
        return since_best >= patience


def zero_stage(checkpoint: Path) -> int:
    """The ZeRO stage of the DeepSpeed engine that wrote `checkpoint`.

    Beside the model the engine keeps the settings that it ran with. `weights_only` loads data and
    runs no code; `mmap` leaves the weights on the disk.
    """
    import torch

    file = next(checkpoint.rglob("*model_states.pt"))
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return int(state["ds_config"].get("zero_optimization", {}).get("stage", 0))


def tokens_per_s(entries: list[dict]) -> float:
    """Tokens a second between the first and the last entry: the first steps warm up."""
    timed = [entry for entry in entries if "loss" in entry and "num_input_tokens_seen" in entry]
    if not timed:
        return 0.0
    first = timed[0] if len(timed) > 1 else {"num_input_tokens_seen": 0, "train_runtime": 0.0}
    tokens = timed[-1]["num_input_tokens_seen"] - first["num_input_tokens_seen"]
    return round(tokens / (timed[-1]["train_runtime"] - first["train_runtime"]), 1)


def read(output: Path, log: Path) -> Outcome:
    """The outcome of the training that wrote to `output`, and of no other one.

    `log` is what its engine printed.
    """
    history = json.loads((output / "trainer_state.json").read_text())
    final = json.loads((output / "all_results.json").read_text())
    losses = [entry["loss"] for entry in history["log_history"] if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in history["log_history"] if "eval_loss" in entry]
    # The last one: after early stopping nothing has to be saved at the last step.
    checkpoint = next(iter(checkpoints.numbered(output)), output / "none")
    written = [file.name for file in checkpoint.rglob("*.pt*")]
    # A running DeepSpeed leaves one of each process, which no other engine does.
    shards = [name for name in written if name.endswith("_optim_states.pt")]
    random_states = [name for name in written if name.startswith("rng_state")]
    counted = re.search(r"trainable params: ([\d,]+)", log.read_text(errors="replace"))
    # callbacks.py of LLaMA-Factory writes GiB where RECORD_VRAM=1 asks for them
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    peaks = [json.loads(line).get("vram_allocated", 0.0) for line in lines]
    return Outcome(
        losses or [final["train_loss"]],
        steps=history["global_step"],
        planned_steps=history["max_steps"],
        seconds=final["train_runtime"],
        processes=len(shards or random_states),
        zero_stage=zero_stage(checkpoint) if shards else 0,
        is_fsdp=any(checkpoint.glob("pytorch_model_fsdp*")),
        trained_parameters=int(counted[1].replace(",", "")) if counted else 0,
        tokens_per_s=tokens_per_s(history["log_history"]),
        peak_gib=max(peaks, default=0.0),
        eval_losses=evaluated,
        best_step=history.get("best_global_step") if evaluated else None,
    )
