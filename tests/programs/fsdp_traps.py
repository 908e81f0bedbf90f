"""What Accelerate's FSDP2 does to a model, seen from two processes: one JSON object.

accelerate launch --config_file modules/04_Accelerate/configs/fsdp.yaml fsdp_traps.py MODEL
"""

import gc
import json
import sys

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM


def fresh(**settings) -> Accelerator:
    """A new Accelerator of this process, which otherwise shares its state with the last one."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState().distributed_type = DistributedType.MULTI_GPU  # on CPUs too it then shards
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
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "read": gather_object([read]),
        "held": gather_object([held]),
        "filled": filled,
    }


def frozen_type(folder: str, **settings) -> str:
    """The type of a bf16 model's frozen weights after prepare."""
    accelerator = fresh(**settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.requires_grad = "layers" not in name
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    return str(model.model.layers[0].mlp.up_proj.weight.dtype)


def gradients_held(folder: str, **settings) -> list[float]:
    """Numbers of gradients of a parameter that this process holds after each of two micro-steps.

    `unsharded` is what torch's FSDP2 keeps of what has not been reduced.
    """
    plugin = GradientAccumulationPlugin(num_steps=2, **settings)
    accelerator = fresh(gradient_accumulation_plugin=plugin)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = sum(weight.numel() for weight in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    states = [each._get_fsdp_state() for each in model.modules() if isinstance(each, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group]
    divided = [each for group in groups for each in group.fsdp_params]
    held = []
    for _ in range(2):
        batch = torch.arange(8)[None].to(accelerator.device)
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
        whole = [each._unsharded_param.grad for each in divided]
        whole += [each.unsharded_accumulated_grad for each in divided]
        parts = [each.sharded_param.grad for each in divided]
        held.append(sum(local(grad) for grad in whole + parts if grad is not None) / parameters)
    return held


def main() -> None:
    folder = sys.argv[1]
    observed = {
        "loading": loaded_and_divided(folder),
        "frozen": frozen_type(folder, mixed_precision="bf16"),
        "frozen in pure bf16": frozen_type(folder),
        "gradients": gradients_held(folder),
        "gradients reduced at once": gradients_held(folder, sync_each_batch=True),
    }
    accelerator = fresh()
    if accelerator.is_main_process:
        print(json.dumps({"script": "fsdp_traps", **observed}), flush=True)
    gc.collect()  # models before the process group
    accelerator.end_training()


main()
