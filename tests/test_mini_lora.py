"""LoRA from scratch against PEFT: losses, logits, merged weights; and what the formulas say."""

import json

import pytest
from conftest import ROOT, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
METHODS = ("lora", "rslora", "dora", "pissa")


@pytest.fixture(scope="module")
def metrics(tiny_model) -> dict:
    out = run("python", MODULE / "06_mini_lora.py", "--model", tiny_model, check=0).stdout
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("method", METHODS)
def test_it_is_pefts(metrics, method):
    for name in ("begin_logits", "peft_losses", "peft_logits", "merged_logits"):
        assert metrics[f"{method}_{name}_difference_ratio"] < 2e-6, name
    losses = metrics[f"{method}_losses"]
    assert losses[0] == pytest.approx(metrics["lora_losses"][0], rel=1e-6)
    assert len({round(loss, 4) for loss in losses}) == len(losses)  # it trains


def test_the_methods_differ(metrics):
    assert len({metrics[f"{method}_losses"][-1] for method in METHODS}) == len(METHODS)


def test_trained_parameters(metrics):
    """Rank times (in + out) of every linear layer, and with DoRA a length for each output.

    The layers of lab.models.two_layers: hidden size 64, heads 4 and 2 of 16, MLP 128.
    """
    sides = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    thin = 2 * 16 * sum(a + b for a, b in sides)
    assert metrics["lora_trained_count"] == metrics["pissa_trained_count"] == thin
    assert metrics["dora_trained_count"] == thin + 2 * sum(out for _, out in sides)
