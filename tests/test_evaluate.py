"""Evaluation beyond the trained task: likelihoods against transformers' own, judging by rules, and
whether a difference is more than noise.
"""

import importlib
import itertools
import json
import math
import runpy
import sys
from collections import Counter

import pytest
import yaml
from conftest import ROOT, refused

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "13_evaluate.py"
SETS = {language: MODULE / f"data/choices_{language}.jsonl" for language in ("en", "zh")}


@pytest.fixture
def likelihood(module06):
    return importlib.import_module("likelihood")


@pytest.fixture
def comparing(module06, monkeypatch):
    monkeypatch.delitem(sys.modules, "comparing", raising=False)
    yield importlib.import_module("comparing")
    sys.modules.pop("comparing")


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def model(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


# -----------------------------------------------------------------------------
# Texts and options


@pytest.mark.parametrize("language", SETS)
def test_the_choices_are_balanced_and_different(likelihood, language):
    """The right option stands in each place as often; no question and no option twice."""
    asked = likelihood.read_choices(SETS[language])
    assert Counter(one.answer for one in asked) == dict.fromkeys(range(4), 10)
    assert len({one.question for one in asked}) == len(asked) == 40
    assert all(len(set(one.choices)) == 4 for one in asked)


def test_perplexity_is_that_of_transformers(module06, model, tokenizer):
    """Against the loss that the model itself gives; the bits are those of the whole text."""
    import torch

    evaluate = importlib.import_module("13_evaluate")
    loss_of = importlib.import_module("answering").loss_of
    paragraph = evaluate.TEXTS["zh"].read_text().split("\n\n")[0]
    ids = tokenizer("\n" + paragraph, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nats, tokens = loss_of(model, tokenizer, "\n", paragraph)
        loss = model(ids, labels=ids).loss.item()
    assert tokens == ids.shape[1] - 1
    text = evaluate.Text(nats, tokens, len(paragraph.encode()))
    nats, size = evaluate.per("loss", text)
    assert nats / size == pytest.approx(loss, rel=1e-5)
    bits, size = evaluate.per("bits_per_byte", text)
    assert bits * math.log(2) == pytest.approx(nats)
    assert size == 3 * len(paragraph)  # every one is a character of three bytes


@pytest.mark.parametrize("language", SETS)
def test_options_are_scored_as_each_alone(likelihood, model, tokenizer, language):
    """From the question's cache and padded, each gets the log p of its own tokens."""
    import torch

    form, space = likelihood.FORMS[language]
    lengths = set()
    for one in likelihood.read_choices(SETS[language])[:6]:
        with torch.no_grad():
            logps = likelihood.option_logps(model, tokenizer, one, language)
        context = tokenizer(form.format(one.question))["input_ids"]
        for option, logp in zip(one.choices, logps, strict=True):
            ids = tokenizer(form.format(one.question) + space + option)["input_ids"]
            with torch.no_grad():
                every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = sum(every[place - 1, ids[place]] for place in range(len(context), len(ids)))
            assert logp == pytest.approx(alone.item(), abs=1e-4)
            lengths.add(len(ids) - len(context))
    assert len(lengths) > 1


def test_acc_and_acc_norm_by_hand(likelihood):
    """-6 is the likeliest text; of a character, -8 / 8 is better than -6 / 3."""
    one = likelihood.Choice("?", ["cat", "elephant", "cow"], 1)
    assert likelihood.chosen(one, [-6.0, -8.0, -7.0], per_character=False) == 0
    assert likelihood.chosen(one, [-6.0, -8.0, -7.0], per_character=True) == 1
    one = likelihood.Choice("？", ["水", "abcd"], 0)  # characters, not bytes: -2 / 1 and -6 / 4
    assert likelihood.chosen(one, [-2.0, -6.0], per_character=True) == 1


@pytest.mark.parametrize("language", SETS)
def test_the_task_of_lm_evaluation_harness_asks_the_same(likelihood, language):
    """Its YAML renders to our prompt, and reads our file, whose fields it names."""
    from jinja2 import Template

    task = yaml.safe_load((MODULE / f"configs/lm_eval/choices_{language}.yaml").read_text())
    assert ROOT / task["dataset_kwargs"]["data_files"]["test"] == SETS[language]
    form, space = likelihood.FORMS[language]
    one = json.loads(SETS[language].read_text().splitlines()[0])
    assert Template(task["doc_to_text"]).render(one) == form.format(one["question"])
    assert task["target_delimiter"] == space
    assert Template(task["doc_to_choice"]).render(one) == str(one["choices"])
    assert Template(task["doc_to_target"]).render(one) == str(one["answer"])


# -----------------------------------------------------------------------------
# Judging, and noise

WANTED = '{"model": "yi-34b", "gpus": 2, "port": 5000}'
ANSWERS = {  # from the best to the worst
    "right": WANTED,
    "right, with blanks": WANTED.replace(":", ":  "),
    "one field wrong": WANTED.replace("5000", "8000"),
    "no field right": '{"model": "llama"}',
    "short prose": "On port 5000.",
    "prose around it": f"Sure! Here is your JSON: {WANTED}",
}


def test_rules_are_symmetrical_and_in_order(module06, comparing):
    question = module06.scoring.Question("", [], None, "", WANTED, "", False)
    for better, worse in itertools.combinations(ANSWERS.values(), 2):
        assert comparing.verdict(question, better, worse) == 1
        assert comparing.verdict(question, worse, better) == -1
    assert all(comparing.verdict(question, one, one) == 0 for one in ANSWERS.values())


def test_the_sign_test_is_that_of_scipy(comparing):
    """McNemar's exact test is a binomial one of the items on which the two differ."""
    from scipy.stats import binomtest

    assert comparing.sign_test(1, 9) == pytest.approx(22 / 1024)
    assert comparing.sign_test(0, 0) == 1
    for gained, lost in ((5, 0), (6, 0), (3, 4), (4, 4), (25, 10)):
        theirs = binomtest(gained, gained + lost).pvalue
        assert comparing.sign_test(gained, lost) == pytest.approx(theirs)
        assert comparing.sign_test(lost, gained) == pytest.approx(theirs)


def test_shares_count_what_changed(comparing):
    base = [True] * 6 + [False] * 4
    tuned = [True] * 3 + [False] * 6 + [True]
    metrics = comparing.shares("acc", base, tuned)
    assert (metrics["base_acc_pct"], metrics["tuned_acc_pct"]) == (60, 40)
    assert (metrics["acc_gained_count"], metrics["acc_lost_count"]) == (1, 3)
    assert metrics["acc_chance_pct"] == 62.5
    assert metrics["base_acc_low_pct"] < 60 < metrics["base_acc_high_pct"]
    assert comparing.line("acc", metrics, "acc", "pct", ".1f")[-1] == "no (+1 -3, p = 0.625)"


def test_paired_rows_see_a_difference_that_their_intervals_hide(comparing):
    """Texts differ much, the models little, and always the same way."""
    base = [(100.0 * row, 100) for row in range(1, 9)]
    tuned = [(loss + 5 + row % 2, size) for row, (loss, size) in enumerate(base)]
    metrics = comparing.rates("text", "loss", base, tuned)
    assert metrics["tuned_text_low_loss"] < metrics["base_text_loss"]
    assert metrics["text_difference_low_loss"] >= 0.05
    assert metrics["text_difference_high_loss"] <= 0.06
    assert comparing.line("text", metrics, "text", "loss", ".3f")[-1].startswith("yes")
    same = comparing.rates("text", "loss", base, base)
    assert comparing.line("text", same, "text", "loss", ".3f")[-1].startswith("no")


# -----------------------------------------------------------------------------
# The script


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """LoRA of the tiny model, away from its start."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).save_pretrained(tmp_path)
    (tmp_path / "config.yaml").write_text(f"model_name_or_path: {tiny_model}\n")
    return tmp_path


def test_both_models_are_evaluated_in_one_loading(module06, adapter, monkeypatch, capsys):
    words = [str(SCRIPT), "--adapter", str(adapter), "--limit", "3"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["acc_zh_item_count"] == metrics["trained_item_count"] == 3
    assert metrics["base_trained_pct"] == metrics["tuned_other_pct"] == 0
    assert metrics["base_text_en_loss"] != metrics["tuned_text_en_loss"]
    shares = [metrics[f"{name}_wins_pct"] for name in ("base", "tuned")]
    assert sum(shares) <= 100.1
    for label in ("another form, exact", "choices zh, acc_norm", "text zh, bits per byte"):
        assert label in out


def test_what_cannot_be(tiny_model, tmp_path):
    assert "--limit at least 0" in refused("python", SCRIPT, "--limit", -1, PROFILE="cpu")
    reason = "does not say which model it was tuned from: name it with --model"
    assert reason in refused("python", SCRIPT, "--adapter", tiny_model, PROFILE="cpu")
