"""Learning from rewards: our GRPO beside trl's, its parts, and what the scripts say."""

import importlib
import json

import pytest
from conftest import ROOT, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
SMALL = ("--steps", 2, "--prompts", 2, "--group", 4, "--minibatch", 4)


@pytest.fixture(scope="module")
def imported():
    """The module's helper files by name, as its scripts import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MODULE))
        patch.setenv("PROFILE", "cpu")
        yield importlib.import_module


@pytest.fixture(scope="module")
def grpo(imported):
    return imported("grpo")


def record(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def policy(tiny_model):
    """A model with an adapter that is away from its start."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model, padding_side="left")


def requests(*texts: str) -> list[dict]:
    return [{"messages": [{"role": "user", "content": text}, {}]} for text in texts]


# -----------------------------------------------------------------------------
# Its parts


def test_a_rollout(grpo, policy, tokenizer):
    """The mask ends with the answer's end, and a greedy answer is generate's own."""
    import torch

    asked = requests("hi", "a longer request than the other one")
    torch.manual_seed(1)
    written = grpo.rollout(policy, tokenizer, asked, 2, 6)
    assert written["ids"].shape == written["attention_mask"].shape
    assert written["mask"].shape == (4, 6)
    assert len(set(written["answers"])) > 1  # sampled, not greedy
    greedy = grpo.rollout(policy, tokenizer, asked[:1], 1, 6, greedy=True)
    inputs = tokenizer.apply_chat_template(
        asked[0]["messages"][:-1], add_generation_prompt=True, return_tensors="pt"
    )
    alone = policy.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert greedy["ids"][0].tolist() == alone[0].tolist()


def test_an_answer_ends_with_its_end(grpo, tokenizer):
    import torch

    end = tokenizer.eos_token_id

    class Writes:
        device = "cpu"

        def generate(self, input_ids, **others):
            answers = torch.tensor(
                [[500, 600, end, end], [700, end, 800, 900], [500, 600, 700, 800]]
            )
            return torch.cat([input_ids.repeat(3, 1), answers], dim=1)

        def merge_adapter(self):
            pass

        unmerge_adapter = merge_adapter

    written = grpo.rollout(Writes(), tokenizer, requests("hi"), 3, 4)
    assert written["mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert written["answers"][1] == tokenizer.decode([700])


def test_advantages(grpo):
    """(reward - mean) / deviation of the group; a group that agrees teaches nothing."""
    import torch

    rewards = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(grpo.group_advantages(rewards), expected, atol=2e-4, rtol=0)


def test_padding_changes_no_probability(grpo, policy, tokenizer):
    """A short request beside a longer one has the log-probabilities that it has alone."""
    import torch

    asked = requests("hi", "a longer request than the other one, which is padded")
    torch.manual_seed(2)
    both = grpo.rollout(policy, tokenizer, asked, 1, 5)
    kept = both["attention_mask"][0].bool()
    alone = {
        "ids": both["ids"][:1, kept],
        "attention_mask": both["attention_mask"][:1, kept],
        "mask": both["mask"][:1],
    }
    with torch.no_grad():
        first = grpo.token_logps(policy, both)[:1]
        torch.testing.assert_close(first, grpo.token_logps(policy, alone), atol=1e-4, rtol=1e-4)


def test_the_rules(imported):
    rewards = imported("rewards")
    wanted = '{"port": 80, "gpus": 2}'
    assert rewards.total(["exact", "field"], wanted, wanted) == 2
    assert rewards.total(["exact", "field"], wanted, '{"port": 80, "gpus": 3}') == 0.5
    assert rewards.total(["field"], wanted, f"Sure! {wanted}") == 0  # not a JSON object
    assert rewards.total(["long"], wanted, "x" * 50) == 0.5


# -----------------------------------------------------------------------------
# Against trl


def test_the_gradients_are_those_of_trl(trl, grpo, policy, tokenizer, tmp_path):
    """trl writes, marks and learns by itself; ours gets its answers and rewards.

    Two steps on one rollout: at the second the model is no longer the one that wrote, so that
    ratio and clipping count. The adapter is away from its start, so that the KL does.
    """
    import torch
    from datasets import Dataset

    policy.base_model.model.warnings_issued = policy.warnings_issued = {}
    settings = trl.GRPOConfig(
        str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=8,
        num_iterations=2,  # trl then keeps the log-probabilities of the model that wrote
        max_completion_length=6,
        loss_type="grpo",
        beta=0.3,
        epsilon=0.2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    asked = requests("hi", "a longer request than the other one")
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        for row in asked
    ]
    given = []

    def length(completions: list[str], **others) -> list[float]:
        given.extend(float(len(text)) for text in completions)
        return given[-len(completions) :]

    data = Dataset.from_dict({"prompt": prompts})
    trainer = trl.GRPOTrainer(policy, length, settings, data, processing_class=tokenizer)
    torch.manual_seed(3)
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    policy.train()
    inputs = trainer._generate_and_score_completions(rows)
    policy.eval()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in trained:
            weight.add_(torch.randn_like(weight) * 0.05)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(policy, inputs)
    loss.backward()
    theirs = [weight.grad.clone() for weight in trained]
    policy.zero_grad()

    batch = {
        "ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "mask": inputs["completion_mask"],
        "advantages": grpo.group_advantages(torch.tensor(given).view(-1, 4)),
        "old_logps": inputs["old_per_token_logps"],
    }
    with torch.no_grad(), policy.disable_adapter():
        batch["reference_logps"] = grpo.token_logps(policy, batch)
    ours, notes = grpo.grpo_loss(grpo.token_logps(policy, batch), batch, 0.2, 0.3)
    ours.backward()
    assert batch["advantages"].abs().max() > 0.5
    torch.testing.assert_close(batch["advantages"], inputs["advantages"])
    assert notes["clipped_pct"] > 0
    assert notes["kl_nat"] > 1e-3
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    for weight, other in zip(trained, theirs, strict=True):
        torch.testing.assert_close(weight.grad, other, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.copy_(before[name])


# -----------------------------------------------------------------------------
# The scripts


def test_what_earned_more_becomes_likelier(grpo, policy, tokenizer):
    """Of one rollout the first half is paid for; until the ratio leaves its bounds, no farther."""
    import torch

    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    torch.manual_seed(4)
    batch = grpo.rollout(policy, tokenizer, requests("hi"), 8, 6)
    earned = torch.tensor([[1.0] * 4 + [0.0] * 4])
    batch["advantages"] = grpo.group_advantages(earned)
    with torch.no_grad():
        batch["old_logps"] = batch["reference_logps"] = grpo.token_logps(policy, batch)
    clipped = []
    for _ in range(60):
        loss, notes = grpo.grpo_loss(grpo.token_logps(policy, batch), batch, 0.2, 0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clipped.append(notes["clipped_pct"])
    with torch.no_grad():
        gained = (grpo.token_logps(policy, batch) - batch["old_logps"]) * batch["mask"]
        for name, weight in policy.named_parameters():
            weight.copy_(before[name])
    assert gained[:4].sum() > 0 > gained[4:].sum()
    assert clipped[0] == 0
    assert clipped[-1] > 0


def test_mini_grpo(tiny_model):
    """The curve has a point a rollout; the model that pays for length is kept apart."""
    flags = ("--rewards", "long", "--learning-rate", 0.01, "--test-rows", 2)
    out = run("python", MODULE / "11_mini_grpo.py", "--model", tiny_model, *flags, *SMALL).stdout
    told = record(out)
    assert told["script"].endswith("-gamed")
    assert len(told["rewards"]) == len(told["kl_nat"]) == 2
    assert told["kl_nat"][1] > told["kl_nat"][0] > 0  # of two steps, the second is away
    assert "grpo-gamed.png" in out


def test_trl_leaves_an_adapter_that_can_be_scored(tiny_model, module06):
    """Ctrl+C leaves a checkpoint; a finished training an adapter that 02_score.py takes."""
    script = MODULE / "12_grpo.py"
    told = record(run("python", script, "--model", tiny_model, *SMALL, "--rewards", "long").stdout)
    assert len(told["rewards"]) == 2
    assert told["writing_s"] < told["train_s"]
    trained = module06.factory.trained(str(module06.factory.FOLDER / "grpo"))
    assert trained.is_adapter
    assert trained.base == tiny_model
    assert "leave --resume out" in refused("python", script, "--model", tiny_model, "--resume")


@pytest.mark.parametrize("script", ["11_mini_grpo.py", "12_grpo.py"])
@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--group 1", "--group must be at least 2"),
        ("--minibatch 7", "the answers of a rollout, must divide by --minibatch"),
        ("--steps 1000", "--steps times --prompts must be at most 256"),
    ],
)
def test_what_cannot_be(script, flags, reason):
    assert reason in refused("python", MODULE / script, *flags.split())


def test_where_it_begins_is_said():
    assert "make lf-half" in refused("python", MODULE / "11_mini_grpo.py", RUNS="/nowhere")
