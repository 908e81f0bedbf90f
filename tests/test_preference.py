"""Learning from pairs of answers: our DPO beside trl's, and what the script says of itself."""

import importlib
import json
import re

import pytest
from conftest import ROOT, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "10_mini_dpo.py"
PAGE = MODULE / "preferences.md"


def record(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_the_script_learns_the_pairs(tiny_model):
    """The loss begins at ln 2, where policy and reference are one, and falls; unseen pairs too."""
    flags = ("--model", tiny_model, "--steps", 12, "--learning-rate", 0.02)
    said = record(run("python", SCRIPT, *flags, PROFILE="cpu").stdout)
    assert said["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    assert sum(said["losses"][-4:]) < sum(said["losses"][:4]) - 0.05
    assert said["before_margin_nat"] == 0
    assert said["after_margin_nat"] > 0.05
    gained = {
        which: said[f"after_{which}_logp_nat"] - said[f"before_{which}_logp_nat"]
        for which in ("chosen", "rejected")
    }
    assert 0.1 * (gained["chosen"] - gained["rejected"]) == pytest.approx(
        said["after_margin_nat"], abs=2e-3
    )


def test_the_loss_and_its_gradients_are_those_of_trl(trl, tiny_model, monkeypatch, tmp_path):
    """trl tokenizes, pads, masks and computes by itself; the adapter is away from its start."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lab import data

    monkeypatch.syspath_prepend(str(MODULE))
    preference = importlib.import_module("preference")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = data.pairs("launch_en_pairs")[:4]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    policy = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    texts = [
        {
            "prompt": tokenizer.apply_chat_template(
                pair["messages"], tokenize=False, add_generation_prompt=True
            ),
            "chosen": pair["chosen"]["content"],
            "rejected": pair["rejected"]["content"],
        }
        for pair in pairs
    ]
    policy.warnings_issued = {}  # transformers 5 has no such thing
    settings = trl.DPOConfig(
        str(tmp_path), beta=1.0, use_cpu=True, report_to="none", per_device_train_batch_size=4
    )
    trainer = trl.DPOTrainer(
        policy, args=settings, train_dataset=Dataset.from_list(texts), processing_class=tokenizer
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    policy.eval()
    loss, said = trainer.get_batch_loss_metrics(policy, batch)
    loss.backward()
    theirs = {
        name: weight.grad.clone()
        for name, weight in policy.named_parameters()
        if weight.grad is not None
    }
    policy.zero_grad()

    ours = preference.concatenated(pairs, tokenizer)
    with torch.no_grad(), policy.disable_adapter():
        reference = preference.logps(policy, ours)
    logps = preference.logps(policy, ours)
    losses, rewards = preference.dpo_loss(logps, reference, 1.0)
    losses.mean().backward()
    assert (losses - losses[0]).abs().max() > 0.1
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert logps[:4].mean().item() == pytest.approx(float(said["logps/chosen"]), rel=1e-5)
    assert rewards[0].mean().item() == pytest.approx(float(said["rewards/chosen"]), rel=1e-4)
    assert rewards[1].mean().item() == pytest.approx(float(said["rewards/rejected"]), rel=1e-4)
    assert theirs
    for name, weight in policy.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--beta 0", "--steps, --pairs and --rank must be at least 1, --beta more than 0"),
        ("--steps 100", "--steps times --pairs must be at most 240, the pairs there are"),
    ],
)
def test_what_cannot_be(flags, reason):
    assert reason in refused("python", SCRIPT, *flags.split(), PROFILE="cpu")


def test_the_table_is_that_of_the_records():
    """Peak and speed of preferences.md, in the order of its rows."""
    variants = ("", "-simpo", "-orpo", "-dpo", "-kto", "-dpo-1.5b", "-full-512", "-full-dpo")
    rows = re.findall(r"(?m)^\| [\d.]+B，.*\| ([\d.]+) \| ([\d,]+) \|$", PAGE.read_text())
    folder = ROOT / "results/h200-cap24/06_LLaMA-Factory"
    for (peak, speed), variant in zip(rows, variants, strict=True):
        measured = json.loads((folder / f"01_train{variant}.json").read_text())["metrics"]
        assert peak == f"{measured['peak_gib']:.2f}", variant
        assert speed == f"{measured['tokens_per_s']:,.0f}", variant
