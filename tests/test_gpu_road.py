"""A reader's way through the readmes on two RTX 4090s, over stand-ins of the engines.

Every block that runs there, in its order. Real here: bash, make, every script of the repository up
to its first computation (arguments, profile, detection, the refusal of cards that a server holds,
jobs, `make stop`), and every client of a server. Stand-ins (tests/fakes/engines): vLLM's server,
which is real HTTP, holds its cards, and takes the flags of the locked vLLM; the launchers;
LLaMA-Factory's command line with its settings' names; the hub, which has the models of
configs/models.yaml. An import of torch is where a script ends.

So order, names, models and flags are proved. Not: that anything computes, fits the memory or is
fast, nor what a script does with its results (the same blocks run for real, with the cpu profile
here and on GPUs there, in test_readmes.py).
"""

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, run
from readmes import BLOCKS

from lab import engine, jobs
from lab import machine as lab_machine

CARD = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 23.99, "capability": [8, 9]}
COMMANDS = [
    "torchrun",
    "deepspeed",
    "accelerate",
    "llamafactory-cli",
    "prometheus",
    "nvitop-exporter",
    "nvidia-smi",
    "nvitop",
    "gpustat",
]
COMPUTE = [
    "torch",
    "peft",
    "diffusers",
    "deepspeed",
    "accelerate",
    "llamafactory",
    "pytest",
    "bitsandbytes",
]
LEFT_OUT = {  # lines of blocks: why
    r"make doctor\b.*": "its checks do things with the cards; tests/test_doctor.py",
    r"make calibrate .*--only.*": "measures in processes of its own, which compute nothing here",
    r"make zero-buckets\b.*": "compares trainings, which compute nothing here",
    r"make train-compare\b.*": "compares the records of trainings, which compute nothing here",
    r"make vllm-serve .*# 老师": "the page's own machine has merged nothing",
    r"make lf-distill\b.*": "keeps answers by their content, which stand-ins do not have",
    r"make lf-check-data FILE=runs/06_LLaMA-Factory/distilled/.*": "the same",
    r"make lf-(loop|methods|sweep|weekly)\b.*": "go by what their steps compute, nothing here",
    r"make lf-export(?!.*nothing).*": "reads merged weights, and a stand-in merges none",
    r"make lf-quantise(?!.*nothing).*": "reads merged weights, and a stand-in merges none",
    r"make lf-evaluate\b.*": "compares a tuned model, and the page's own machine has none",
    r"make (mini|lf)-grpo\b.*": "begins at merged weights, and a stand-in merges none",
    r"make lf-train .*dataset_dir=runs/my_data.*": "its entry is written by LLaMA-Factory's reader",
}
PORTS = (8000, 8001, 8010, 7860, 9090, 5050)  # a server of the reader's own may have them
FILES = sorted({block.file for block in BLOCKS} - {"README.en.md"})  # README.md's blocks


def moved(text: str, ports: dict[int, int]) -> str:
    return re.sub(r"\b\d{4}\b", lambda m: str(ports.get(int(m[0]), m[0])), text)


class Machine:
    """A copy of the repository in `folder`, on a machine with two 4090s and free ports."""

    def __init__(self, folder: Path):
        self.tree = folder / "videofen"
        self.meet = folder / "meet"
        self.ports = {port: jobs.free_port() for port in PORTS}
        listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", check=0).stdout
        for name in listed.split("\0"):
            if name and (ROOT / name).is_file() and not name.startswith("results/"):
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        for file in [
            self.tree / "modules/03_vllm/11_monitor.py",
            *self.tree.glob("configs/profiles/*.yaml"),
        ]:
            file.write_text(moved(file.read_text(), self.ports))
        (self.tree / "scripts/setup.sh").write_text("#!/bin/sh\n")  # the environment is there
        profile = (
            self.tree / "configs/profiles/4090x2.yaml"
        )  # fewer clients: how many there are proves nothing here
        profile.write_text(
            re.sub(
                r"(requests|concurrency|output_tokens): (512|320|128)\b",
                r"\1: 16",
                profile.read_text(),
            )
        )

        binaries, engines = self.tree / ".venv/bin", self.tree / "tests/fakes/engines"
        packages = self.tree / ".venv/lib/python{}.{}/site-packages".format(*sys.version_info[:2])
        for made in (self.meet, binaries, packages):
            made.mkdir(parents=True)
        python = Path(sys._base_executable).resolve()
        for name in ("python", "python3"):
            (binaries / name).symlink_to(python)
        (self.tree / ".venv/pyvenv.cfg").write_text(f"home = {python.parent}\n")
        (binaries / "activate").write_text(f'export PATH="{binaries}:$PATH"\n')
        (self.tree / ".venv/.videofen-setup").write_text("gpu\n")  # the lock that filled it
        (packages / "environment.pth").write_text(sysconfig.get_paths()["purelib"])
        for name in COMMANDS:
            (binaries / name).write_text(
                f'#!/bin/sh\nexec "{binaries}/python" -m commands {name} "$@"\n'
            )
            (binaries / name).chmod(0o755)
        for name in COMPUTE:
            (engines / f"{name}.py").write_text(
                f"import fake_road\n\nfake_road.reached({name!r})\n"
            )
        (engines / "bitsandbytes.py").touch()  # only looked for
        (engines / "sitecustomize.py").write_text(
            "import time\n\nsleep = time.sleep\ntime.sleep = lambda seconds: sleep(seconds / 20)\n"
        )

        dropped = (
            "PROFILE",
            "STORE",
            "RECORDS",
            "RUNS",
            "CUDA_VISIBLE_DEVICES",
            "VLLM_API_KEY",
            "MAKEFLAGS",
            "MAKELEVEL",
            jobs.MARKS,
        )
        self.environment = {key: value for key, value in ENVIRONMENT.items() if key not in dropped}
        self.environment |= {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": f"{engines}:{engines.parent}:{self.tree}",
        }
        self.environment |= {
            "HOME": str(folder),
            "HF_HOME": str(folder / "hub"),
            "FAKE_ROAD": str(self.meet),
            "FAKE_CARDS": json.dumps([CARD, CARD]),
        }

    def bash(self, code: str, **variables) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", moved(code, self.ports)],
            cwd=self.tree,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def refused_requests(self) -> str:
        file = self.meet / "refused"
        text = file.read_text() if file.exists() else ""
        file.write_text("")
        return text


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    made.bash("make stop")


def is_run(line: str) -> bool:
    return not any(re.fullmatch(pattern, line.strip()) for pattern in LEFT_OUT)


def walk(file: str, folder: Path) -> list[str]:
    """Run the page's blocks in their order, a shell each; what was wrong.

    As a reader who has done nothing before.
    """
    machine = Machine(folder)
    wrong = []
    for block in BLOCKS:
        if block.file != file or block.mark in ("self", "netns"):
            continue
        done = machine.bash("\n".join(line for line in block.code.splitlines() if is_run(line)))
        expected = {2 if block.mark == "exit 2" else 0}
        if "stand-in:" in done.stderr:  # so far that perhaps only a computation could refuse
            expected.add(0)
        if done.returncode not in expected:
            ended = f"{block.id} [{block.mark}] exit code {done.returncode}"
            output = f"{done.stdout[-300:]}{done.stderr[-600:]}"
            wrong.append(f"{ended}\n{block.code}{output}")
        if refused := machine.refused_requests():
            wrong.append(f"{block.id} [{block.mark}] {refused}")
    left = machine.bash("make stop").stdout
    if "nothing of this repository is running" not in left:
        wrong.append(f"{file} leaves something running: {left}")
    return wrong


@pytest.fixture(scope="module")
def walks(request, tmp_path_factory):
    """{page: its walk}, two pages at a time, each on a machine of its own.

    Only pages whose tests were asked for.
    """
    files = [
        item.callspec.params["file"]
        for item in request.session.items
        if item.originalname == "test_a_page_on_two_4090s"
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(walk, file, tmp_path_factory.mktemp("road")) for file in files}


@pytest.mark.parametrize("file", FILES)
def test_a_page_on_two_4090s(walks, file):
    """The page's blocks work, ask for no model that is not served, and end what they start."""
    wrong = walks[file].result()
    assert not wrong, "\n\n".join(wrong)


# -----------------------------------------------------------------------------
# What computes on a card is refused while a server holds it

NOT_REFUSED = {  # scripts that import an engine: why
    "14_two_nodes.py": "computes on CPUs",
    "02_what_fits.py": "reads how large the cards are",
    "02_plan_examples.py": "estimates without a card",
    "13_bench.py": "a client of the server",
    "03_merge.py": "multiplies on the CPU, and beside a job rounds there too",
    "15_export.py": "writes files; with --score it is refused",
    "00_check_data.py": "reads texts",
}
ENGINES = re.compile(
    r"^ +(import torch|from (vllm|transformers|llamafactory)\b)|engine\.start\(|factory\.run\(",
    re.M,
)


def test_everything_that_computes_is_refused_beside_a_server(machine):
    """One sentence says what to do: each script itself, and make targets that start processes.

    On the CPU profile both may run.
    """
    assert machine.bash("make vllm-serve").returncode == 0
    scripts = [*ROOT.glob("modules/*/[0-9][0-9]_*.py"), ROOT / "modules/05_DeepSpeed/train.py"]
    computing = [
        s.relative_to(ROOT)
        for s in scripts
        if ENGINES.search(s.read_text()) and s.name not in NOT_REFUSED
    ]
    assert len(computing) >= 18
    commands = [f"RANK=0 WORLD_SIZE=2 python {script}" for script in computing]
    commands += [
        "make train-ddp",
        "make train-z2",
        "make mini-tp",
        "make lf-train-z2",
        "make lf-api",
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for command, done in zip(commands, pool.map(machine.bash, commands), strict=True):
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert done.returncode == 2 and len(errors) == 1, (command, done)
            assert "holds the memory of GPU 0, 1: end it with 'make stop' first" in errors[0], (
                command
            )
    beside = machine.bash("python modules/03_vllm/05_throughput.py", PROFILE="cpu")
    assert beside.returncode == 0 and "stand-in: torch would compute" in beside.stderr


def test_only_the_cards_that_a_server_fills_are_refused(monkeypatch):
    server = {"address": "http://127.0.0.1:8000", "cards": ["GPU-a"]}
    monkeypatch.setattr(jobs, "running", lambda: {"vllm": server, "lf-webui": {"address": ""}})
    two = [{"index": index, "uuid": uuid} for index, uuid in enumerate(("GPU-a", "GPU-b"))]
    monkeypatch.setattr(lab_machine, "cards", lambda: two)
    for visible, free in (
        ("0,1", False),
        ("0", False),
        ("GPU-a", False),
        ("1", True),
        ("GPU-b", True),
        ("", True),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        if free:
            jobs.refuse_taken_cards()
        else:
            with pytest.raises(SystemExit):
                jobs.refuse_taken_cards()
    given_twice = ["--tensor-parallel-size", "2", "--model", "m", "--tensor-parallel-size", "1"]
    assert engine.cards_filled(given_twice) == 1
    assert engine.cards_filled(["-tp", "2", "--pipeline-parallel-size", "2"]) == 4
