"""What makes a step of full fine-tuning fast: one measure after another, on one device.

    make step-speed
    make step-speed ARGS="--shape 1.1b --batch 8"       # on a card with 40 GiB and more
    make step-speed ARGS="--measures plain layers fp8"

Look at: the share of the peak. It is the FLOP that the model needs over those that one large matrix
product does in the same time on this device, in this run. Each row keeps what the rows above it
changed, and trains anew from the same random weights on the same random tokens: the last losses
show whether what is fast still learns. What fails (memory, no compiler) is a row that says so, and
the next row does without.
"""

import argparse
import contextlib
import gc
import shutil
import time
from typing import NamedTuple

import shapes  # the file beside this script

from lab import fail, jobs, machine, results, training
from lab.profile import load_profile

PIECES = 8  # of the loss
LEARNING_RATE = 1e-4
WARM_UP = 3  # steps that compile, and make the optimizer's states
NUMBERS = ("step_s", "tok_per_s", "of_peak_ratio", "peak_gib")  # of a row
ABSENT = "–"  # in the record, of what was not measured here


class Setting(NamedTuple):
    """How a step is computed."""

    fused: bool = False  # AdamW as one kernel
    compiled: str = ""  # the whole "model", or its "layers"
    pure: bool = False  # weights, gradients and optimizer states in bf16
    pieces: bool = False  # loss_in_pieces.py
    cudnn: bool = False  # cuDNN's attention before all others
    batches: int = 1  # times --batch
    checkpointing: bool = False
    fp8: bool = False  # float8.py


MEASURES = {  # name: what the table says of it, what it changes
    "plain": ("autocast, AdamW", {}),
    "fused": ("+ fused AdamW", {"fused": True}),
    "compiled": ("+ torch.compile(model)", {"compiled": "model"}),
    "layers": ("  each layer compiled instead", {"compiled": "layers"}),
    "pure": ("+ everything in bf16", {"pure": True}),
    "pieces": ("+ loss in pieces", {"pieces": True}),
    "cudnn": ("+ attention by cuDNN", {"cudnn": True}),
    "large": ("+ twice the batch", {"batches": 2}),
    "checkpointed": ("+ activation checkpointing", {"checkpointing": True}),
    "fp8": ("  fp8 products instead", {"checkpointing": False, "fp8": True}),
}


def trainer(setting: Setting, config, device, dtype):
    """(loss of token ids [batch, length], optimizer) of a model with random weights."""
    import torch
    from float8 import exchange  # the files beside this script
    from loss_in_pieces import loss_in_pieces, piece
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    kept = dtype if setting.pure else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=kept).train()
    decoder = model.get_decoder()
    if setting.fp8:
        exchange(decoder.layers)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.compiled == "model":
        model.compile()
    if setting.compiled == "layers":
        for layer in decoder.layers:  # alike: what is compiled for the first serves them all
            layer.compile()
    compute = torch.compile(piece) if setting.compiled else piece
    autocast = dtype != torch.float32 and not setting.pure

    def loss_of(ids):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if not setting.pieces:
                return model(input_ids=ids, labels=ids, use_cache=False).loss
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            return loss_in_pieces(hidden, model.lm_head.weight, ids, PIECES, compute)

    fused = setting.fused or None  # None: PyTorch's own choice, which is not the fused one
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0, fused=fused)
    return loss_of, optimizer


def measured(setting: Setting, config, device, dtype, args) -> dict:
    """{step_s, peak_gib, losses} of --steps steps."""
    import torch

    loss_of, optimizer = trainer(setting, config, device, dtype)
    ids = random_ids(args.batch * setting.batches, args.seq_len, config, device)
    losses = []

    def step():
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())  # read at the end only: no step waits for its loss

    with attention_by(setting.cudnn):
        for _ in range(WARM_UP):
            step()
        wait(device)
        began = time.perf_counter()
        for _ in range(args.steps):
            step()
        wait(device)
    step_s = (time.perf_counter() - began) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"step_s": step_s, "peak_gib": peak, "losses": torch.stack(losses).tolist()}


def attention_by(cudnn: bool):
    """While it lasts, attention is cuDNN's where that can compute it; or as PyTorch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not cudnn:
        return contextlib.nullcontext()
    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


def random_ids(batch: int, length: int, config, device):
    """[batch, length] token ids, the same in every row of the table."""
    import torch

    torch.manual_seed(1)
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Give back what the row before held: compiled code, graphs, memory."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(setting: Setting, config, device, dtype, args) -> tuple[dict, str]:
    """(what `measured` says, "") or ({}, why there is nothing)."""
    import torch

    forget()
    problem = why_not(setting, device, dtype)
    if problem:
        return {}, problem
    try:
        return measured(setting, config, device, dtype, args), ""
    except torch.OutOfMemoryError:
        return {}, "out of memory"
    except Exception as e:  # the other rows are worth having
        return {}, f"{type(e).__name__}: {str(e).strip()[:150]}".replace("\n", " ")


def why_not(setting: Setting, device, dtype) -> str:
    """What this machine lacks for it; "" where it has all."""
    import torch

    if setting.compiled and device.type == "cpu" and not shutil.which("g++"):
        return "no g++ to compile with"
    if setting.pure and dtype == torch.float32:
        return "this CPU has no instructions for bf16"
    if setting.cudnn and device.type == "cpu":
        return "needs a GPU"
    if setting.fp8 and (device.type == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        return "needs a GPU of compute capability 8.9"
    return ""


def product_flop_per_s(size: int, device, dtype) -> float:
    """What one large matrix product reaches: the best of six times ten in a row."""
    import torch

    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - began))
    return best


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The model and its batch
    cards = machine.gpus() if profile.device == "cuda" else []
    card_gib = cards[0]["memory_gib"] if cards else 0
    largest = shapes.fitting(min(card_gib, machine.memory_cap_gib() or card_gib))
    meaning = "model that is trained (default here: %(default)s)"
    parser.add_argument("--shape", choices=shapes.SHAPES, default=largest, help=meaning)
    parser.add_argument("--batch", type=int, help="rows of a step (default: the shape's)")
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: the shape's)")
    # What is measured
    training.add_flag(parser, "--steps", int, 10, "steps that are timed in each row")
    chosen = "which rows (default: all)"
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=[*MEASURES], help=chosen)
    args = parser.parse_args()
    content, batch, length = shapes.SHAPES[args.shape]
    args.batch = batch if args.batch is None else args.batch
    args.seq_len = length if args.seq_len is None else args.seq_len
    if min(args.batch, args.steps) < 1 or args.seq_len < 2:
        fail("--batch and --steps must be positive, --seq-len at least 2")
    jobs.refuse_taken_cards()

    import torch
    from transformers import AutoConfig

    # -----------------------------------------------------------------------------
    # 1. The yardstick: one large matrix product

    device = torch.device(profile.device, 0) if profile.device == "cuda" else torch.device("cpu")
    dtype = getattr(torch, profile.dtype)
    config = AutoConfig.for_model(**content)
    peak = product_flop_per_s(profile.smoke.matmul_size, device, dtype)
    millions = shapes.weights_that_multiply(config) / 1e6
    print(f"{args.shape}: {millions:.0f} M weights multiply a token, {profile.dtype} on {device}")
    print(f"one large product reaches {peak / 1e12:.3g} TFLOP/s\n")

    # -----------------------------------------------------------------------------
    # 2. Measure after measure, each on top of those before it

    columns = ("rows x tokens", "s a step", "tokens/s", "of peak", "GiB", "last loss")
    print(f"{'':30}", *(f"{column:>13}" for column in columns))
    metrics = {"peak_tflop_per_s": round(peak / 1e12, 4), "losses": {}}
    metrics |= {f"{name}_{key}": ABSENT for name in MEASURES for key in NUMBERS}
    best = ("", 0.0)
    setting = Setting()
    for name, (label, change) in MEASURES.items():
        changed = setting._replace(**change)
        if name not in args.measures:
            setting = setting if why_not(changed, device, dtype) else changed
            continue
        row, problem = attempt(changed, config, device, dtype, args)
        if problem:  # the next row does without
            print(f"{label:30} {problem}", flush=True)
            continue
        setting = changed
        batch = args.batch * setting.batches
        share = shapes.step_flop(config, batch, args.seq_len) / row["step_s"] / peak
        numbers = (row["step_s"], batch * args.seq_len / row["step_s"], share, row["peak_gib"])
        cells = [f"{batch} x {args.seq_len}", f"{numbers[0]:.4f}", f"{numbers[1]:,.0f}"]
        cells += [f"{share:.3f}", f"{numbers[3]:.2f}" if numbers[3] else ABSENT]
        cells += [f"{row['losses'][-1]:.4f}"]
        print(f"{label:30}", *(f"{cell:>13}" for cell in cells), flush=True)
        for key, number in zip(NUMBERS, numbers, strict=True):
            metrics[f"{name}_{key}"] = float(f"{number:.4g}") if number else ABSENT
        metrics["losses"][name] = [round(loss, 4) for loss in row["losses"]]
        best = max(best, (label.strip(" +"), share), key=lambda pair: pair[1])
    if not metrics["losses"]:
        fail("no row could be measured: the reasons stand above")
    halved = shapes.step_flop(config, 1, args.seq_len, causal=True)
    halved /= shapes.step_flop(config, 1, args.seq_len)
    metrics |= {"best_of_peak_ratio": round(best[1], 4)}
    metrics |= {"best_causal_of_peak_ratio": round(best[1] * halved, 4)}
    print(f"\nthe most: {best[1]:.3f} of the peak ({best[0]})", end="; ")
    print(f"{best[1] * halved:.3f} where causal attention counts half")
    results.finish(__file__, metrics, vars(args) | {"config": content})


if __name__ == "__main__":
    main()
