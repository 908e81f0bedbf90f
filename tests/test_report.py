"""The report, the progress and the claims: what they say is what the records say."""

import html.parser
import json
import re
import shutil

import pytest
import yaml
from conftest import ROOT, python, refused, run

CLAIMS = yaml.safe_load((ROOT / "configs/claims.yaml").read_text())


@pytest.fixture
def records(tmp_path):
    """The committed records of the CPU as if they had been run here."""
    shutil.copytree(ROOT / "results/cpu-2c", tmp_path / "records")
    return tmp_path / "records"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.words.append(data)


def test_report(tree, records):
    """`make report`: a section for every stage that was run, a plot each, the records' own numbers, and nothing from elsewhere."""
    out = python("scripts/report.py", cwd=tree, PYTHONPATH=str(tree), RECORDS=str(records), check=0).stdout
    text = (tree / "runs/report.html").read_text()
    page, words = Page(text), re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    stages = len(list(records.glob("0[1-9]_*")))  # scripts/ holds the doctor's
    assert f"{stages} stages" in out and page.tags.count("h2") == stages + 1 and page.tags.count("svg") >= stages - 1
    assert all(link.startswith(("#", "data:")) for link in page.links) and "<script" not in text and "@import" not in text
    metrics = {name: json.loads((records / f"{name}.json").read_text())["metrics"] for name in ("03_vllm/05_throughput", "06_LLaMA-Factory/02_score", "05_DeepSpeed/train-z2")}
    assert f"{metrics['03_vllm/05_throughput']['vllm_over_transformers_ratio']:.4g} 倍" in words
    assert f"{metrics['06_LLaMA-Factory/02_score']['tuned_exact_pct']:.4g} % 微调后" in words
    for stage in range(4):
        assert f"ZeRO-{stage}" in text


def test_report_of_nothing(tree, tmp_path):
    assert "nothing has been run here yet" in refused("python", "scripts/report.py", cwd=tree, PYTHONPATH=str(tree), RECORDS=str(tmp_path))


def test_progress(tree, tmp_path):
    """A task is done by its own command, with its own flags and profile, or by a tick."""
    environment = {"cwd": tree, "PYTHONPATH": str(tree), "RECORDS": str(tmp_path / "records")}

    def done(stage: str) -> list[str]:
        out = python("scripts/progress.py", stage, check=0, **environment).stdout
        return re.findall(r"(?m)^    \[x\] .*: (.+)$", out)

    tasks = {f.parent.name: f.read_text().count("- [ ] ") for f in tree.glob("modules/*/PLAN.md")}
    out = python("scripts/progress.py", check=0, **environment).stdout
    assert all(re.search(rf"(?m)^{stage} .* 0/{count} ", out) for stage, count in tasks.items()), "a task that is not read, or done for nothing"
    python("modules/05_DeepSpeed/01_state_bytes.py", "--parameters", "1e9", check=0, **environment)
    assert done("05_DeepSpeed") == ["python modules/05_DeepSpeed/01_state_bytes.py"]
    run("make", "-f", ROOT / "Makefile", "-C", ROOT, "zero-theory", "ARGS=--processes 64", check=0, RECORDS=str(tmp_path / "records"))
    assert done("05_DeepSpeed")[1:] == ["python modules/05_DeepSpeed/01_state_bytes.py --processes 64"]
    plan = tree / "modules/01_single_gpu_smoke/PLAN.md"
    plan.write_text(plan.read_text().replace("- [ ] 装好", "- [x] 装好"))
    assert done("01_single_gpu_smoke") == ["make setup"]
    assert "unknown stage 09" in refused("python", "scripts/progress.py", "09", **environment)


@pytest.mark.parametrize("readme, language", [("README.md", "zh"), ("README.en.md", "en")])
def test_claims(readme, language):
    """Each claim has its row, and a sentence outside the table that links to it; a measured one has a number."""
    text = (ROOT / readme).read_text()
    table = re.search(r"<!-- claims .*?<!-- /claims -->", text, re.S)[0]
    rows = {m[1]: m[0] for m in re.finditer(r'(?m)^\| <a id="claim-([\w-]+)"></a>.*$', table)}
    assert list(rows) == [entry["id"] for entry in CLAIMS] and len(rows) >= 18
    linked = set(re.findall(r"\(#claim-([\w-]+)\)", text.replace(table, "")))
    assert linked == set(rows), linked ^ set(rows)
    for entry in CLAIMS:
        cells = rows[entry["id"]].strip("| ").split(" | ")
        assert entry["claim"][language] in cells[0] and cells[-1] in ("实测", "引用", "待测", "measured", "cited", "not yet")
        assert (cells[-1] in ("实测", "measured")) == bool(re.search(r"`[\w-]+`: .*\d", cells[1]))


def test_claims_go_by_records_that_exist_or_will():
    """A claim's record is of a script of ours, and where a machine has the record, it has the metric."""
    for entry in CLAIMS:
        assert set(entry) <= {"id", "claim", "measured", "source", "precisely"} and set(entry["claim"]) == set(entry["precisely"]) == {"zh", "en"}
        for measure in entry.get("measured", []):
            script = re.sub(r"train-.*", "train", measure["record"])
            assert (ROOT / "modules" / f"{script}.py").is_file(), script
            found = [json.loads(f.read_text())["metrics"] for f in ROOT.glob(f"results/*/{measure['record']}.json")]
            assert not found or any(measure["metric"] in metrics for metrics in found), measure
