"""Mixed precision: the same steps in float32 and in bfloat16 autocast, what changes and what does not.

    python modules/04_Accelerate/03_mixed_precision.py                             # make train-mixed
    python modules/04_Accelerate/03_mixed_precision.py --precisions no bf16 fp16   # fp16 wants a GPU

Look at: the types. Under autocast the matrix products are computed in bf16, but parameters, gradients and optimizer states stay in
float32 (the master weights), so that small updates add up. `update lost` is the share of the weights that round to the same bf16 number
before and after the first optimizer step: the bf16 products do not see that part of the update until it has grown over several
steps, and the losses of the first steps fall behind those of float32.
Whether bf16 is faster depends on the machine: a 4090 has tensor cores for it, on a CPU it can be slower.
"""

import argparse
import time

from lab import data, fail, jobs, models, results
from lab.profile import load_profile


def train(precision: str, folder, blocks, args) -> dict:
    """A few steps in one precision. Returns types, losses, seconds of each step, bytes kept for the backward pass."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM

    # -----------------------------------------------------------------------------
    # 1. The one line that differs

    AcceleratorState._reset_state(reset_partial_state=True)  # a program has one precision; this one compares several
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:
        fail(f"Accelerate leaves {precision} out on a {accelerator.device.type}, without a word, and computes in float32: choose bf16 or no")
    if precision == "bf16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail(f"{torch.cuda.get_device_name()} does not compute in bf16: choose fp16 or no")
    device = accelerator.device
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)

    # -----------------------------------------------------------------------------
    # 2. Look inside: the output of a matrix product, of a norm, and every tensor that the backward pass will need

    layer, types, kept = model.model.layers[0], {}, {}
    layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: types.update({"matrix product": out.dtype}))
    layer.input_layernorm.register_forward_hook(lambda _, __, out: types.update({"first norm": out.dtype}))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # -----------------------------------------------------------------------------
    # 3. Train

    losses, seconds = [], []
    before = layer.mlp.up_proj.weight.detach().clone()
    for step in range(args.steps):
        batch = blocks[step * args.micro_batch : (step + 1) * args.micro_batch].to(device)
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep if step == 0 else lambda tensor: tensor, lambda tensor: tensor):
            out = model(input_ids=batch, labels=batch)
        accelerator.backward(out.loss)
        types |= {"logits": out.logits.dtype, "gradients": layer.mlp.up_proj.weight.grad.dtype}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(out.loss.item(), 6))  # waits for the GPU
        seconds.append(time.perf_counter() - began)
        if step == 0:
            after = layer.mlp.up_proj.weight.detach()
            lost = (after.bfloat16() == before.bfloat16()).float().mean().item()

    state = next(value for value in optimizer.optimizer.state.values() if value)
    types |= {"parameters": next(model.parameters()).dtype, "optimizer states": state["exp_avg"].dtype}
    seen = {name: str(dtype).removeprefix("torch.") for name, dtype in types.items()}
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off the model: both are judged in float32
    batch = blocks[args.steps * args.micro_batch :][: args.micro_batch].to(device)  # the next one, which none has trained on
    with torch.no_grad():
        judged = model(input_ids=batch, labels=batch).loss.item()
    steady = seconds[1:] or seconds  # the first step warms up
    return {"types": seen, "losses": losses, "judged": judged, "step_s": sum(steady) / len(steady), "kept_gib": sum(kept.values()) / 2**30, "lost": lost}


def main() -> None:
    profile = load_profile()
    p = profile.train
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--data", default=p.data, help="data set, or a .json file of chat rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in each precision (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=p.micro_batch, help="blocks of a step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=p.seq_len, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=p.learning_rate, help="constant (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16", "fp16"), default=["no", "bf16"], help="the first is the yardstick")
    args = parser.parse_args()
    if min(args.steps, args.micro_batch) < 1 or args.seq_len < 2 or args.learning_rate <= 0:
        fail("--steps, --micro-batch and --learning-rate must be positive, --seq-len at least 2")

    from transformers import AutoTokenizer

    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    if len(blocks) < (args.steps + 1) * args.micro_batch:
        fail(f"{args.steps} steps and a judgement need {(args.steps + 1) * args.micro_batch} blocks, {args.data} has {len(blocks)}: lower --steps or --micro-batch")
    runs = {}
    for precision in args.precisions:
        runs[precision] = train(precision, folder, blocks, args)
        print(f"{precision:4}   losses {runs[precision]['losses']}", flush=True)

    # -----------------------------------------------------------------------------
    # 4. Side by side

    first = runs[args.precisions[0]]
    print(f"\n{'mixed_precision':20}" + "".join(f"{precision:>12}" for precision in runs))
    for name in ("parameters", "gradients", "optimizer states", "matrix product", "first norm", "logits"):
        print(f"{name:20}" + "".join(f"{run['types'][name]:>12}" for run in runs.values()))
    differences = {q: max(abs(a - b) / abs(b) for a, b in zip(run["losses"], first["losses"], strict=True)) for q, run in runs.items()}
    print(f"{'loss difference':20}" + "".join(f"{difference:12.1e}" for difference in differences.values()))
    print(f"{'judged in fp32':20}" + "".join(f"{run['judged']:12.4f}" for run in runs.values()))
    print(f"{'seconds a step':20}" + "".join(f"{run['step_s']:12.2f}" for run in runs.values()))
    print(f"{'kept for backward':20}" + "".join(f"{run['kept_gib']:8.2f} GiB" for run in runs.values()))
    print(f"\nupdate lost: {first['lost']:.0%} of a layer's weights are the same bf16 number before and after the first step")
    metrics = {"update_lost_ratio": round(first["lost"], 3)}
    for precision, run in runs.items():
        name = "fp32" if precision == "no" else precision
        metrics |= {f"{name}_step_s": round(run["step_s"], 3), f"{name}_kept_gib": round(run["kept_gib"], 3)}
        metrics |= {f"{name}_loss_difference_ratio": float(f"{differences[precision]:.2g}"), f"{name}_product": run["types"]["matrix product"]}
        metrics |= {f"{name}_judged_difference_ratio": float(f"{abs(run['judged'] - first['judged']) / first['judged']:.2g}")}
        metrics |= {f"{name}_parameters": run["types"]["parameters"], f"{name}_gradients": run["types"]["gradients"]}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
