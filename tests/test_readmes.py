"""The readmes are the test suite: every `bash` block is executed in order, from the repository root, under this machine's profile.

An HTML comment before a block marks the exceptions: <!-- long --> runs in `make test-long`; <!-- gpu --> is executed where the
4090x2 profile's GPUs are and elsewhere parsed and dry-run; <!-- self --> holds only `make test` and `make quickstart`, which
.ci/run runs. <!-- exit 2 --> says that the commands must be refused.
"""

import json
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, run

from lab.profile import detect

README_FILES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("modules/*/readme.md")])
FENCE = re.compile(r"^ *(?:<!-- (?P<mark>long|gpu|self|exit 2) -->\n *)?(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^ *(?P=fence)$", re.M | re.S)


@dataclass
class Block:
    file: str
    line: int
    mark: str
    code: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for file in README_FILES:
        text = file.read_text(encoding="utf-8")
        for m in FENCE.finditer(text):
            if m["language"] == "bash":
                found.append(Block(str(file.relative_to(ROOT)), text[: m.start("code")].count("\n"), m["mark"] or "", textwrap.dedent(m["code"])))
    return found


BLOCKS = blocks()
GPU = detect() != "cpu"


def test_every_block_is_seen():
    """The runner's own coverage: as many blocks as a plain count of fences, none of a language that would escape it."""
    for file in README_FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("```bash\n") == sum(b.file == str(file.relative_to(ROOT)) for b in BLOCKS), file
        assert len(re.findall(r"^ *```", text, re.M)) % 2 == 0, file
        assert not re.findall(r"^ *```(?:sh|shell|console|zsh)\n", text, re.M), f"{file}: use bash for what is run, text for what appears"
        assert not re.findall(r"<!-- (?!long|gpu|self|exit 2|table |/table|[^a-z])(\w+) -->\n *```", text), f"{file}: unknown mark"


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


def execute(block: Block) -> None:
    if block.mark == "gpu" and not GPU:
        dry_run(block.code)
        return
    done = run("bash", "-euo", "pipefail", "-c", block.code, timeout=900)
    expected = 2 if block.mark == "exit 2" else 0
    assert done.returncode == expected, f"{block.id}\n{block.code}\nexit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark not in ("self", "long")], ids=lambda b: b.id)
def test_readme(block):
    execute(block)


@pytest.mark.long
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "long"], ids=lambda b: b.id)
def test_readme_long(block):
    execute(block)


@pytest.mark.long
def test_the_claims_hold_in_the_records_just_made():
    """Invariants inside each run of module 03's measured claims: the blocks above wrote the records."""
    paging, prefix, batch = (json.loads((Path(os.environ["RECORDS"]) / f"03_vllm/{name}.json").read_text())["metrics"] for name in ("09_paging", "10_prefix_caching", "11_batch_one"))
    assert paging["contiguous_waste_ratio"] > 0.5 > 0.2 > paging["paged_waste_ratio"] > 0
    assert paging["paged_mean_requests_count"] > 1.5 * paging["contiguous_mean_requests_count"] and paging["paged_over_contiguous_ratio"] > 1.1
    assert prefix["apart_hit_ratio"] == 0 and prefix["shared_hit_ratio"] > 0.8 and prefix["ttft_ratio"] > 1.5
    pp, tp = (json.loads((Path(os.environ["RECORDS"]) / f"03_vllm/14_two_nodes-{name}.json").read_text())["metrics"] for name in ("pp", "tp"))
    for found in (pp, tp):
        assert found["same_tokens_ratio"] == 1 and found["left_count"] == 0
        assert 1 < found["sent_per_token_bytes"] / found["payload_per_token_bytes"] < 2.5, "the cable carries the arithmetic's bytes and the messages around them"
    assert tp["sent_per_token_bytes"] > 20 * pp["sent_per_token_bytes"]
    assert 0 < batch["batch_1_of_bandwidth_ratio"] < 1.5 and batch["batch_32_tok_per_s"] > 2 * batch["batch_1_tok_per_s"]


def test_nothing_stays_running_after_the_readmes():
    assert "nothing of this repository is running" in run("make", "stop", check=0).stdout
