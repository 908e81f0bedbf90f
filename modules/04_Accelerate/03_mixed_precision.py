"""Mixed precision: the same steps in float32 and in bfloat16, what changes and what does not.

    make train-mixed
    python modules/04_Accelerate/03_mixed_precision.py --precisions no bf16 fp16   # fp16: on a GPU

Look at: the types. Under autocast the matrix products are computed in bf16, but parameters,
gradients and optimizer states stay in float32 (the master weights), so that small updates add up.
`update lost` is the share of the weights that round to the same bf16 number before and after the
first optimizer step: the bf16 products do not see that part of the update until it has grown over
several steps, and the losses of the first steps fall behind those of float32.
Whether bf16 is faster depends on the machine: a 4090 has tensor cores for it, on a CPU it can be
slower.
"""

import argparse
import time

from lab import data, fail, models, results, training
from lab.profile import load_profile
from lab.table import table


def accelerator_for(precision: str):
    """An Accelerator that computes in this precision, or the one sentence why it would not."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A program has one precision; this one compares several.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:
        fail(
            f"Accelerate leaves {precision} out on a {accelerator.device.type}, without a word, "
            "and computes in float32: choose bf16 or no"
        )
    if precision == "bf16":
        training.refuse_without_bf16(accelerator.device, "choose fp16 or no")
    return accelerator


class Inside:
    """What hooks see of a training: types on the way, and the bytes kept for the backward pass."""

    def __init__(self, model):
        self.types = {}
        self.kept = {}  # address of a tensor's memory: its bytes
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.watch(model.model.layers[0].self_attn.q_proj, "matrix product")
        self.watch(model.model.layers[0].input_layernorm, "first norm")

    def watch(self, layer, name: str) -> None:
        def keep_type(_, __, output):
            self.types[name] = output.dtype

        layer.register_forward_hook(keep_type)

    def keep(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def train(precision: str, folder, blocks, args) -> dict:
    """A few steps in one precision.

    Returns types, losses, seconds of each step, bytes kept for the backward pass.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # -----------------------------------------------------------------------------
    # 1. The one line that differs: Accelerator(mixed_precision=precision)

    accelerator = accelerator_for(precision)
    device = accelerator.device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    inside = Inside(model)
    watched = model.model.layers[0].mlp.up_proj.weight
    before = watched.detach().clone()

    # -----------------------------------------------------------------------------
    # 2. Train

    losses = []
    seconds = []
    lost = 0.0
    for step in range(args.steps):
        batch = blocks[step * args.micro_batch : (step + 1) * args.micro_batch]
        batch = batch.to(device)  # [micro_batch, seq_len]
        began = time.perf_counter()
        keep = inside.keep if step == 0 else torch.nn.Identity()
        with torch.autograd.graph.saved_tensors_hooks(keep, torch.nn.Identity()):
            output = model(input_ids=batch, labels=batch)
        accelerator.backward(output.loss)
        inside.types |= {"logits": output.logits.dtype, "gradients": watched.grad.dtype}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(output.loss.item(), 6))  # waits for the GPU
        seconds.append(time.perf_counter() - began)
        if step == 0:
            same = watched.detach().bfloat16() == before.bfloat16()
            lost = same.float().mean().item()

    state = next(value for value in optimizer.optimizer.state.values() if value)
    inside.types["parameters"] = next(model.parameters()).dtype
    inside.types["optimizer states"] = state["exp_avg"].dtype
    types = {name: str(kind).removeprefix("torch.") for name, kind in inside.types.items()}

    # -----------------------------------------------------------------------------
    # 3. Judge the trained weights in float32, on the next batch, which none has trained on

    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off the model
    batch = blocks[args.steps * args.micro_batch :][: args.micro_batch].to(device)
    with torch.no_grad():
        judged = model(input_ids=batch, labels=batch).loss.item()
    steady = seconds[1:] or seconds  # the first step warms up
    return {
        "types": types,
        "losses": losses,
        "judged": judged,
        "step_s": sum(steady) / len(steady),
        "kept_gib": sum(inside.kept.values()) / 2**30,
        "lost": lost,
    }


def largest_difference(losses: list[float], yardstick: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, yardstick, strict=True))


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Model and data
    training.add_data_flags(parser, profile.train)
    # Steps, the same ones in each precision
    defaults = profile.train
    training.add_flag(parser, "--steps", int, 4, "optimizer steps in each precision")
    training.add_flag(parser, "--micro-batch", int, defaults.micro_batch, "blocks of a step")
    rate = "learning rate of AdamW, the same at every step"
    training.add_flag(parser, "--learning-rate", float, defaults.learning_rate, rate)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("no", "bf16", "fp16"),
        default=["no", "bf16"],
        help="what to compare; the first is the yardstick (default: no bf16)",
    )
    args = parser.parse_args()
    training.refuse_impossible(args, profile.device)

    from transformers import AutoTokenizer

    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    needed = (args.steps + 1) * args.micro_batch
    if len(blocks) < needed:
        fail(
            f"{args.steps} steps and a judgement need {needed} blocks, {args.data} has "
            f"{len(blocks)}: lower --steps or --micro-batch"
        )
    runs = {}
    for precision in args.precisions:
        runs[precision] = train(precision, folder, blocks, args)
        print(f"{precision:4}   losses {runs[precision]['losses']}", flush=True)

    # -----------------------------------------------------------------------------
    # 4. Side by side

    first = runs[args.precisions[0]]
    differences = [largest_difference(run["losses"], first["losses"]) for run in runs.values()]
    kinds = ("parameters", "gradients", "optimizer states", "matrix product", "first norm")
    rows = [[name, *(run["types"][name] for run in runs.values())] for name in (*kinds, "logits")]
    rows += [
        ["loss difference", *(f"{difference:.1e}" for difference in differences)],
        ["judged in fp32", *(f"{run['judged']:.4f}" for run in runs.values())],
        ["seconds a step", *(f"{run['step_s']:.2f}" for run in runs.values())],
        ["kept for backward", *(f"{run['kept_gib']:.2f} GiB" for run in runs.values())],
    ]
    print()
    table(["mixed_precision", *runs], rows, indent=0)
    print(
        f"\nupdate lost: {first['lost']:.0%} of a layer's weights are the same bf16 number before "
        "and after the first step"
    )
    metrics = {"update_lost_ratio": round(first["lost"], 3)}
    for (precision, run), difference in zip(runs.items(), differences, strict=True):
        judged = abs(run["judged"] - first["judged"]) / first["judged"]
        measured = {
            "step_s": round(run["step_s"], 3),
            "kept_gib": round(run["kept_gib"], 3),
            "loss_difference_ratio": float(f"{difference:.2g}"),
            "product": run["types"]["matrix product"],
            "judged_difference_ratio": float(f"{judged:.2g}"),
            "parameters": run["types"]["parameters"],
            "gradients": run["types"]["gradients"],
        }
        name = "fp32" if precision == "no" else precision
        metrics |= {f"{name}_{key}": value for key, value in measured.items()}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
