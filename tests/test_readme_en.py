"""The two READMEs say the same, and what they say of files and downloads is true."""

import re

import pytest
from conftest import ROOT
from readmes import FENCE

from lab.profile import FOLDER, read_yaml

CHINESE, ENGLISH = "README.md", "README.en.md"
READMES = (CHINESE, ENGLISH)
PROFILES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def whole(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """Without code blocks, and without the claims, which are generated alike."""
    text = re.sub(FENCE, "", whole(name))
    return re.sub(r"(?s)<!-- claims .*?<!-- /claims -->", "", text)


def headings(name: str) -> list[str]:
    return re.findall(r"(?m)^(#+) ", prose(name))


def blocks(name: str) -> list[tuple]:
    """Each block's mark and language, and what is run in it, or how many lines it shows."""
    described = []
    for block in FENCE.finditer(whole(name)):
        code = re.sub(r"(?m) +# .*$", "", block["code"])
        same = code if block["language"] == "bash" else len(code.splitlines())
        described.append((block["mark"], block["language"], same))
    return described


def tables(name: str) -> list[list[tuple]]:
    """Of each table, each row's number of cells, and its commands."""
    described = []
    for table in re.findall(r"(?m)(?:^\|.*\n)+", prose(name)):
        rows = [(row.count("|"), re.findall(r"`(make [^`]*)`", row)) for row in table.splitlines()]
        described.append(rows)
    return described


def generated(name: str) -> list[tuple]:
    """Records and metrics of the tables that are written from records."""
    comments = re.findall(r"(?s)<!-- (table|claims) (\S+)\n?(.*?)-->", whole(name))
    return [
        (kind, record if kind == "table" else "", re.findall(r"(?m)^(\w+) =", rows))
        for kind, record, rows in comments
    ]


def links(name: str) -> list[str]:
    """Files, and claims, that the text leads to, in order; the other README and headings aside."""
    every = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    return [link for link in every if link not in READMES and not re.match(r"#(?!claim-)", link)]


@pytest.mark.parametrize("part", [headings, blocks, tables, generated, links])
def test_both_hold_the_same(part):
    assert part(CHINESE) == part(ENGLISH)
    assert len(part(CHINESE)) >= (2 if part is generated else 6)


def test_each_is_in_its_language():
    english = re.sub(r"你好|中文", "", whole(ENGLISH))
    assert not re.findall(r"[\u4e00-\u9fff]+", english)
    assert len(re.findall(r"[\u4e00-\u9fff]", prose(CHINESE))) > 1500


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = whole(name)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        assert not path or (ROOT / path).exists(), link
        if not path and not anchor.startswith("claim-"):
            titles = [t.lower().replace(" ", "-") for t in re.findall(r"(?m)^#+ (.*)$", text)]
            assert anchor in titles, link


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("profile", PROFILES)
def test_what_quickstart_downloads(profile, name, monkeypatch):
    """The table of machines has a row for each profile, with the gigabytes that its models are."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import download
    import quickstart
    from omegaconf import OmegaConf

    sections = tuple(stage.section for stage in quickstart.STAGES.values())
    values = OmegaConf.create({"name": profile, **read_yaml(FOLDER / f"{profile}.yaml")})
    gigabytes = download.listing(values, sections)[1]
    row = re.search(rf"(?m)^\|[^|]*\| `{profile}` \| (\d+(?:\.\d)?) GB", whole(name))
    assert row and float(row[1]) == round(gigabytes, 1)
