"""The readmes are the test suite: every `bash` block is executed in order, from the repository
root, under this machine's profile. What the marks before a block mean says readmes.py.
"""

import json
import re
import shlex

import pytest
from conftest import ROOT, network_namespaces, run
from readmes import BLOCKS, GPU, MARK, README_FILES, Block, anchors, prose


def cases(*marks: str) -> list:
    """The blocks that carry one of the marks, as parameters of a test.

    README.en.md's are README.md's (test_readme_en).
    """
    chosen = [block for block in BLOCKS if block.mark in marks and block.file != "README.en.md"]
    return [pytest.param(block, id=block.id, marks=block.needs) for block in chosen]


# -----------------------------------------------------------------------------
# The runner's own coverage


@pytest.mark.parametrize("file", README_FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_block_is_seen(file):
    """As many blocks as a plain count of fences, none of a language that would escape it."""
    text = file.read_text(encoding="utf-8")
    seen = [block for block in BLOCKS if block.file == str(file.relative_to(ROOT))]
    assert text.count("```bash\n") == len(seen)
    assert len(re.findall(r"^ *```", text, re.M)) % 2 == 0
    escaping = re.findall(r"^ *```(?:sh|shell|console|zsh)\n", text, re.M)
    assert not escaping, "use bash for what is run, text for what appears"
    before_a_block = re.findall(r"(<!-- [^\n]* -->)\n *```", text)
    unknown = [mark for mark in before_a_block if not re.fullmatch(f"{MARK}|<!-- /table -->", mark)]
    assert not unknown, f"unknown marks {unknown}"


def test_every_page_is_walked():
    """A page to which its readme does not link would not be executed, and nobody would find it."""
    tutorials = {file for file in ROOT.glob("modules/*/*.md") if file.name != "PLAN.md"}
    assert tutorials == set(README_FILES) - set(ROOT.glob("README*.md"))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "self"], ids=lambda b: b.id)
def test_self_blocks_are_run_by_ci(block):
    commands = [line.split("  #")[0].strip() for line in block.code.splitlines()]
    commands = [command for command in commands if command and not command.startswith("#")]
    assert set(commands) <= {"make quickstart", "make test", "make test-long"}
    ci = (ROOT / ".ci/run").read_text()
    assert all(command in ci for command in commands)


def test_what_is_shortened_is_a_make_target_that_takes_it():
    """ARGS of a mark reaches every target of its block, and none that has ARGS of its own."""
    shortened = [block for block in BLOCKS if block.arguments]
    assert shortened
    for block in shortened:
        assert block.mark == "long", block.id
        commands = [line.partition("#")[0].strip() for line in block.code.splitlines()]
        for command in filter(None, commands):
            plain = r'make [a-z0-9-]+( (?!ARGS)[A-Z]+=("[a-z0-9_ ]+"|\w+))*'
            assert re.fullmatch(plain, command), f"{block.id}: {command}"
            words = shlex.split(command)[1:]
            recipe = run("make", "-n", *words, check=0, ARGS=block.arguments).stdout
            assert block.arguments in recipe, f"{block.id}: {command}"


# -----------------------------------------------------------------------------
# Links, and samples of output


@pytest.mark.parametrize(
    "file", [*README_FILES, *ROOT.glob("modules/*/PLAN.md")], ids=lambda f: str(f.relative_to(ROOT))
)
def test_links_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file.read_text(encoding="utf-8"))):
        path, _, place = target.partition("#")
        if ":" in path:  # of another site
            continue
        there = file.parent / path if path else file
        assert there.exists(), f"{target}: there is no such file"
        if place:
            assert place in anchors(there.read_text(encoding="utf-8")), f"{target}: no such heading"


# Samples of output that stand beside a table: page, what is shown, record, the metrics in it
SAMPLES = [
    ("readme", r"TTFT ([\d.]+) ms   ITL ([\d.]+) ms", "02_chat", "ttft_ms itl_ms"),
    (
        "readme",
        r"batches of 8 +([\d.]+).*\n +vLLM, continuous batching +([\d.]+).*\n"
        r".*transformers: ([\d.]+)x",
        "05_throughput",
        "transformers_tok_per_s vllm_tok_per_s vllm_over_transformers_ratio",
    ),
    (
        "production",
        r"finished (\d+) .* ([\d.]+) tokens/s\n.*\n.*\n"
        r"TTFT  p50 +([\d.]+) ms   p99 +([\d.]+) ms\nITL   p50 +([\d.]+)",
        "12_load",
        "finished_count generation_tok_per_s ttft_p50_ms ttft_p99_ms itl_p50_ms",
    ),
    (
        "production",
        r"a token: ([\d,]+) bytes .*; ITL (\d+) ms\n +4,608 ",
        "14_two_nodes-pp",
        "sent_per_token_bytes itl_ms",
    ),
    (
        "production",
        r"a token: ([\d,]+) bytes .*; ITL (\d+) ms\n +238,848 ",
        "14_two_nodes-tp",
        "sent_per_token_bytes itl_ms",
    ),
]


@pytest.mark.parametrize("page, shown, name, metrics", SAMPLES, ids=[row[2] for row in SAMPLES])
def test_samples_do_not_contradict_the_tables(page, shown, name, metrics):
    """A sample of output is that of the run whose record the table beside it shows."""
    stored = json.loads((ROOT / f"results/cpu-2c/03_vllm/{name}.json").read_text())["metrics"]
    sample = re.search(shown, (ROOT / f"modules/03_vllm/{page}.md").read_text(encoding="utf-8"))
    assert sample, f"{page}.md shows no such sample: {shown}"
    for text, metric in zip(sample.groups(), metrics.split(), strict=True):
        half_a_digit = 0.51 * 10 ** -len(text.partition(".")[2])
        number = float(text.replace(",", ""))
        assert number == pytest.approx(stored[metric], abs=half_a_digit), metric


# -----------------------------------------------------------------------------
# The blocks, executed


def dry_run(code: str) -> None:
    """Parse the block: make targets by `make -n`, scripts by --help, which must know every flag."""
    run("bash", "-n", "-c", code, check=0)
    for line in code.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        while command and re.fullmatch(r"\w+=.*", command[0]):
            command = command[1:]
        if command[:1] == ["make"]:
            run("make", "-n", *command[1:], check=0)
        elif command[:1] == ["python"] and command[1:2] and command[1].endswith(".py"):
            known = run("python", command[1], "--help", check=0, PROFILE="4090x2").stdout
            flags = [word.split("=")[0] for word in command[2:] if word.startswith("--")]
            unknown = [flag for flag in flags if flag not in known]
            assert not unknown, f"{command[1]} does not know {unknown}"


def execute(block: Block) -> None:
    if block.mark == "gpu" and not GPU or block.mark == "netns" and not network_namespaces():
        dry_run(block.code)
        return
    shortened = {"ARGS": block.arguments} if block.arguments else {}
    done = run("bash", "-euo", "pipefail", "-c", block.code, **shortened)
    expected = 2 if block.mark == "exit 2" else 0
    assert done.returncode == expected, (
        f"{block.id}\n{block.code}\nexit code {done.returncode}\n"
        f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )


@pytest.mark.parametrize("block", cases("", "gpu", "exit 2"))
def test_readme(block):
    execute(block)


@pytest.mark.long
@pytest.mark.parametrize("block", cases("long", "netns"))
def test_readme_long(block):
    execute(block)


def test_nothing_stays_running_after_the_readmes():
    assert "nothing of this repository is running" in run("make", "stop", check=0).stdout
