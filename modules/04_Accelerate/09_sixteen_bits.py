"""What sixteen bits lose: gradients that vanish in fp16, updates that vanish in bf16; two cures.

    make sixteen-bits
    make sixteen-bits ARGS="--accumulate 64 --learning-rate 1e-3"

Look at: `gradients zero`, and how far each training gets. fp16 has too few bits of exponent: what
is below 3e-8 becomes zero, unless the loss is multiplied first (GradScaler). bf16 has too few of
mantissa: a weight that is kept in it does not move by less than 1/512 of itself, unless it is
rounded by chance (stochastically). The model is a Llama of two layers that reads bytes, trained a
little in fp32 first, as fine-tuning begins with a trained model. This is PyTorch's own autocast:
on a CPU it computes in fp16 too, where Accelerate 1.11 does not.
"""

import argparse
import copy

from lab import data, fail, jobs, results, training
from lab.profile import load_profile
from lab.table import table

KINDS = {  # name in the record: what the table says of it
    "fp32": "fp32",
    "fp16": "fp16",
    "fp16_scaled": "fp16, loss scaled",
    "bf16": "bf16",
    "pure": "bf16 weights",
    "stochastic": "bf16, by chance",
}
BATCH = 4  # rows
LENGTH = 64  # bytes of a row
HELD_OUT = 4 * BATCH  # rows that none trains on


def train(kind: str, model, batches, learning_rate: float, accumulate: int) -> dict:
    """Train `model` on `batches` [steps, rows, bytes] in this kind of numbers.

    Returns the share of gradients that are zero, of updates that are lost, steps that were skipped.
    """
    import torch

    # -----------------------------------------------------------------------------
    # 1. The types: of products (autocast), of the loss's scale, of the weights

    device = batches.device.type
    products = torch.float16 if kind.startswith("fp16") else torch.bfloat16
    autocast = torch.autocast(device, products, enabled=kind in ("fp16", "fp16_scaled", "bf16"))
    scaler = torch.amp.GradScaler(device, enabled=kind == "fp16_scaled")
    if kind in ("pure", "stochastic"):
        model.bfloat16()
    weights = list(model.parameters())
    # Of bf16 weights the update is computed in fp32, on a copy that lives as long as the update.
    exact = [weight.detach().float().requires_grad_() for weight in weights]
    updated = exact if weights[0].dtype == torch.bfloat16 else weights
    # Adam adds eps to the size of a gradient: it must be small beside a gradient that is divided.
    optimizer = torch.optim.AdamW(updated, learning_rate, weight_decay=0.0, eps=1e-15)

    # -----------------------------------------------------------------------------
    # 2. Train; of `accumulate` micro-steps one is computed, the others would add as much

    zero = lost = skipped = 0.0
    for ids in batches:
        with autocast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        scaler.scale(loss / accumulate).backward()
        zero += share([weight.grad == 0 for weight in weights]) / len(batches)
        if updated is exact:
            lost += step_in_bf16(weights, exact, optimizer, kind) / len(batches)
        else:
            before = scaler.get_scale()
            scaler.step(optimizer)  # not where a gradient is infinite
            scaler.update()
            skipped += scaler.get_scale() < before
        model.zero_grad()
    return {"zero": zero, "lost": lost, "skipped": int(skipped)}


def step_in_bf16(weights, exact, optimizer, kind: str) -> float:
    """An optimizer step that is rounded to bf16; the share of updates that left no trace."""
    import torch

    for weight, copy_of_it in zip(weights, exact, strict=True):
        copy_of_it.data.copy_(weight.data)
        copy_of_it.grad = weight.grad.float()
    optimizer.step()
    without_trace = []
    for weight, copy_of_it in zip(weights, exact, strict=True):
        new = copy_of_it.detach()
        asked = new != weight.float()
        new = by_chance(new) if kind == "stochastic" else new.bfloat16()
        without_trace.append((new == weight)[asked])
        with torch.no_grad():
            weight.copy_(new)
    return share(without_trace)


def by_chance(values):
    """fp32 -> bf16, up or down by chance: on average nothing is lost.

    bf16 is the upper half of fp32's bits. A random number added to the lower half carries into the
    upper one as often as the lower half is large.
    """
    import torch

    bits = values.view(torch.int32)
    chance = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + chance) & -(2**16)).view(torch.float32).bfloat16()


def share(masks: list) -> float:
    """Of all the elements of these masks, the share that is true."""
    count = sum(mask.numel() for mask in masks)
    return sum(int(mask.sum()) for mask in masks) / max(1, count)


def tiny_llama(device):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).train()


def rows_of_bytes(text: bytes, steps: int, device):
    """([steps, BATCH, LENGTH] bytes of the text, shuffled; HELD_OUT rows that none trains on)."""
    import torch

    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // LENGTH * LENGTH]
    rows = rows.long().view(-1, LENGTH).to(device)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(device)]
    held_out = rows[:HELD_OUT]
    rest = rows[HELD_OUT:].repeat(1 + steps * BATCH // len(rows[HELD_OUT:]), 1)
    return rest[: steps * BATCH].view(steps, BATCH, LENGTH), held_out


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = training.add_flag
    add(parser, "--data", str, profile.train.data, "data set whose bytes are read")
    add(parser, "--warm-up", int, 100, "steps in fp32 that all kinds begin with")
    add(parser, "--steps", int, 40, "steps in each kind of numbers")
    add(parser, "--learning-rate", float, 1e-4, "of these steps; the warm-up's is 3e-3")
    meaning = "micro-steps of a step: each loss is divided by so many"
    add(parser, "--accumulate", int, 16384, meaning)
    args = parser.parse_args()
    if min(args.warm_up, args.steps, args.accumulate) < 1 or not args.learning_rate > 0:
        fail("--warm-up, --steps, --accumulate and --learning-rate must be positive")
    jobs.refuse_taken_cards()
    messages = [message["content"] for row in data.rows(args.data) for message in row["messages"]]
    text = "\n".join(messages).encode()
    least = (HELD_OUT + 1) * LENGTH
    if len(text) < least:
        fail(f"{args.data} has {len(text)} bytes of text: take one of at least {least:,}")

    import torch

    # -----------------------------------------------------------------------------
    # 3. One trained model, from which every kind goes on

    device = torch.device(profile.device)
    batches, held_out = rows_of_bytes(text, args.warm_up + args.steps, device)
    begun = tiny_llama(device)
    train("fp32", begun, batches[: args.warm_up], 3e-3, 1)

    def judged(model) -> float:
        with torch.no_grad():
            return model.float()(input_ids=held_out, labels=held_out, use_cache=False).loss.item()

    first = judged(begun)
    tokens = args.accumulate * BATCH * LENGTH
    print(f"a step of {tokens:,} tokens in {args.accumulate:,} micro-steps; before it the loss is")
    print(f"{first:.4f} on rows that none trains on\n")

    # -----------------------------------------------------------------------------
    # 4. Side by side

    metrics = {}
    measured = {}
    for kind in KINDS:
        model = copy.deepcopy(begun)
        result = train(kind, model, batches[args.warm_up :], args.learning_rate, args.accumulate)
        result["gain"] = first - judged(model)
        measured[kind] = result
        reached = result["gain"] / measured["fp32"]["gain"]
        metrics[f"{kind}_zero_ratio"] = round(result["zero"], 4)
        metrics[f"{kind}_lost_ratio"] = round(result["lost"], 4)
        metrics[f"{kind}_reached_ratio"] = round(reached, 4)
        metrics[f"{kind}_skipped_count"] = result["skipped"]
    every = list(measured.values())
    rows = [
        ["gradients zero", *(f"{result['zero']:.1%}" for result in every)],
        ["updates lost", *(f"{result['lost']:.1%}" for result in every)],
        ["steps skipped", *(result["skipped"] for result in every)],
        ["loss falls by", *(f"{result['gain']:.4f}" for result in every)],
    ]
    table(["", *KINDS.values()], rows, indent=0)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
