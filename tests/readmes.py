"""The readmes and pages, their blocks of code and their marks, as several tests read them.

A module's readme comes first, then the pages beside it, in the order in which it links to them.

An HTML comment before a block marks the exceptions:
    <!-- long -->               runs in `make test-long`
    <!-- long ARGS="..." -->    there with these arguments more: a training of fewer steps
    <!-- netns -->              long, executed without a GPU and where network namespaces can be
                                made (by root, or where users may), elsewhere dry-run
    <!-- gpu -->                executed where the 4090x2 profile's GPUs are, elsewhere parsed and
                                dry-run
    <!-- self -->               only `make test` and `make quickstart`, which .ci/run runs
    <!-- exit 2 -->             the commands must be refused
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PACKAGES, ROOT

from lab import machine
from lab.profile import detect


def pages(readme: Path) -> list[Path]:
    """A module's readme, then the pages that it links to, in that order."""
    linked = re.findall(r"\]\((\w+\.md)[#)]", readme.read_text(encoding="utf-8"))
    return [readme, *(readme.parent / name for name in dict.fromkeys(linked) if name != "PLAN.md")]


MODULE_READMES = sorted(ROOT.glob("modules/*/readme.md"))
README_FILES = [
    *sorted(ROOT.glob("README*.md")),
    *(page for readme in MODULE_READMES for page in pages(readme)),
]
GPU = detect() == "4090x2"  # what the blocks marked gpu ask for
MARK = r'<!-- (?P<mark>long|netns|gpu|self|exit 2)(?: ARGS="(?P<arguments>[^"\n]+)")? -->'
FENCE = re.compile(
    rf"^ *(?:{MARK}\n *)?(?P<fence>```+)(?P<language>\w*)\n(?P<code>.*?)^ *(?P=fence)$",
    re.M | re.S,
)
# What trains in bfloat16 whatever the profile says: hours on a CPU without instructions for it.
BFLOAT16 = re.compile(r"train-mixed|ds_config\.json|train-z2-offload")
# Targets that start a program of a Debian package.
STARTED_BY = {"make monitor": "prometheus", "make two-nodes": "ip", "make train-two-machines": "ip"}
STARTED_BY["make train-z3-nvme"] = "libaio.h"


@dataclass
class Block:
    file: str  # from the repository root
    line: int
    mark: str
    arguments: str  # of make, by which the tests shorten what a reader runs whole
    code: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def needs(self) -> list:
        """The marks of a test that executes it: programs of Debian packages, bfloat16."""
        if self.mark == "gpu" and not GPU:
            return []
        begins = {name: name for name in PACKAGES} | STARTED_BY
        programs = [
            program
            for command, program in begins.items()
            if re.search(rf"^ *{command}\b", self.code, re.M)
        ]
        marks = [pytest.mark.needs(*programs)]
        if BFLOAT16.search(self.code) and not machine.fast_bfloat16():
            reason = "it trains in bfloat16, for which this CPU has no instructions"
            marks.append(pytest.mark.skip(reason))
        return marks


def blocks_of(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    name = str(file.relative_to(ROOT))
    return [
        Block(
            file=name,
            line=text[: block.start("code")].count("\n"),
            mark=block["mark"] or "",
            arguments=block["arguments"] or "",
            code=textwrap.dedent(block["code"]),
        )
        for block in FENCE.finditer(text)
        if block["language"] == "bash"
    ]


BLOCKS = [block for file in README_FILES for block in blocks_of(file)]


def prose(text: str) -> str:
    """Markdown without its code and its comments."""
    return re.sub(r"^ *(```+).*?^ *\1$|<!--.*?-->", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """What a link into this Markdown may name: headings as GitHub writes them, and ids."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    shown = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in shown}
    return slugs | set(re.findall(r'id="([^"]+)"', text))
