"""The readmes are the test suite: every `bash` block is executed in order, from the repository root, under this machine's profile.

A module's readme comes first, then the pages beside it, in the order in which it links to them.

An HTML comment before a block marks the exceptions: <!-- long --> runs in `make test-long`; <!-- gpu --> is executed where the
4090x2 profile's GPUs are and elsewhere parsed and dry-run; <!-- self --> holds only `make test` and `make quickstart`, which
.ci/run runs. <!-- exit 2 --> says that the commands must be refused. <!-- netns --> is long, and executed without a GPU and where network
namespaces can be made (by root, or where users may), elsewhere, as in most containers, dry-run.
"""

import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PACKAGES, ROOT, network_namespaces, run
from test_llamafactory import greedy, prompts

from lab import machine, models
from lab.profile import detect


def pages(readme: Path) -> list[Path]:
    """A module's readme, then the pages that it links to, in that order."""
    linked = re.findall(r"\]\((\w+\.md)[#)]", readme.read_text(encoding="utf-8"))
    return [readme, *(readme.parent / name for name in dict.fromkeys(linked) if name != "PLAN.md")]


MODULE_READMES = sorted(ROOT.glob("modules/*/readme.md"))
README_FILES = [*sorted(ROOT.glob("README*.md")), *(page for readme in MODULE_READMES for page in pages(readme))]
FENCE = re.compile(r"^ *(?:<!-- (?P<mark>long|netns|gpu|self|exit 2) -->\n *)?(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^ *(?P=fence)$", re.M | re.S)


BF16 = re.compile(r"train-mixed|ds_config\.json|train-z2-offload")  # blocks that train in it whatever the profile says


@dataclass
class Block:
    file: str
    line: int
    mark: str
    code: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def programs(self) -> list[str]:
        """Those of Debian packages that the block runs, itself or by the target that it makes."""
        if self.mark == "gpu" and not GPU:
            return []
        begins = {name: name for name in PACKAGES} | {"make monitor": "prometheus", "make two-nodes": "ip"}
        return [name for words, name in begins.items() if re.search(rf"^ *{words}\b", self.code, re.M)]

    @property
    def slow(self) -> list:
        """Training in bf16 takes hours on a CPU that has no instructions for it."""
        if BF16.search(self.code) and not machine.fast_bfloat16():
            return [pytest.mark.skip("it trains in bfloat16, for which this CPU has no instructions")]
        return []


def blocks() -> list[Block]:
    found = []
    for file in README_FILES:
        text = file.read_text(encoding="utf-8")
        for m in FENCE.finditer(text):
            if m["language"] == "bash":
                found.append(Block(str(file.relative_to(ROOT)), text[: m.start("code")].count("\n"), m["mark"] or "", textwrap.dedent(m["code"])))
    return found


GPU = detect() == "4090x2"  # what the blocks marked gpu ask for
BLOCKS = blocks()


def cases(*marks: str) -> list:
    """The blocks that carry one of the marks, as parameters of a test; README.en.md's are README.md's (test_readme_en)."""
    return [pytest.param(b, id=b.id, marks=[pytest.mark.needs(*b.programs), *b.slow]) for b in BLOCKS if b.mark in marks and b.file != "README.en.md"]


def test_every_block_is_seen():
    """The runner's own coverage: as many blocks as a plain count of fences, none of a language that would escape it."""
    for file in README_FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("```bash\n") == sum(b.file == str(file.relative_to(ROOT)) for b in BLOCKS), file
        assert len(re.findall(r"^ *```", text, re.M)) % 2 == 0, file
        assert not re.findall(r"^ *```(?:sh|shell|console|zsh)\n", text, re.M), f"{file}: use bash for what is run, text for what appears"
        assert not re.findall(r"<!-- (?!long|netns|gpu|self|exit 2|table |/table|[^a-z])(\w+) -->\n *```", text), f"{file}: unknown mark"


def test_every_page_is_walked():
    """A page to which its module's readme does not link would not be executed, and no reader would find it."""
    tutorials = {file for file in ROOT.glob("modules/*/*.md") if file.name != "PLAN.md"}
    assert tutorials == set(README_FILES) - set(ROOT.glob("README*.md"))


def prose(text: str) -> str:
    """Markdown without its code and its comments."""
    return re.sub(r"^ *(```+).*?^ *\1$|<!--.*?-->", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What a link to a place in this Markdown may name: its headings as GitHub writes them, and its ids."""
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", prose(text), re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(re.findall(r'id="([^"]+)"', text))


@pytest.mark.parametrize("file", [*README_FILES, *ROOT.glob("modules/*/PLAN.md")], ids=lambda f: str(f.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file.read_text(encoding="utf-8"))):
        path, _, place = target.partition("#")
        if ":" in path:  # of another site
            continue
        there = file.parent / path if path else file
        assert there.exists(), f"{target}: there is no such file"
        assert not place or place in anchors(there.read_text(encoding="utf-8")), f"{target}: there is no such heading"


# Samples of output that stand beside a table: (page, what is shown, record, the metrics that it shows)
SAMPLES = [
    ("readme", r"TTFT ([\d.]+) ms   ITL ([\d.]+) ms", "02_chat", "ttft_ms itl_ms"),
    (
        "readme",
        r"batches of 8 +([\d.]+).*\nvLLM, continuous batching +([\d.]+).*\n.*transformers: ([\d.]+)x",
        "05_throughput",
        "transformers_tok_per_s vllm_tok_per_s vllm_over_transformers_ratio",
    ),
    (
        "production",
        r"finished (\d+) .* ([\d.]+) tokens/s\n.*\n.*\nTTFT  p50 +([\d.]+) ms   p99 +([\d.]+) ms\nITL   p50 +([\d.]+)",
        "12_load",
        "finished_count generation_tok_per_s ttft_p50_ms ttft_p99_ms itl_p50_ms",
    ),
    ("production", r"a token: ([\d,]+) bytes .*; ITL (\d+) ms\n +4,608 ", "14_two_nodes-pp", "sent_per_token_bytes itl_ms"),
    ("production", r"a token: ([\d,]+) bytes .*; ITL (\d+) ms\n +238,848 ", "14_two_nodes-tp", "sent_per_token_bytes itl_ms"),
]


@pytest.mark.parametrize("page, shown, name, metrics", SAMPLES, ids=[name for _, _, name, _ in SAMPLES])
def test_samples_do_not_contradict_the_tables(page, shown, name, metrics):
    """A sample of output is that of the run whose record the table beside it shows."""
    stored = json.loads((ROOT / f"results/cpu-2c/03_vllm/{name}.json").read_text())["metrics"]
    sample = re.search(shown, (ROOT / f"modules/03_vllm/{page}.md").read_text(encoding="utf-8"))
    assert sample, f"{page}.md shows no such sample: {shown}"
    for text, metric in zip(sample.groups(), metrics.split(), strict=True):
        decimals = len(text.partition(".")[2])
        assert float(text.replace(",", "")) == pytest.approx(stored[metric], abs=0.51 * 10**-decimals), metric


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "self"], ids=lambda b: b.id)
def test_self_blocks_are_run_by_ci(block):
    allowed = [line for line in block.code.splitlines() if line.strip() and not line.startswith("#")]
    ci = (ROOT / ".ci/run").read_text()
    assert all(line.split("  #")[0].strip() in ("make quickstart", "make test", "make test-long") for line in allowed), block.code
    assert all(line.split("  #")[0].strip() in ci for line in allowed)


def dry_run(code: str) -> None:
    """Parse the block; make targets with `make -n`, Python scripts by their --help, which must know every flag."""
    run("bash", "-n", "-c", code, check=0)
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["make"]:
            run("make", "-n", *words[1:], check=0)
        elif words[:1] == ["python"] and words[1:2] and words[1].endswith(".py"):
            text = run("python", words[1], "--help", check=0, PROFILE="4090x2").stdout
            unknown = [w for w in words[2:] if w.startswith("--") and w.split("=")[0] not in text]
            assert not unknown, f"{words[1]} does not know {unknown}"


def execute(block: Block, timeout: int = 900) -> None:
    if block.mark == "gpu" and not GPU or block.mark == "netns" and not network_namespaces():
        dry_run(block.code)
        return
    done = run("bash", "-euo", "pipefail", "-c", block.code, timeout=timeout)
    expected = 2 if block.mark == "exit 2" else 0
    assert done.returncode == expected, f"{block.id}\n{block.code}\nexit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", cases("", "gpu", "exit 2"))
def test_readme(block):
    execute(block)


@pytest.mark.long
@pytest.mark.timeout(2000)  # a point of `make vllm-bench` takes a minute or more on a machine that is slow or busy
@pytest.mark.parametrize("block", cases("long", "netns"))
def test_readme_long(block):
    execute(block, timeout=1900)


# -----------------------------------------------------------------------------
# What the blocks above have made: records under RECORDS, the adapter and the merged model of module 06


def record(name: str) -> dict:
    return json.loads((Path(os.environ["RECORDS"]) / f"{name}.json").read_text())["metrics"]


@pytest.mark.long
def test_the_claims_hold_in_the_records_just_made():
    """Invariants inside each run of module 03's measured claims."""
    paging, prefix, batch, tp = (record(f"03_vllm/{name}") for name in ("06_paging", "07_prefix_caching", "08_batch_one", "10_tensor_parallel_speed"))
    assert paging["contiguous_waste_ratio"] > 0.5 > 0.2 > paging["paged_waste_ratio"] > 0
    assert paging["paged_mean_requests_count"] > 1.5 * paging["contiguous_mean_requests_count"] and paging["paged_over_contiguous_ratio"] > 1.1
    assert prefix["apart_hit_ratio"] == 0 and prefix["shared_hit_ratio"] > 0.8 and prefix["ttft_ratio"] > 1.5
    assert 0 < batch["batch_1_of_bandwidth_ratio"] < 1.5 and batch["batch_32_tok_per_s"] > 2 * batch["batch_1_tok_per_s"]
    assert tp["kv_cache_gain_ratio"] > 1.9 and tp["prefill_gain_ratio"] > 0


@pytest.mark.long
def test_more_load_more_throughput_and_less_goodput():
    """Both sweeps of `make vllm-bench`: nothing failed; what is good is part of what is served; overloaded, few are good."""
    found = record("03_vllm/13_bench")
    points = sorted({re.sub(r"_tok_per_s$", "", name) for name in found if re.fullmatch(r"(concurrency|rate)_\d+_tok_per_s", name)})
    assert found["failed_count"] == 0 and len(points) >= 8
    window_s = min(60, 10 * found["answer_alone_s"])
    for point in points:
        assert found[f"{point}_window_s"] > window_s / 5, "two answers at least, though the rate was a guess"
        assert 0 <= found[f"{point}_goodput_req_per_s"] <= found[f"{point}_req_per_s"]
        assert all(0 < found[f"{point}_{name}_p50_ms"] <= found[f"{point}_{name}_p99_ms"] for name in ("ttft", "itl", "e2e"))
        assert found[f"{point}_ttft_p50_ms"] < found[f"{point}_e2e_p50_ms"]
    assert found["concurrency_16_tok_per_s"] > 1.5 * found["concurrency_1_tok_per_s"]
    assert found["rate_2_req_per_s"] < 4, "an open loop serves what is sent, by chance a little more within a window"
    # The objectives are for people and absolute; on a busy machine none may be met. So hold the run against itself:
    # half of 64 clients wait for a place, which takes longer than what one of them alone would see of any of its parts.
    assert found["concurrency_64_ttft_p50_ms"] > 5 * found["concurrency_1_ttft_p50_ms"]
    assert found["concurrency_64_itl_p50_ms"] > found["concurrency_1_itl_p50_ms"]
    assert found["concurrency_64_good_ratio"] <= found["concurrency_1_good_ratio"]
    knee, loads = found["knee_concurrency_count"], (1, 4, 16, 64)
    good = [load for load in loads if found[f"concurrency_{load}_good_ratio"] >= 0.9]
    assert knee == max(good, default=0)


@pytest.mark.long
@pytest.mark.needs("ip")
def test_two_nodes_compute_what_one_does(two_machines):
    """Every token that of one process; the cable carried what the arithmetic says and the messages around it; nothing was left."""
    pp, tp = record("03_vllm/14_two_nodes-pp"), record("03_vllm/14_two_nodes-tp")
    for found in (pp, tp):
        assert found["same_tokens_ratio"] == 1 and found["left_count"] == 0
        assert 1 < found["sent_per_token_bytes"] / found["payload_per_token_bytes"] < 2.5, "the cable carries the arithmetic's bytes and the messages around them"
    assert tp["sent_per_token_bytes"] > 20 * pp["sent_per_token_bytes"]


@pytest.mark.long
def test_guesses_change_the_speed_and_not_the_answer():
    """Guesses that come from the prompt are taken, those about a sampled story are not; greedy answers stay (bf16: one may differ)."""
    found = record("03_vllm/09_speculative")
    assert found["copies_accepted_ratio"] > 0.5 > 0.3 > found["tells_sampled_accepted_ratio"]
    assert found["copies_speedup_ratio"] > 1.2 and found["copies_speedup_ratio"] > found["tells_sampled_speedup_ratio"]
    assert found["copies_same_count"] >= 2 and found["tells_greedy_same_count"] >= 2


@pytest.mark.long
@pytest.mark.skipif(not machine.fast_bfloat16(), reason="it trains in bfloat16, for which this CPU has no instructions")
def test_the_offloaded_optimizer():
    """Stage 2, the optimizer on the host, bf16: bytes per parameter 2 of bf16, 4 / 2 and 12 / 2 of fp32 over two processes."""
    found = record("05_DeepSpeed/train-z2-offload")
    assert (found["zero_stage"], found["optimizer"], found["dtype"]) == (2, "DeepSpeedCPUAdam", "bfloat16")
    per_parameter = {kind: found[f"{kind}_state_gib"] * 2**30 / found["parameters_count"] for kind in ("parameter", "gradient", "optimizer")}
    assert per_parameter == pytest.approx({"parameter": 2, "gradient": 2, "optimizer": 6}, rel=0.02)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    folder, adapter, requests = json.loads(sys.argv[1])
    llm = LLM(model=folder, dtype="float32", max_model_len=512, enforce_eager=True, enable_lora=bool(adapter))
    chats = [[{"role": "user", "content": r}] for r in requests]
    lora = LoRARequest("launch", 1, adapter) if adapter else None
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False, lora_request=lora)
    print("TEXTS", json.dumps([o.outputs[0].text for o in outputs]))
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.needs("curl")  # the block that merges also asks the merged model by curl
def test_vllm_answers_like_the_merged_model_and_serves_the_adapter_alike(tmp_path):
    """In float32: transformers with the merged weights, vLLM with them, and vLLM with base model and adapter give the same greedy text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, merged = ROOT / "runs/06_LLaMA-Factory/lora", ROOT / "runs/06_LLaMA-Factory/merged"
    requests, tokenizer = prompts(6), AutoTokenizer.from_pretrained(merged)
    answers = greedy(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), tokenizer, requests)
    expected = [tokenizer.decode(tokens) for tokens in answers]
    script = tmp_path / "chat.py"
    script.write_text(VLLM)
    for folder, lora in ((merged, ""), (models.model_folder("smollm2-135m"), adapter)):
        done = run("python", "-m", "lab.profile", "python", script, json.dumps([str(folder), str(lora), requests]), check=0, timeout=600)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("TEXTS ")]
        assert json.loads(line[6:]) == expected, lora


def test_nothing_stays_running_after_the_readmes():
    assert "nothing of this repository is running" in run("make", "stop", check=0).stdout
