"""The report, the progress and the claims: what they say is what the records say."""

import html.parser
import json
import re
import runpy
import shlex
import shutil

import pytest
import yaml
from conftest import ROOT, python, refused, run

TASK = re.compile(r"- \[([ xX])\] (.*?)[：？]`([^`]+)`")
CLAIMS = yaml.safe_load((ROOT / "configs/claims.yaml").read_text())


@pytest.fixture
def records(tmp_path):
    """The committed records of the CPU as if they had been run here."""
    shutil.copytree(ROOT / "results/cpu-2c", tmp_path / "records")
    return tmp_path / "records"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value:
                self.links.append(value)


def test_report(tree, records):
    """`make report`: a section and a plot for every stage that was run, nothing from elsewhere.

    The numbers are the records' own.
    """
    here = {"cwd": tree, "PYTHONPATH": str(tree), "RECORDS": str(records)}
    out = python("scripts/report.py", check=0, **here).stdout
    text = (tree / "runs/report.html").read_text()
    page = Page(text)
    stages = len(list(records.glob("0[1-9]_*")))  # scripts/ holds the doctor's
    assert f"{stages} stages" in out
    assert page.tags.count("h2") == stages + 1 and page.tags.count("svg") >= stages - 1
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "<script" not in text and "@import" not in text

    def metrics(name: str) -> dict:
        return json.loads((records / f"{name}.json").read_text())["metrics"]

    read = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))  # as a person reads it
    ratio = metrics("03_vllm/05_throughput")["vllm_over_transformers_ratio"]
    tuned = metrics("06_LLaMA-Factory/02_score")["tuned_exact_pct"]
    assert f"{ratio:.4g} 倍" in read and f"{tuned:.4g} % 微调后" in read
    for stage in range(4):
        assert f"ZeRO-{stage}" in text


def test_report_of_nothing(tree, tmp_path):
    assert "nothing has been run here yet" in refused(
        "python", "scripts/report.py", cwd=tree, PYTHONPATH=str(tree), RECORDS=str(tmp_path)
    )


def progress(tree, *stage, **environment) -> str:
    environment = {"RECORDS": str(tree / "runs/records"), "PYTHONPATH": str(tree)} | environment
    return python("scripts/progress.py", *stage, cwd=tree, check=0, **environment).stdout


def done(tree, stage: str) -> list[str]:
    """Commands of the stage's tasks that are done."""
    return re.findall(
        r"(?m)^    \[x\] .*?: ((?:PROFILE|make|python|curl|diff|cd|accelerate).*)$",
        progress(tree, stage),
    )


def following(tree, *stage, **environment) -> list[str]:
    return re.findall(r"(?m)^next: (.+)$", progress(tree, *stage, **environment))


def ran(tree, command: str, make: str = "", profile: str = "cpu") -> None:
    """As a script of ours notes that it has done its work."""
    file = tree / "runs/records/history.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(json.dumps({"profile": profile, "command": command, "make": make}) + "\n")


def test_progress(tree):
    """A task is done by its own command with its flags and profile, by its file, or by a tick."""
    tasks = {f.parent.name: f.read_text().count("- [ ] ") for f in tree.glob("modules/*/PLAN.md")}
    out = progress(tree)
    assert all(re.search(rf"(?m)^{stage} .* 0/{count}$", out) for stage, count in tasks.items()), (
        "a task that is not read, or done for nothing"
    )
    records = {"RECORDS": str(tree / "runs/records")}
    python(
        "modules/05_DeepSpeed/01_state_bytes.py",
        "--parameters",
        "1e9",
        cwd=tree,
        check=0,
        PYTHONPATH=str(tree),
        **records,
    )
    assert done(tree, "05_DeepSpeed") == ["python modules/05_DeepSpeed/01_state_bytes.py"]
    run(
        "make",
        "-f",
        ROOT / "Makefile",
        "-C",
        ROOT,
        "zero-theory",
        "ARGS=--processes 64",
        check=0,
        **records,
    )
    assert done(tree, "05_DeepSpeed")[1:] == [
        "python modules/05_DeepSpeed/01_state_bytes.py --processes 64"
    ]
    ran(tree, "modules/05_DeepSpeed/train.py --local_rank=0 --deepspeed ds_config.json")
    assert done(tree, "05_DeepSpeed")[2:] == [
        "cd modules/05_DeepSpeed && deepspeed --num_gpus=2 train.py --deepspeed ds_config.json"
    ]
    (tree / "runs/my_config.yaml").touch()
    assert not done(tree, "04_Accelerate"), "an empty file"
    (tree / "runs/my_config.yaml").write_text("distributed_type: MULTI_CPU\n")
    assert done(tree, "04_Accelerate") == ["accelerate config --config_file runs/my_config.yaml"]
    plan = tree / "modules/01_single_gpu_smoke/PLAN.md"
    plan.write_text(plan.read_text().replace("- [ ] 跑通", "- [x] 跑通"))
    assert done(tree, "01_single_gpu_smoke") == ["make smoke"]
    assert "unknown stage 09" in refused(
        "python", "scripts/progress.py", "09", cwd=tree, PYTHONPATH=str(tree), **records
    )


def test_a_dry_run_is_not_the_run(tree):
    dry = "modules/03_vllm/01_serve.py --recipe 32b-awq-tp2 --dry-run"
    ran(tree, dry, profile="4090x2")
    ran(tree, "modules/03_vllm/01_serve.py --dry-run", "vllm-serve ARGS=--dry-run", "4090x2")
    assert done(tree, "03_vllm") == [f"PROFILE=4090x2 python {dry}"]


def test_progress_names_one_next_step(tree):
    """After set-up, after a quickstart, and on a machine that cannot do what is left."""
    assert following(tree) == ["make setup"]
    (tree / ".venv").mkdir()
    (tree / ".venv/.videofen-setup").touch()
    assert following(tree) == ["make setup"], "an interrupted set-up"
    (tree / ".venv/.videofen-setup").write_text("cpu 0123456789abcdef\n")
    assert following(tree) == ["make doctor"]
    for stage in runpy.run_path(str(ROOT / "scripts/quickstart.py"), run_name="imported")[
        "STAGES"
    ].values():
        ran(tree, "modules/xx.py", shlex.join(stage.target))
    assert following(tree) == ["make doctor"]
    assert following(tree, "04_Accelerate") == [
        "python modules/04_Accelerate/01_train_ddp.py --micro-batch 4"
    ]
    assert [len(done(tree, f.parent.name)) for f in sorted(tree.glob("modules/*/PLAN.md"))] == [
        3,
        1,
        1,
        1,
        1,
        1,
    ]
    plan = tree / "modules/04_Accelerate/PLAN.md"
    plan.write_text(re.sub(r"- \[ \] (?!（4090x2）)", "- [x] ", plan.read_text()))
    assert following(tree, "04_Accelerate", PROFILE="cpu") == [
        "nothing is left to do here in 04_Accelerate"
    ]
    assert following(tree, "04_Accelerate", PROFILE="4090x2") == [
        "PROFILE=4090x2 make train-accelerate"
    ]


def test_tasks_that_want_two_cards(tree):
    """On one card the next step is never one that has to be refused.

    The Makefile says which targets start two processes.
    """
    script = runpy.run_path(str(ROOT / "scripts/progress.py"), run_name="imported")
    makefile = (ROOT / "Makefile").read_text()
    two = re.findall(
        r"(?m)^([a-z0-9-]+): env .*\n\t(?:.*\\\n)*.*"
        r"(?:PROCESSES\),2|\$\(DEEPSPEED\)|\$\(LAUNCH\)|--zero2)",
        makefile,
    )
    two += re.findall(r"(?m)^(train-accelerate|train-z3-offload):", makefile)
    two += ["vllm-tp", "train-faults"]
    assert {
        "train-ddp",
        "train-z0",
        "train-z2-offload",
        "lf-train-z2",
        "mini-tp",
        "vllm-tp",
    } <= set(two)
    for target in re.findall(r"(?m)^([a-z0-9-]+): env", makefile):
        assert bool(script["DIVIDED"].search(f"make {target}")) == (target in two), target
    one = tree / "configs/profiles/one.yaml"
    one.write_text(
        (tree / "configs/profiles/cpu.yaml").read_text()
        + "\nrequires: {gpus: 1, gpu_memory_gib: 22}\n"
    )
    assert following(tree, "05_DeepSpeed", PROFILE="one") == [
        "python modules/05_DeepSpeed/01_state_bytes.py"
    ]
    for name in ("05_DeepSpeed", "04_Accelerate"):
        for line in re.findall(
            r"`(python modules/.*?)`", (tree / f"modules/{name}/PLAN.md").read_text()
        ):
            ran(tree, line.removeprefix("python "), profile="one")
    # Arithmetic needs no card at all.
    assert following(tree, "05_DeepSpeed", PROFILE="one")[0].startswith("make which-way")
    assert following(tree, "04_Accelerate", PROFILE="one")[0].startswith("diff ")
    assert "PROFILE=two" in refused(
        "python", "scripts/progress.py", cwd=tree, PYTHONPATH=str(tree), PROFILE="two"
    )


def tasks() -> list[str]:
    commands = []
    for plan in sorted(ROOT.glob("modules/*/PLAN.md")):
        for task in TASK.finditer(plan.read_text()):
            commands.append(pytest.param(task[3], id=f"{plan.parent.name}-{task[3][:60]}"))
    return commands


@pytest.mark.parametrize("command", tasks())
def test_every_task_leaves_a_trace(command):
    """What PLAN.md asks to run ends in a note of ours, or in a file under runs/."""
    parts = [word for word in shlex.split(command) if not word.startswith("PROFILE=")]
    if command == "make setup" or parts[-1].startswith("runs/"):
        return
    if parts[0] == "make":
        command = run("make", "-n", *parts[1:], check=0).stdout
    if command.startswith("cd modules/05_DeepSpeed && "):
        command = command.replace(" train.py", " modules/05_DeepSpeed/train.py")
    scripts = re.findall(r"[\w/.-]+\.py", command)
    assert scripts, command
    source = (ROOT / scripts[-1]).read_text()
    assert re.search(r"results\.(note|finish)\(", source), scripts


@pytest.mark.parametrize("readme, language", [("README.md", "zh"), ("README.en.md", "en")])
def test_claims(readme, language):
    """Each claim has its row, a sentence that links to it, a number where it was measured."""
    text = (ROOT / readme).read_text()
    table = re.search(r"<!-- claims .*?<!-- /claims -->", text, re.S)[0]
    rows = {m[1]: m[0] for m in re.finditer(r'(?m)^\| <a id="claim-([\w-]+)"></a>.*$', table)}
    assert list(rows) == [entry["id"] for entry in CLAIMS] and len(rows) >= 18
    linked = set(re.findall(r"\(#claim-([\w-]+)\)", text.replace(table, "")))
    assert linked == set(rows), linked ^ set(rows)
    for entry in CLAIMS:
        cells = rows[entry["id"]].strip("| ").split(" | ")
        assert entry["claim"][language] in cells[0]
        assert cells[-1] in {"实测", "引用", "待测", "measured", "cited", "not yet"}
        assert (cells[-1] in ("实测", "measured")) == bool(re.search(r"`[\w-]+`: .*\d", cells[1]))


def test_claims_go_by_records_that_exist_or_will():
    """A claim's record is of a script of ours; where a machine has it, it has the metric."""
    for entry in CLAIMS:
        assert set(entry) <= {"id", "claim", "measured", "source", "precisely"}
        assert set(entry["claim"]) == set(entry["precisely"]) == {"zh", "en"}
        for measure in entry.get("measured", []):
            script = re.sub(r"train-.*", "train", measure["record"])
            assert (ROOT / "modules" / f"{script}.py").is_file(), script
            files = list(ROOT.glob(f"results/*/{measure['record']}.json"))
            stored = [json.loads(file.read_text())["metrics"] for file in files]
            assert not stored or any(measure["metric"] in metrics for metrics in stored), measure
