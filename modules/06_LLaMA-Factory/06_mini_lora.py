"""LoRA from scratch beside PEFT's: the same numbers before, in and after a training.

    make mini-lora                                 # LoRA, rsLoRA, DoRA, PiSSA
    make mini-lora ARGS="--methods dora --rank 8"

lora_layers.py is the whole of it: a frozen layer, two thin matrices, their product added. Both
adapters begin with the same A and B and train on the same rows by AdamW.
Look at: the losses, which are PEFT's; that the first loss is the untouched model's; how many
parameters are trained; and what merging the adapter into the weights changes: rounding.
"""

import argparse

from lab import data, fail, jobs, models, results, training
from lab.profile import load_profile
from lab.table import table

OURS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa": True},
}
PEFT = OURS | {"pissa": {"init_lora_weights": "pissa"}}
DIFFERENCES = {  # as a part of the largest logit, or of the loss: column, name
    "moved at the start": "begin_logits",
    "losses from PEFT's": "peft_losses",
    "logits from PEFT's": "peft_logits",
    "moved by merging": "merged_logits",
}


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    models.add_model_flag(parser, "smollm2-135m")
    methods = "adapters to train (default: all)"
    parser.add_argument("--methods", nargs="+", choices=OURS, default=list(OURS), help=methods)
    training.add_flag(parser, "--rank", int, 16, "thickness of the two matrices")
    training.add_flag(parser, "--alpha", float, 32, "their product counts alpha / rank times")
    training.add_flag(parser, "--steps", int, 3, "optimizer steps")
    training.add_flag(parser, "--seq-len", int, 64, "tokens of a row")
    training.add_flag(parser, "--learning-rate", float, 1e-3, "of AdamW")
    args = parser.parse_args()
    if min(args.rank, args.steps, args.seq_len) < 1 or args.alpha <= 0:
        fail("--rank, --steps and --seq-len must be at least 1, --alpha more than 0")
    jobs.refuse_taken_cards()

    import lora_layers  # the file beside this script
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = models.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = data.blocks(tokenizer, "launch_en_train", args.seq_len)[: 2 * args.steps]
    rows = rows.to(profile.device)

    def fresh():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(profile.device).eval()  # no dropout

    def trained(model) -> list[float]:
        """The loss of each step."""
        parameters = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
        losses = []
        for batch in rows.split(2):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def logits(model) -> torch.Tensor:
        return model(input_ids=rows[:2]).logits  # [2, tokens, vocabulary]

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        """The largest difference, as a part of the largest number."""
        return ((one - other).abs().max() / other.abs().max()).item()

    lines = []
    for method in args.methods:
        # -----------------------------------------------------------------------------
        # 1. PEFT's adapter, and ours with the same A

        model = fresh()
        before = logits(model)
        peft_settings = {"r": args.rank, "lora_alpha": args.alpha, "target_modules": "all-linear"}
        peft = get_peft_model(model, LoraConfig(**peft_settings, **PEFT[method]))
        ours = fresh()
        try:
            lora_layers.wrap(ours, rank=args.rank, alpha=args.alpha, **OURS[method])
        except ValueError as e:
            fail(str(e))
        theirs = dict(peft.base_model.model.named_modules())
        for name, layer in ours.named_modules():
            if isinstance(layer, lora_layers.LoraLinear):
                layer.lora_A.data.copy_(theirs[name].lora_A["default"].weight)
        moved = apart(logits(ours), before)

        # -----------------------------------------------------------------------------
        # 2. The same steps, then the adapter goes into the weights

        losses = trained(ours)
        peft_losses = trained(peft)
        tuned = logits(ours)
        line = {
            "method": method,
            "trained_count": sum(w.numel() for w in ours.parameters() if w.requires_grad),
            "losses": losses,
            "begin_logits": moved,
            "peft_losses": max(abs(a / b - 1) for a, b in zip(losses, peft_losses, strict=True)),
            "peft_logits": apart(tuned, logits(peft)),
        }
        lora_layers.merge(ours)
        line["merged_logits"] = apart(logits(ours), tuned)
        lines.append(line)
        print(f"{method}: trained beside PEFT's", flush=True)

    # -----------------------------------------------------------------------------
    # 3. Side by side

    table(
        ["", "trained", "first loss", "last loss", *DIFFERENCES],
        [
            (
                line["method"],
                f"{line['trained_count']:,}",
                *(f"{line['losses'][step]:.4f}" for step in (0, -1)),
                *(f"{line[name]:.1e}" for name in DIFFERENCES.values()),
            )
            for line in lines
        ],
    )
    metrics = {
        f"{line['method']}_{name}": line[name]
        for line in lines
        for name in ("trained_count", "losses")
    }
    for line in lines:
        for name in DIFFERENCES.values():
            metrics[f"{line['method']}_{name}_difference_ratio"] = float(f"{line[name]:.2g}")
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
