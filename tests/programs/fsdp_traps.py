"""What Accelerate's FSDP2 does to a model, seen from two processes: one JSON object.

accelerate launch --config_file modules/04_Accelerate/configs/fsdp.yaml fsdp_traps.py MODEL
"""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lab import training


def fresh(**settings) -> Accelerator:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return Accelerator(**settings)


def local(tensor: torch.Tensor) -> int:
    """How many numbers of a tensor this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def loaded_and_divided(folder: str) -> dict:
    """Numbers of each process: not zero after loading, held after prepare."""
    accelerator = fresh()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read = sum(weight.count_nonzero().item() for weight in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    held = sum(local(weight) for weight in model.parameters())
    filled = sum(weight.to_local().count_nonzero().item() for weight in model.parameters())
    return {"read": gather_object([read]), "held": gather_object([held]), "filled": filled}


def frozen_types(folder: str) -> dict:
    """Types of a bf16 model's frozen weights before and after prepare under mixed precision."""
    accelerator = fresh(mixed_precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.requires_grad = "lm_head" in name or "embed" in name
    before = str(model.model.layers[0].mlp.up_proj.weight.dtype)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    return {"before": before, "after": str(model.model.layers[0].mlp.up_proj.weight.dtype)}


def whole_gradients(folder: str) -> dict:
    """Numbers of gradients that a process holds after a micro-step that waits, and after the last.

    `unsharded_accumulated_grad` is where torch's FSDP2 keeps what has not been reduced.
    """
    accelerator = fresh(gradient_accumulation_steps=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(weight.numel() for weight in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    groups = [
        each._get_fsdp_state()._fsdp_param_group
        for each in model.modules()
        if hasattr(each, "_get_fsdp_state")
    ]
    held = []
    for _ in range(2):
        batch = torch.arange(8)[None].to(accelerator.device)
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
        kept = [
            each.unsharded_accumulated_grad
            for group in groups
            if group
            for each in group.fsdp_params
        ]
        whole = sum(grad.numel() for grad in kept if grad is not None)
        shards = sum(local(each.grad) for each in model.parameters() if each.grad is not None)
        held.append(whole + shards)
    return {"parameters": parameters, "waiting": held[0], "last": held[1]}


def main() -> None:
    training.keep_fsdp_on_cpu("cuda" if torch.cuda.is_available() else "cpu")
    folder = sys.argv[1]
    observed = {
        "loading": loaded_and_divided(folder),
        "frozen": frozen_types(folder),
        "gradients": whole_gradients(folder),
    }
    accelerator = fresh()
    if accelerator.is_main_process:
        print(json.dumps({"script": "fsdp_traps", **observed}), flush=True)
    accelerator.end_training()


main()
