"""Stage 03's small vLLM: transformers' tokens whatever the cache and the chunks, no block lost or
mixed up, the real engine's refusals.
"""

import contextlib
import functools
import gc
import json
import random
import re
import runpy
import sys
import weakref
from types import SimpleNamespace

import pytest
from conftest import ROOT, refused, run
from small_models import random_model

from lab.profile import load_profile

MODULE = ROOT / "modules/03_vllm"
SCRIPT = MODULE / "15_mini_vllm.py"
sys.path.insert(0, str(MODULE))  # as it is for a script that is run from there

# (prompt, tokens): short and long, of which two share their beginning.
REQUESTS = [
    ("What is the capital of France?", 20),
    ("def fibonacci(n):", 5),
    ("Explain why the sky is blue. " * 12, 12),
    ("你好，请用一句话介绍你自己。", 24),
    ("Explain why the sky is blue. " * 10, 9),
]


def transformers_tokens(folder) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    found = []
    for prompt, count in REQUESTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        found.append(
            model.generate(**inputs, max_new_tokens=count, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ].tolist()
        )
    return found


@pytest.fixture(scope="module")
def folder_of(small_model, tmp_path_factory):
    """Folder of a model of small_models.py by its name, made once."""
    return functools.cache(
        lambda name: random_model(name, tmp_path_factory.mktemp("model"), small_model)
    )


@pytest.fixture(scope="module")
def qwen2(folder_of):
    return folder_of("qwen2")


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen3_moe-dense-first"])
def folder(request, folder_of):
    """Models of small_models.py, one after another; the fourth is in test_equality.py."""
    return folder_of(request.param)


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    return transformers_tokens(folder)


@pytest.fixture
def without_a_gpu(monkeypatch):
    """mini_vllm.cuda can be imported, and records nothing."""
    import torch

    class Graph:
        def replay(self):
            """The logits stay those of the recording: any will do here."""

    monkeypatch.setitem(
        sys.modules,
        "vllm.v1.attention.backends.fa_utils",
        SimpleNamespace(get_flash_attn_version=None),
    )
    monkeypatch.setitem(
        sys.modules, "vllm.vllm_flash_attn", SimpleNamespace(flash_attn_varlen_func=None)
    )
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("graph", lambda *_, **__: contextlib.nullcontext()),
        ("graph_pool_handle", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)


def engine(folder, **options):
    from mini_vllm import LLM

    return LLM(folder, **({"dtype": "float32", "kv_cache_gib": 0.1} | options))


def tokens(llm, requests=REQUESTS) -> list[list[int]]:
    from mini_vllm import SamplingParams

    prompts = [prompt for prompt, _ in requests]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in requests]
    return [output["token_ids"] for output in llm.generate(prompts, params)]


# -----------------------------------------------------------------------------
# The same tokens


def test_greedy_tokens_of_transformers_and_the_prefix_cache(folder, expected):
    llm = engine(folder)
    assert tokens(llm) == expected
    stats = llm.scheduler.stats
    computed = stats["computed_tokens"]
    # Everything in the first step, then one token each.
    assert stats["steps"] == max(count for _, count in REQUESTS)
    assert stats["preemptions"] == 0
    assert tokens(llm) == expected
    # Every full block of every prompt is found the second time.
    lengths = [len(llm.tokenizer(prompt)["input_ids"]) for prompt, _ in REQUESTS]
    hits = sum((length - 1) // 16 * 16 for length in lengths)
    assert stats["cached_tokens"] == hits > 100
    assert stats["computed_tokens"] - computed == computed - hits


def test_greedy_tokens_under_a_tiny_cache(folder, expected):
    """10 blocks, where the longest request needs 7 and all together 20; 20 tokens a step: prompts
    in chunks, the youngest preempted and computed again.
    """
    llm = engine(folder, num_blocks=10, max_num_batched_tokens=20)
    assert tokens(llm) == expected
    assert llm.scheduler.stats["preemptions"] >= 1
    assert len(llm.scheduler.block_manager.free) == 10
    assert llm.scheduler.stats["computed_tokens"] <= 20 * llm.scheduler.stats["steps"]


def test_plain_torch_attention(folder, expected):
    assert tokens(engine(folder, attention="torch", max_num_batched_tokens=48)) == expected


def filled_cache(backend, past):
    """The backend's cache with `past` [2, blocks, heads, block, D] in it, in its own layout."""
    import torch
    from mini_vllm.attention import TorchAttention

    cache = backend.cache(10, 16, 2, 32, dtype=torch.float32)
    if isinstance(backend, TorchAttention):
        for part, values in zip(cache, past, strict=True):
            part.copy_(values.transpose(1, 2))
        return cache
    # The layout inside a block is the kernel's own: it writes the past itself.
    for part in cache:
        part.zero_()
    keys, values = past.transpose(2, 3).flatten(1, 2)  # each [160, 2, 32]
    slots = torch.arange(160)
    backend.ops.cpu_attn_reshape_and_cache(keys, values, *cache, slots, backend.isa)
    return cache


def test_the_kernel_and_plain_torch_compute_the_same(qwen2):
    """One layer's attention of a mixed step."""
    import torch
    from mini_vllm.attention import CpuAttention, TorchAttention
    from mini_vllm.model_runner import ModelRunner
    from mini_vllm.sequence import Sequence

    runner = ModelRunner(qwen2, "cpu", "float32", 16, 0.01, None, "torch")
    chunk = Sequence([0] * 40, 40, block_table=[4, 2, 9])  # from the middle of its prompt
    chunk.num_computed_tokens = 17
    chunk.num_scheduled_tokens = 20
    whole = Sequence([0] * 9, 9, block_table=[1])
    whole.num_scheduled_tokens = 9
    decoding = Sequence([0] * 70, 70, block_table=[3, 8, 5, 6, 7])
    decoding.num_computed_tokens = 69
    decoding.num_scheduled_tokens = 1
    batch = runner.send(runner.prepare([chunk, whole, decoding]))
    assert batch.slot_mapping[:4].tolist() == [2 * 16 + place for place in (1, 2, 3, 4)]
    assert batch.slot_mapping[-1] == 7 * 16 + 5

    torch.manual_seed(0)
    past = torch.randn(2, 10, 2, 16, 32)
    q, k, v = (torch.randn(30, heads, 32) for heads in (4, 2, 2))
    outputs = []
    for backend in (TorchAttention(), CpuAttention(4, 2, 32, torch.float32)):
        cache = filled_cache(backend, past)
        backend.prepare(batch)
        outputs.append(backend.attend(cache, batch, q, k, v))
    by_torch, by_the_kernel = outputs
    assert (by_torch - by_the_kernel).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_cuda_graphs_compute_what_the_kernels_do(folder_of, name):
    """On a GPU: every decode step's logits, replayed in a padded batch, beside those of the same
    step without a graph.
    """
    import torch

    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    options = {"dtype": "bfloat16", "num_blocks": 40, "max_num_batched_tokens": 48}
    llm = engine(folder_of(name), device="cuda", **options)
    runner = llm.model_runner
    replay = runner.graphs.forward
    sizes = []

    def both(runner, seqs):
        sizes.append(len(seqs))
        replayed = replay(runner, seqs).clone()
        direct = runner.forward(runner.send(runner.prepare(seqs)))
        assert (replayed - direct).abs().max() < 0.02 * replayed.abs().max()
        return replayed

    tokens(llm)
    runner.graphs.forward = both
    tokens(llm)
    assert len(sizes) > 15 and {1, 2, 3} <= set(sizes), sizes


def test_the_worked_example():
    """The table in model_runner.py is what `prepare` writes and `send` sends."""
    from mini_vllm import model_runner
    from mini_vllm.sequence import Sequence

    runner = model_runner.ModelRunner.__new__(model_runner.ModelRunner)  # no model is needed
    runner.block_size = 4
    runner.device = "cpu"
    a = Sequence([10, 11, 12, 13, 14, 15], 5, block_table=[7, 2])
    a.num_computed_tokens = 5
    a.num_scheduled_tokens = 1
    b = Sequence([20, 21, 22, 23, 24, 25, 26], 7, block_table=[4, 9])
    b.num_scheduled_tokens = 3
    lists = runner.prepare([a, b])
    table = model_runner.__doc__.partition("`send` makes tensors of:")[2]
    written = re.findall(r"(?m)^    (\w+) +([\d ]+)$", table)
    assert {name: [*map(int, values.split())] for name, values in written} == lists
    batch = runner.send(lists)
    assert batch.block_table.tolist() == [[7, 2], [4, 9]]
    assert (batch.max_query_len, batch.max_seq_len) == (3, 6)


# -----------------------------------------------------------------------------
# A mixture of experts


def experts_of(folder, rank: int = 0, world: int = 1):
    """The layer with experts of a model, or a process's part of it by 16_tensor_parallel.py."""
    import torch
    from mini_vllm.model import Model, read_config, read_weights

    shard = runpy.run_path(str(MODULE / "16_tensor_parallel.py"), run_name="imported")["shard"]
    weights = shard(read_weights(folder, "cpu", torch.float32), rank, world)
    return Model(read_config(folder), weights).layers[1].mlp


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-dense-first"])
def test_experts_compute_what_transformers_does(folder_of, name):
    """Closer than tokens show: all experts chosen by somebody, and none by a single token."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    mine = experts_of(folder_of(name))
    theirs = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    with torch.inference_mode():
        for x in (torch.randn(64, 64), torch.randn(1, 64)):
            wanted = theirs.model.layers[1].mlp(x[None])[0]
            assert (mine(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_experts_are_divided_as_any_mlp(folder_of):
    """Tensor parallelism: the processes' parts add up to the whole layer."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(16, 64)
    whole = experts_of(folder_of("qwen3_moe"))
    parts = [experts_of(folder_of("qwen3_moe"), rank, 2) for rank in (0, 1)]
    assert [len(part.experts[0].gate_up) for part in (whole, *parts)] == [64, 32, 32]
    summed = parts[0](x) + parts[1](x)
    assert (summed - whole(x)).abs().max() < 1e-5 * summed.abs().max()


def test_no_graph_records_experts(folder_of, without_a_gpu):
    from mini_vllm.cuda import CudaGraphs

    runner = engine(folder_of("qwen3_moe"), num_blocks=4).model_runner
    with pytest.raises(ValueError, match="no CUDA graph can record .*: choose enforce_eager"):
        CudaGraphs(runner, 64, max_num_seqs=4)


# -----------------------------------------------------------------------------
# Blocks


def test_no_block_is_lost_or_mixed_up():
    """1,000 requests, some with a beginning in common, some aborted, in a cache that is always too
    small, without a model.

    A stand-in for the cache remembers for every slot which tokens it was computed from: what a
    sequence takes as computed must have been computed from its own tokens.
    """
    from mini_vllm.block_manager import BlockManager
    from mini_vllm.scheduler import Scheduler
    from mini_vllm.sequence import SamplingParams, Sequence

    rng = random.Random(0)
    manager = BlockManager(30, 4)
    scheduler = Scheduler(manager, max_num_seqs=8, max_num_batched_tokens=23)
    left, alive, contents, finished, aborted = 1000, [], {}, 0, 0
    while left or alive:
        for _ in range(min(left, rng.randint(0, 3))):
            prompt = [0] * rng.choice((0, 4, 9, 24)) + [
                rng.randrange(3) for _ in range(rng.randint(1, 20))
            ]
            alive.append(
                Sequence(prompt, len(prompt), SamplingParams(max_tokens=rng.randint(1, 30)))
            )
            scheduler.waiting.append(alive[-1])
            left -= 1
        if alive and rng.random() < 0.1:
            scheduler.abort(alive.pop(rng.randrange(len(alive))))
            aborted += 1
        scheduled = scheduler.schedule()
        assert scheduled or not scheduler.waiting and not scheduler.running, "nobody is served"
        assert (
            sum(seq.num_scheduled_tokens for seq in scheduled) <= 23 and len(scheduler.running) <= 8
        )
        assert all(seq.num_scheduled_tokens > 0 for seq in scheduled), (
            "without a token to compute there are no logits to choose the next from"
        )
        held = [block for seq in alive for block in seq.block_table]
        assert [held.count(block) for block in range(30)] == manager.ref_counts
        assert set(manager.free) == {block for block in range(30) if block not in held}
        for seq in scheduled:
            total = seq.num_computed_tokens + seq.num_scheduled_tokens
            for p in range(total):
                slot, so_far = (seq.block_table[p // 4], p % 4), tuple(seq.token_ids[: p + 1])
                if p >= seq.num_computed_tokens:
                    contents[slot] = so_far
                assert contents[slot] == so_far
        computed = [
            seq
            for seq in scheduled
            if seq.num_computed_tokens + seq.num_scheduled_tokens == len(seq)
        ]
        finished += len(scheduler.postprocess(scheduled, [rng.randrange(3) for _ in computed]))
        alive = [seq for seq in alive if not seq.finished]
    assert finished + aborted == 1000 and aborted > 20
    assert scheduler.stats["preemptions"] > 100 and scheduler.stats["cached_tokens"] > 1000
    assert len(manager.free) == 30 and not any(manager.ref_counts)


def test_abort_in_the_middle(qwen2):
    """Others' tokens do not depend on it, and a second abort, or one of a finished request, changes
    nothing.
    """
    from mini_vllm import SamplingParams

    llm = engine(qwen2, num_blocks=40)
    want = tokens(llm)
    seqs = [
        llm.add_request(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
        for prompt, count in REQUESTS
    ]
    for _ in range(3):
        llm.step()
    llm.abort(seqs[0])
    llm.abort(seqs[0])
    while not all(seq.finished for seq in seqs):
        llm.step()
    llm.abort(seqs[1])
    assert [seq.completion_token_ids for seq in seqs[1:]] == want[1:] and len(
        seqs[0].completion_token_ids
    ) == 3
    assert len(llm.scheduler.block_manager.free) == 40


# -----------------------------------------------------------------------------
# Sampling


def test_sampling(qwen2):
    """A seed repeats a request alone and in company; a tiny top-p is greedy; the draws follow the
    probabilities.
    """
    import torch
    from mini_vllm import SamplingParams
    from mini_vllm.sampler import sample
    from mini_vllm.sequence import Sequence

    llm = engine(qwen2)
    seeded = SamplingParams(max_tokens=8, temperature=1.0, seed=7, ignore_eos=True)
    (alone,) = llm.generate(["def fibonacci(n):"], [seeded])
    company = llm.generate(
        ["Hello", "def fibonacci(n):", "Hi"],
        [SamplingParams(max_tokens=9), seeded, SamplingParams(temperature=2.0, max_tokens=3)],
    )
    assert (
        company[1] == alone
        and alone
        != llm.generate(
            ["def fibonacci(n):"],
            [SamplingParams(max_tokens=8, temperature=1.0, seed=8, ignore_eos=True)],
        )[0]
    )
    greedy = [
        SamplingParams(max_tokens=8, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=1.0, top_p=1e-6, ignore_eos=True),
    ]
    assert len({tuple(o["token_ids"]) for o in llm.generate(["Hello"] * 2, greedy)}) == 1

    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    for top_p, want in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])):
        drawn = torch.tensor(
            sample(logits, [Sequence([1], 1, SamplingParams(temperature=1.0, top_p=top_p))] * 4000)
        )
        assert torch.bincount(drawn, minlength=4).div(4000).tolist() == pytest.approx(
            want, abs=0.03
        )


def test_stops_at_eos(qwen2):
    from mini_vllm import SamplingParams

    llm = engine(qwen2)
    (made,) = tokens(llm, [("Hello", 8)])
    llm.scheduler.eos_token_ids = {made[2]}
    assert (
        llm.generate(["Hello"], [SamplingParams(max_tokens=8)])[0]["token_ids"]
        == made[: made.index(made[2]) + 1]
    )


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "is a MixtralForCausalLM: this small engine computes LlamaForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM only",
        ),
        ({"architectures": "Qwen3NextForCausalLM"}, "is a Qwen3NextForCausalLM: this small engine"),
        ({"architectures": [5]}, "is a 5: this small engine"),
        ({"architectures": None}, "is a model without a name: this small engine"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantised, which this small engine"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            r"scales its rotary embedding \(llama3\)",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"scales its rotary embedding \(yarn\)",
        ),
        ({"use_sliding_window": True}, "sliding window"),
        (
            {"num_hidden_layers": 1},
            r"weights that this small engine does not compute with, such as model\.layers\.1\.",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_models_it_would_compute_wrongly(qwen2, tmp_path, change, words):
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((qwen2 / "config.json").read_text()) | change)
    )
    (tmp_path / "model.safetensors").symlink_to(qwen2 / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        engine(tmp_path)


def test_requests_that_can_never_fit(qwen2):
    """None is left behind in the engine, not even those before the refused one."""
    from mini_vllm import SamplingParams

    llm = engine(qwen2, num_blocks=4)
    for prompts, words in (
        (["Hello", ""], "prompt is empty"),
        (["Hello", "word " * 70], "more than the 64 that a request may have here"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.generate(prompts, [SamplingParams(max_tokens=4)] * 2)
    assert not llm.scheduler.waiting
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}):
        with pytest.raises(ValueError, match="must be"):
            SamplingParams(**wrong)
    with pytest.raises(ValueError, match="blocks of 8 tokens"):
        engine(qwen2, block_size=8)


def test_the_scripts_refuse_in_one_sentence(tmp_path):
    assert "must be positive" in refused("python", SCRIPT, "--requests", "0")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "is a GPT2LMHeadModel" in refused(
        "python", SCRIPT, "--only", "mini", "--model", tmp_path, PROFILE="cpu"
    )
    assert "use 'make mini-tp'" in refused("python", MODULE / "16_tensor_parallel.py")


# -----------------------------------------------------------------------------
# The scripts, and what the readme says


def test_tensor_parallel():
    found = json.loads(
        run("make", "-s", "mini-tp", "ARGS=--tokens 9", check=0, PROFILE="cpu").stdout.splitlines()[
            -1
        ]
    )
    assert found["world_size"] == 2 and 0 < found["logits_max_difference_ratio"] < 1e-5
    assert found["all_reduce_count"] == 8 and found["reduced_per_token_bytes"] == 2 * 4 * 256 * 4
    assert 0.5 < found["weights_held_ratio"] < 0.7


def test_nothing_of_the_small_engine_is_held_when_vllm_starts(qwen2, monkeypatch, without_a_gpu):
    """The script's hand-over, with the graphs that a GPU has: whoever holds the runner then holds
    its weights and its KV cache.

    Recording is stood in for (a CPU has no graphs); who refers to whom is as on a GPU. The garbage
    collector is off, so that luck does not help.
    """
    import mini_vllm
    from mini_vllm.cuda import CudaGraphs

    held = {}

    class LLM(mini_vllm.LLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_runner.graphs = CudaGraphs(self.model_runner, self.longest, max_num_seqs=16)
            held["runner"] = weakref.ref(self.model_runner)
            held["cache"] = weakref.ref(self.model_runner.caches[0][0])

    def run_vllm(*_):
        held["when vLLM starts"] = [
            name for name in ("runner", "cache") if held[name]() is not None
        ]
        return [1.0]

    main = runpy.run_path(str(SCRIPT), run_name="imported")["main"]
    stand_ins = {
        "load_profile": lambda: load_profile("cpu"),
        "run_vllm": run_vllm,
        "results": SimpleNamespace(finish=lambda *_: None),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setitem(main.__globals__, name, stand_in)
    monkeypatch.setattr(mini_vllm, "LLM", LLM)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            str(SCRIPT),
            "--model",
            str(qwen2),
            "--requests",
            "3",
            "--mean-tokens",
            "4",
            "--blocks",
            "60",
        ],
    )
    gc.disable()
    try:
        main()
    finally:
        gc.enable()
    assert held["when vLLM starts"] == []


def test_the_page_shows_lines_of_the_engine():
    page = (MODULE / "build_one.md").read_text(encoding="utf-8")
    source = {
        line.strip() for f in MODULE.glob("mini_vllm/*.py") for line in f.read_text().splitlines()
    }
    shown = [
        line.strip()
        for block in re.findall(r"```python\n(.*?)```", page, re.S)
        for line in block.splitlines()
        if line.strip(" .")
    ]
    assert len(shown) > 15
    assert not [line for line in shown if line not in source]
