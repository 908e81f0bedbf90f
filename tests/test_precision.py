"""Module 04, precision.md: number types, what 16 bits lose, fp8 from scratch, a fast step."""

import copy
import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, python, refused

MODULE = ROOT / "modules/04_Accelerate"
SPEED = MODULE / "07_step_speed.py"
SIXTEEN = MODULE / "09_sixteen_bits.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lesson():
    """The files of the module by name, numbers included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(MODULE))
        yield importlib.import_module


@pytest.fixture(scope="module")
def small(lesson):
    """A model's config for the functions of the scripts: two layers, 64 dimensions."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**lesson("shapes").llama(2, 64, 128, 4, 2, 512))


def result(done) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def relative(ours, theirs) -> float:
    """How far `ours` is from `theirs`, as a share of its length."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_table_of_number_types():
    """The page's limits of each type are PyTorch's, to the digits shown."""
    text = (MODULE / "precision.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\d) \| (\S+) \| (\S+) \| (\S+) \|$", text)
    assert len(rows) == 5
    for name, size, *limits in rows:
        kind = torch.finfo(getattr(torch, name))
        assert int(size) * 8 == kind.bits
        true = (kind.max, kind.smallest_normal * kind.eps, kind.eps)
        assert list(map(float, limits)) == pytest.approx(true, rel=0.05), name


# -----------------------------------------------------------------------------
# What sixteen bits lose


@pytest.fixture(scope="module")
def sixteen() -> dict:
    return result(python(SIXTEEN, check=0, PROFILE="cpu"))


def test_fp16_loses_small_gradients_and_scaling_brings_them_back(sixteen):
    """Without scaling most gradients are zero and the training hardly moves; with it, as in fp32.

    The scale is found by skipping steps. bf16, with its exponents of fp32, needs none of it.
    """
    assert sixteen["fp16_zero_ratio"] > sixteen["fp32_zero_ratio"] + 0.2
    assert sixteen["fp16_scaled_zero_ratio"] < sixteen["fp32_zero_ratio"] + 0.05
    assert sixteen["bf16_zero_ratio"] < sixteen["fp32_zero_ratio"] + 0.01
    assert sixteen["fp16_reached_ratio"] < 0.7
    assert sixteen["fp16_scaled_reached_ratio"] > 0.9
    assert sixteen["bf16_reached_ratio"] > 0.9


def test_bf16_weights_lose_updates_and_chance_brings_them_back(sixteen):
    assert sixteen["pure_lost_ratio"] > 0.3
    assert sixteen["pure_reached_ratio"] < sixteen["stochastic_reached_ratio"] - 0.05
    assert sixteen["stochastic_reached_ratio"] > 0.9
    assert sixteen["fp32_lost_ratio"] == 0


def test_a_text_too_short_is_refused(tmp_path):
    """Of two short rows nothing is left to train on; said before torch is there."""
    roles = ("user", "assistant")
    row = {"messages": [{"role": role, "content": "short"} for role in roles]}
    file = tmp_path / "two.json"
    file.write_text(json.dumps([row, row]))
    assert "take one of at least 1,088" in refused("python", SIXTEEN, "--data", file, PROFILE="cpu")


def test_rounding_by_chance_keeps_the_mean(lesson):
    """Each time one of the two neighbours in bf16, on average the number itself."""
    by_chance = lesson("09_sixteen_bits").by_chance
    torch.manual_seed(0)
    for value in (1.001, -1.001, 3e-5, 0.0):
        rounded = by_chance(torch.full((100_000,), value)).float()
        nearest = torch.tensor(value).bfloat16().float().item()
        gap = abs(value) * 2**-7
        assert (rounded - value).abs().max() <= gap
        assert rounded.mean().item() == pytest.approx(value, abs=0.02 * gap + 1e-12)
        assert value == 0 or abs(nearest - value) > 0.05 * gap


# -----------------------------------------------------------------------------
# fp8


@pytest.mark.parametrize("kind, error", [("float8_e4m3fn", 2**-4), ("float8_e5m2", 2**-3)])
def test_float8_is_near_whatever_the_size(lesson, kind, error):
    """Half a step of the mantissa at most, for numbers of any size, without overflow."""
    to_float8 = lesson("float8").to_float8
    kind = getattr(torch, kind)
    torch.manual_seed(0)
    for size in (1e-7, 1.0, 1e6):
        values = size * (1 + 9 * torch.rand(1000))  # within a decade: none is subnormal
        small, scale = to_float8(values, kind)
        again = small.float() * scale
        assert again.isfinite().all()
        assert ((again - values).abs() / values).max() <= error * 1.001
        assert small.float().max() == torch.finfo(kind).max
    nothing, scale = to_float8(torch.zeros(4), kind)
    assert (nothing.float() * scale == 0).all()


def test_float8_linear_computes_what_a_linear_layer_does(lesson):
    """Output and both gradients within some per cent, in the types of the layer; the bias exact."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 96)
    x = torch.randn(2, 16, 64, requires_grad=True)
    gradient = 1e-6 * torch.randn(2, 16, 96)
    exact = layer(x)
    exact.backward(gradient)
    expected = [exact.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = layer.weight.grad = layer.bias.grad = None

    holder = torch.nn.Sequential(layer)
    assert lesson("float8").exchange(holder) == 1
    near = holder(x)
    near.backward(gradient)
    ours = [near.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    errors = [relative(a, b) for a, b in zip(ours, expected, strict=True)]
    assert all(1e-3 < error < 0.1 for error in errors[:3]), errors
    assert errors[3] < 1e-6
    assert [a.dtype for a in ours] == [torch.float32] * 4


# -----------------------------------------------------------------------------
# The loss in pieces


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_loss_in_pieces_is_the_loss(lesson, small, pieces):
    """Loss and gradients as transformers computes them; no tensor as large as the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    ids = torch.randint(0, 512, (2, 24))
    (model(input_ids=ids, labels=ids).loss / 4).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    hidden = model.model(input_ids=ids).last_hidden_state
    with Largest() as largest:
        whole = lesson("loss_in_pieces").loss_in_pieces
        loss = whole(hidden, model.lm_head.weight, ids, pieces)
    (loss / 4).backward()
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    for name, weight in model.named_parameters():
        assert relative(weight.grad, expected[name]) < 1e-5, name
    weight_elements = model.lm_head.weight.numel()
    assert largest.elements == max(weight_elements, 512 * -(-48 // pieces))


# -----------------------------------------------------------------------------
# The speed of a step


def test_flop_of_a_step_are_those_that_pytorch_counts(lesson, small):
    """Forward and backward of the small model, with attention written out as matrix products."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    shapes = lesson("shapes")
    config = copy.deepcopy(small)  # which from_config changes
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 512, (3, 20))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counter.get_total_flops() == pytest.approx(shapes.step_flop(small, 3, 20), rel=1e-3)
    full = shapes.step_flop(small, 3, 20)
    products = 6 * 3 * 20 * shapes.weights_that_multiply(small)
    assert shapes.step_flop(small, 3, 20, causal=True) == (full + products) / 2


def test_shapes_are_those_of_the_models(lesson):
    """TinyLlama-1.1B and Qwen2.5-0.5B by their published numbers of parameters."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes = lesson("shapes")
    assert [shapes.fitting(gib) for gib in (0, 23.6, 24, 79)] == ["tiny", "0.5b", "0.5b", "1.1b"]
    published = {"1.1b": 1_100_048_384, "0.5b": 494_032_768}
    for name, count in published.items():
        config = AutoConfig.for_model(**shapes.SHAPES[name][0])
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        assert sum(weight.numel() for weight in model.parameters()) == count
        matrices = [weight.numel() for weight in model.parameters() if weight.dim() == 2]
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        assert sum(matrices) - looked_up == shapes.weights_that_multiply(config)


def seen_masks(compile_it, model, ids) -> list[bool]:
    """Of every call of attention in what torch.compile traces: whether it has a mask."""
    masks = []

    def look(graph, _):
        for node in graph.graph.nodes:
            if "scaled_dot_product" in str(node.target):
                masks.append(node.kwargs.get("attn_mask") is not None)
        return graph.forward

    torch.compiler.reset()
    compile_it(model, look)
    model(input_ids=ids, use_cache=False)
    torch.compiler.reset()
    return masks


def test_a_whole_model_compiled_builds_a_mask(small):
    """transformers then cannot look whether rows are packed; layer by layer it can."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 512, (2, 16))

    def whole(model, backend):
        model.compile(backend=backend)

    def layers(model, backend):
        for layer in model.model.layers:
            layer.compile(backend=backend)

    model = AutoModelForCausalLM.from_config(small)
    assert set(seen_masks(whole, model, ids)) == {True}
    model = AutoModelForCausalLM.from_config(small)
    assert set(seen_masks(layers, model, ids)) == {False}


@pytest.fixture(scope="module")
def speed(lesson):
    return lesson("07_step_speed")


ARGS = SimpleNamespace(batch=2, seq_len=16, steps=2)


def losses(speed, config, **change) -> list[float]:
    setting = speed.Setting(**change)
    return speed.measured(setting, config, CPU, torch.float32, ARGS)["losses"]


def test_what_is_fast_trains_the_same(speed, small):
    """Exactly, but for rounding: all measures that keep the type. Nearly: bf16 and fp8."""
    plain = losses(speed, small)
    assert plain[-1] < plain[0] - 1e-3
    assert len(plain) == speed.WARM_UP + ARGS.steps
    for change in ({"fused": True}, {"pieces": True}, {"checkpointing": True}):
        assert losses(speed, small, **change) == pytest.approx(plain, rel=1e-5), change
    near = losses(speed, small, fp8=True)
    assert near == pytest.approx(plain, rel=1e-2)
    assert near != pytest.approx(plain, rel=1e-7)


def test_a_measure_that_fails_is_a_row(speed, small, monkeypatch):
    """Too little memory in a word, other errors in one line, what a machine lacks beforehand."""
    attempt = (small, CPU, torch.float32, ARGS)
    for error, reason in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (RuntimeError("no kernel\nfor this"), "RuntimeError: no kernel for this"),
    ):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(speed, "measured", fails)
        assert speed.attempt(speed.Setting(), *attempt) == ({}, reason)
    for change, reason in (
        ({"pure": True}, "this CPU has no instructions for bf16"),
        ({"cudnn": True}, "needs a GPU"),
        ({"fp8": True}, "needs a GPU of compute capability 8.9"),
    ):
        assert speed.attempt(speed.Setting(**change), *attempt) == ({}, reason)
    monkeypatch.setattr(speed.shutil, "which", lambda _: None)
    compiled = speed.Setting(compiled="layers")
    assert speed.attempt(compiled, *attempt) == ({}, "no g++ to compile with")


def test_step_speed_prints_a_row_for_each_measure():
    flags = ["--measures", "plain", "fused", "fp8", "--steps", "2", "--batch", "1"]
    done = python(SPEED, *flags, "--seq-len", "32", check=0, PROFILE="cpu")
    speed = result(done)
    assert speed["losses"]["fused"] == pytest.approx(speed["losses"]["plain"], abs=2e-3)
    assert 0 < speed["plain_of_peak_ratio"] < 1.5
    assert speed["plain_tok_per_s"] * speed["plain_step_s"] == pytest.approx(32, rel=0.01)
    assert speed["fp8_of_peak_ratio"] == "–"
    # Rounded to four digits, in which a step as short as this may show no difference.
    assert speed["best_causal_of_peak_ratio"] <= speed["best_of_peak_ratio"]
    assert re.search("fp8 products instead +needs a GPU of compute capability 8.9", done.stdout)


@pytest.mark.parametrize(
    "script, flags, reason",
    [
        (SPEED, ["--batch", "0"], "--batch and --steps must be positive"),
        (SPEED, ["--seq-len", "1"], "--seq-len at least 2"),
        (SIXTEEN, ["--accumulate", "0"], "must be positive"),
        (SIXTEEN, ["--data", "no_such"], "there is no data set"),
    ],
)
def test_impossible_flags(script, flags, reason):
    assert reason in refused("python", script, *flags)
