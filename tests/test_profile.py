"""Profiles and models: detection, overriding, and one sentence for what users get wrong."""

import http.server
import json
import os
import re
import shlex
import socket
import sys
import threading
from typing import NamedTuple

import pytest
from conftest import ROOT, python, refused, run

from lab import launch, machine, profile

SMOKE = "modules/01_single_gpu_smoke/01_smoke.py"


def test_every_profile_loads():
    """All profiles hold the same settings, every one of which some script reads."""
    profiles = {f.stem: profile.read_yaml(f) for f in profile.FOLDER.glob("*.yaml")}
    assert profiles.keys() == {"cpu", "4090x1", "4090x2"}
    source = "".join(
        f.read_text()
        for folder in ("modules", "scripts", "lab")
        for f in (ROOT / folder).rglob("*.py")
    )
    cpu = profiles["cpu"]
    for section, values in cpu.items():
        read = f"profile.{section}" in source or f'"{section}"' in source
        assert read or section == "requires", f"no script reads {section}"
        for name, other in profiles.items():
            assert cpu.keys() == other.keys(), name
            if isinstance(values, dict) and section not in ("env", "requires"):
                assert values.keys() == other[section].keys(), (name, section)
        if isinstance(values, dict) and section not in ("env", "requires"):
            for key in values:
                assert re.search(rf"\.{key}\b", source), f"no script reads {section}.{key}"


def test_4090x2_is_what_the_design_asks_for():
    values = profile.read_yaml(ROOT / "configs/profiles/4090x2.yaml")
    assert values["serve"]["model"] == "qwen2.5-14b-instruct"
    assert values["serve"]["args"]["tensor-parallel-size"] == 2
    assert values["env"]["NCCL_P2P_DISABLE"] == 1


@pytest.mark.parametrize("name", ["4090x1", "4090x2"])
def test_serving_asks_for_no_cuda_toolkit(name):
    """vLLM 0.26 would build these two with nvcc, without asking whether it is there."""
    env = profile.read_yaml(ROOT / f"configs/profiles/{name}.yaml")["env"]
    assert env["VLLM_USE_FLASHINFER_SAMPLER"] == 0 and env["VLLM_USE_DEEP_GEMM"] == 0


# -----------------------------------------------------------------------------
# Machines that readers have: cards by tests/fakes/pynvml.py, the lock by an environment with a
# marker of its own

RTX4090 = {"name": "NVIDIA GeForce RTX 4090", "memory_gib": 23.99}
RTX3090 = {
    "name": "NVIDIA GeForce RTX 3090",
    "memory_gib": 24,
    "reserved_gib": 0.31,
    "capability": [8, 6],
}
RTX5090 = {
    "name": "NVIDIA GeForce RTX 5090",
    "memory_gib": 31.84,
    "reserved_gib": 0.48,
    "capability": [12, 0],
}
RTX3060 = {"name": "NVIDIA GeForce RTX 3060", "memory_gib": 12, "capability": [8, 6]}
SHOW = """
import json, os
from lab import machine
from lab.profile import load_profile

profile = load_profile()
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
sizes = [gpu["cuda_gib"] for gpu in machine.gpus()]
print(json.dumps([profile.name, visible, machine.name(), machine.handles(), sizes]))
"""


def described(cards: list[dict], **env) -> dict:
    """Environment variables of a machine with these cards."""
    return {"FAKE_CARDS": json.dumps(cards), "PYTHONPATH": str(ROOT / "tests/fakes")} | env


class Machine(NamedTuple):
    """What a reader has, and what is to come of it."""

    cards: list[dict]
    profile: str
    name: str  # of the machine
    taken: list[int]  # the cards that are read
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    note: str = ""
    lock: str = "gpu"
    user: dict = {}  # variables that the user has set


def on_the_cpu(cards: list[dict], note: str, **more) -> Machine:
    return Machine(cards, "cpu", "cpu", [], "", note, **more)


NO_DRIVER = (
    "no GPU answers here: 'make doctor ARGS=\"--only driver\"' says why; profile cpu, "
    "but the gpu lock's vLLM computes on GPUs only"
)
WRONG_LOCK = (
    "2 x RTX 4090 here, but this environment is the cpu lock's: profile cpu; "
    "to compute on the card: make setup LOCK=gpu"
)
NONE_SHOWN = (
    "CUDA_VISIBLE_DEVICES= shows none of 2 cards, profile cpu: unset it, or name cards of 0 to 1"
)
OWN_VALUES = "under profile 4090x2: memory, FP8 and speeds are the card's own"
MACHINES = {
    # No card, or none that can be used.
    "no card, cpu lock": on_the_cpu([], "", lock="cpu"),
    "no card, gpu lock": on_the_cpu([], NO_DRIVER),
    "two cards, cpu lock": on_the_cpu([RTX4090] * 2, WRONG_LOCK, lock="cpu"),
    "none shown": on_the_cpu([RTX4090] * 2, NONE_SHOWN, user={"CUDA_VISIBLE_DEVICES": ""}),
    "too small": on_the_cpu(
        [RTX3060],
        "no profile fits the 1 x RTX 3060 (12 GiB) here, profile cpu, but the gpu lock's vLLM",
    ),
    # One card.
    "one 4090": Machine([RTX4090], "4090x1", "4090", [0]),
    "two 4090s, one asked for": Machine(
        *([RTX4090] * 2, "4090x1", "4090", [0], "0"),
        note="takes card 0 (RTX 4090) of 2 and leaves out 1",
        user={"PROFILE": "4090x1"},
    ),
    "one chosen": Machine(
        *([RTX4090] * 2, "4090x1", "4090", [1], "1"), user={"CUDA_VISIBLE_DEVICES": "1"}
    ),
    "one large, one small": Machine(
        *([RTX3060, RTX4090], "4090x1", "4090", [1], "1"),
        note="takes card 1 (RTX 4090) of 2 and leaves out 0 (RTX 3060)",
    ),
    # Two cards alike.
    "two 4090s": Machine([RTX4090] * 2, "4090x2", "4090x2", [0, 1]),
    "two 3090s": Machine(
        [RTX3090] * 2, "4090x2", "3090x2", [0, 1], note=f"2 x RTX 3090 {OWN_VALUES}"
    ),
    "two 5090s": Machine(
        [RTX5090] * 2, "4090x2", "5090x2", [0, 1], note=f"2 x RTX 5090 {OWN_VALUES}"
    ),
    # Two of more, or unlike ones.
    "four 4090s": Machine(
        *([RTX4090] * 4, "4090x2", "4090x2", [0, 1], "0,1"),
        note="takes cards 0,1 (RTX 4090) of 4 and leaves out 2,3 (RTX 4090)",
    ),
    "four 4090s, two chosen": Machine(
        *([RTX4090] * 4, "4090x2", "4090x2", [2, 3], "2,3"), user={"CUDA_VISIBLE_DEVICES": "2,3"}
    ),
    "three chosen": Machine(
        *([RTX4090] * 4, "4090x2", "4090x2", [3, 1], "3,1"),
        note="takes cards 3,1 (RTX 4090) of 3 and leaves out 2",
        user={"CUDA_VISIBLE_DEVICES": "3,1,2"},
    ),
    "unlike cards": Machine(
        *([RTX4090, RTX3090], "4090x2", "4090-3090", [0, 1]),
        note="takes unlike cards, RTX 4090 (24 GiB) and RTX 3090 (24 GiB)",
    ),
    "a small one between": Machine(
        *([RTX3060, RTX4090, RTX3090, RTX4090], "4090x2", "4090x2", [1, 3], "1,3"),
        note="leaves out 0,2 (RTX 3060, RTX 3090)",
    ),
}


@pytest.mark.parametrize("case", MACHINES)
def test_machines(case, filled):
    """Which profile, which cards, and at most one sentence of what is left aside."""
    expected = MACHINES[case]
    environment = described(expected.cards, **expected.user)
    done = run(filled(expected.lock), "-c", SHOW, check=0, **environment)
    name, visible, machine_name, handles, sizes = json.loads(done.stdout)
    if not handles:
        machine_name = machine_name.split("-")[0]  # cpu-2c: of this machine
    assert (name, machine_name) == (expected.profile, expected.name)
    assert (visible, handles) == (expected.visible, expected.taken)
    assert set(sizes) <= {23.6, 31.3} and len(sizes) == len(handles)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == bool(expected.note) and expected.note in done.stderr, done.stderr


def test_said_once(filled):
    """A process started by another that has a profile repeats no note and changes no card."""
    code = (
        "import subprocess, sys\n"
        "from lab.profile import load_profile\n"
        "load_profile()\n"
        f"subprocess.run([sys.executable, '-c', {SHOW!r}])"
    )
    cards = described([RTX3060, RTX4090, RTX4090, RTX4090])
    done = run(filled("gpu"), "-c", code, check=0, **cards)
    assert json.loads(done.stdout)[:4] == ["4090x2", "1,2", "4090x2", [1, 2]]
    assert done.stderr.count("note: ") == 1


def test_locks_that_cannot(filled):
    """The cpu lock computes on no card, the gpu lock's vLLM on no CPU.

    --help and --dry-run show what would be.
    """
    on_cpus = filled("cpu")
    two = described([RTX4090] * 2)
    for cards, asked_for, sentence in (
        ([RTX4090] * 2, "4090x2", "make setup LOCK=gpu"),
        ([RTX3060], "4090x1", "1 NVIDIA GPU of at least 22 GiB, 0 found"),
        ([RTX4090], "4090x2", "2 NVIDIA GPUs of at least 22 GiB, 1 found"),
    ):
        assert sentence in refused(on_cpus, SMOKE, PROFILE=asked_for, **described(cards))
    serve = "modules/03_vllm/01_serve.py"
    done = run(on_cpus, serve, "--dry-run", check=0, PROFILE="4090x2", **two)
    assert "--tensor-parallel-size 2" in done.stdout
    start = "from lab import engine; engine.start('folder', 'auto', {}, [])"
    for command in ([serve], ["-c", start]):
        assert "make setup LOCK=cpu" in refused(filled("gpu"), *command, PROFILE="cpu", **two)


TORCHRUN = "torchrun --standalone --nproc-per-node 2"
ACCELERATE = "accelerate launch --config_file modules/04_Accelerate/configs/ddp.yaml"
DEEPSPEED = "deepspeed --num_gpus 2 modules/05_DeepSpeed/train.py"
TWO_CARDS = {
    "train-ddp": f"{TORCHRUN} modules/04_Accelerate/01_train_ddp.py --min-world 2",
    "train-accelerate": f"{ACCELERATE} --num_processes 2 "
    "modules/04_Accelerate/02_train_accelerate.py",
    "train-z2": f"{DEEPSPEED} --deepspeed modules/05_DeepSpeed/configs/z2.json",
    "lf-train-z2": "modules/06_LLaMA-Factory/01_train.py --zero2",
    "vllm-tp": "modules/03_vllm/10_tensor_parallel_speed.py",
    "tensor-parallel-size 2": "modules/03_vllm/01_serve.py --recipe 32b-awq-tp2",
}


@pytest.mark.parametrize("what", TWO_CARDS)
def test_one_card_says_what_wants_two(what, filled):
    """On one 4090: one sentence, before anything is loaded or started."""
    command = shlex.split(TWO_CARDS[what])
    if not command[0].endswith(".py"):
        command = ["-m", "lab.launch", what, *command]
    sentence = refused(filled("gpu"), *command, **described([RTX4090]))
    assert f"{what} needs 2 cards, and profile 4090x1 has 1 here: " in sentence


def test_one_card_runs_one_process(filled):
    """What one card can do is not refused: the launcher starts one process."""
    command = ["-m", "lab.launch", "one", "echo", "--num_processes", "1"]
    done = run(filled("gpu"), *command, check=0, **described([RTX4090]))
    assert "--num_processes 1" in done.stderr


def test_deepspeed_gets_the_cards_that_were_chosen(monkeypatch):
    """Its launcher drops CUDA_VISIBLE_DEVICES where it reads --num_gpus, so cards are named.

    Source: deepspeed/launcher/runner.py.
    """
    command = "deepspeed --num_gpus 2 train.py --deepspeed z2.json".split()
    monkeypatch.setattr(machine, "gpus", lambda: [{"index": 2}, {"index": 3}])
    named = "deepspeed --include localhost:2,3 train.py --deepspeed z2.json".split()
    assert launch.by_card(command) == named
    monkeypatch.setattr(machine, "gpus", lambda: [{"index": 0}, {"index": 1}])
    assert launch.by_card(command) == command
    monkeypatch.setattr(machine, "gpus", list)
    assert launch.by_card(command) == command  # processes on the CPU


VISIBLE = {
    # Indices.
    None: "0123",
    "2,3": "23",
    "3, 1": "31",
    "0,9,1": "0",
    "-1": "",
    "": "",
    "1,-1,2": "1",
    "0,0": "",
    "no": "",
    # Beginnings of UUIDs.
    "GPU-b": "2",
    "GPU-b,GPU-aa1": "21",
    "GPU-aa": "",
    "GPU-": "",
    "0,GPU-b": "02",
}


@pytest.mark.parametrize("chosen", VISIBLE)
def test_cuda_visible_devices(chosen):
    """As CUDA reads it: indices, or beginnings of UUIDs.

    What names no card ends the list, a card named twice empties it.
    """
    cards = [
        {"index": i, "uuid": f"GPU-{uuid}"} for i, uuid in enumerate(("aa0", "aa1", "b2", "c3"))
    ]
    assert "".join(str(card["index"]) for card in machine.visible(cards, chosen)) == VISIBLE[chosen]


def test_machine_names(monkeypatch):
    monkeypatch.delenv("MEMORY_CAP_GIB", raising=False)
    for names, expected in (
        (["NVIDIA GeForce RTX 4090 D"] * 2, "4090dx2"),
        (["NVIDIA GeForce RTX 3090 Ti"], "3090ti"),
        (["NVIDIA H100 80GB HBM3"] * 4, "h100x4"),
        (["Tesla V100-SXM2-32GB"], "v100-sxm2-32gb"),
    ):
        monkeypatch.setattr(machine, "gpus", lambda names=names: [{"name": name} for name in names])
        assert machine.name() == expected


# -----------------------------------------------------------------------------
# The environment that every script gives its children


def test_no_proxy_for_this_machine():
    """Past a proxy that nobody answers for, every client of the scripts reaches a server here."""
    code = (
        "import sys, urllib.request\n"
        "import lab, httpx\n"
        "for host in ('127.0.0.1', 'localhost'):\n"
        "    address = f'http://{host}:{sys.argv[1]}/health'\n"
        "    assert urllib.request.urlopen(address, timeout=5).status == 200\n"
        "    assert httpx.get(address, timeout=5).status_code == 200\n"
        "try: urllib.request.urlopen('http://example.invalid/', timeout=5)\n"
        "except OSError as e: print(e)\n"
    )
    dead = f"http://127.0.0.1:{closed_port()}"
    proxies = dict.fromkeys(
        ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), dead
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for own in ({"no_proxy": "", "NO_PROXY": ""}, {"no_proxy": "", "NO_PROXY": "corp.example"}):
            done = python("-c", code, str(server.server_port), check=0, **proxies | own)
            assert "refused" in done.stdout  # all else still goes to the proxy
        curl = ["curl", "-sf", "-m", "5", f"http://127.0.0.1:{server.server_port}/health"]
        python("-m", "lab.profile", *curl, check=0, no_proxy="", NO_PROXY="", **proxies)
        server.shutdown()


def test_own_no_proxy_is_kept():
    code = "import lab, os; print(os.environ['no_proxy'], os.environ['NO_PROXY'])"
    for own, expected in (
        (
            {"no_proxy": "", "NO_PROXY": "corp.example, localhost"},
            "corp.example,localhost,127.0.0.1,::1",
        ),
        ({"no_proxy": "*", "NO_PROXY": ""}, "*"),
    ):
        assert python("-c", code, check=0, **own).stdout.split() == [expected] * 2


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_programs_without_activation():
    """A plain shell's PATH: the environment's own programs are found all the same, and first."""
    in_python = (
        "import shutil\n"
        "from lab.profile import load_profile\n"
        "load_profile()\n"
        "print(shutil.which('ninja'))"
    )
    for command in (["-c", in_python], ["-m", "lab.profile", "which", "ninja"]):
        done = python(*command, check=0, PATH="/usr/bin:/bin")
        assert done.stdout.strip() == f"{sys.prefix}/bin/ninja"


def test_memory_cap(monkeypatch):
    """A larger card stands in for a 24 GB one by the allocator's ceiling.

    The profile's own settings stay; without a cap nothing changes.
    """
    h100 = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 80.0, "driver": "580.1"}
    monkeypatch.setattr(machine, "gpus", lambda: [h100] * 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ours = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_P2P_DISABLE": 1}
    monkeypatch.delenv("MEMORY_CAP_GIB", raising=False)
    assert profile.capped(ours) == ours
    monkeypatch.setenv("MEMORY_CAP_GIB", "24")
    ceiling = "per_process_memory_fraction:0.3000"
    both = {"PYTORCH_ALLOC_CONF": f"expandable_segments:True,{ceiling}"}
    assert profile.capped(ours) == ours | both
    assert profile.capped({}) == {"PYTORCH_ALLOC_CONF": ceiling}
    assert machine.name() == "h100x2-cap24"


def test_environment_reaches_launchers_and_the_user_wins():
    shell = 'eval "$(python -m lab.profile)"; python -m lab.profile env'
    out = run("bash", "-c", shell, check=0, VLLM_CPU_KVCACHE_SPACE="3").stdout
    assert "VLLM_NO_USAGE_STATS=1" in out and "VLLM_CPU_KVCACHE_SPACE=3" in out


def test_unknown_profile():
    sentence = refused("python", SMOKE, PROFILE="laptop")
    assert "PROFILE=laptop" in sentence and "cpu" in sentence


@pytest.mark.skipif(bool(machine.gpus()), reason="has GPUs")
def test_no_gpu_under_4090x2():
    assert "needs 2 NVIDIA GPUs" in refused("make", "vllm-serve", "PROFILE=4090x2")
    serve = ["python", "modules/03_vllm/01_serve.py", "--dry-run"]
    assert "--tensor-parallel-size 2" in run(*serve, PROFILE="4090x2", check=0).stdout


@pytest.mark.parametrize("content", ["serve: {model: [", "- a list", ""])
def test_broken_yaml(tree, content):
    (tree / "configs/profiles/cpu.yaml").write_text(content)
    assert "cpu.yaml" in refused("python", SMOKE, cwd=tree, PYTHONPATH=str(tree), PROFILE="cpu")


def test_unknown_model_and_missing_folder(tmp_path):
    assert "smollm2-135m" in refused("python", SMOKE, "--model", "gpt-5")
    assert "no model folder ./nowhere" in refused("python", SMOKE, "--model", "./nowhere")
    assert "no config.json" in refused("python", SMOKE, "--model", str(tmp_path))
    assert "unknown model" in refused("make", "vllm-serve", "MODEL=gpt-5")


def test_hub_out_of_reach():
    """A hub id that cannot be had: one sentence that names the mirror variables.

    A port where nobody listens stands for the hub.
    """
    for variable in (
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"USE_MODELSCOPE_HUB": "1", "MODELSCOPE_DOMAIN": "127.0.0.1:9"},
    ):
        command = ["python", SMOKE, "--model", "Qwen/Qwen2.5-0.5B-Instruct"]
        assert "HF_ENDPOINT" in refused(*command, **variable)


def test_hub_variables_reach_the_hub(monkeypatch, tmp_path):
    """The hub's variables decide where a model comes from: a server here sees the requests."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        here = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        sentence = refused("python", "-m", "lab.models", "qwen2.5-0.5b-instruct", **here)
        hub.shutdown()
    assert any("Qwen/Qwen2.5-0.5B-Instruct" in path for path in asked), (sentence, asked)


def test_path_with_space_and_chinese_characters(tree, small_model):
    small = ["--matmul-size", "128", "--copy-mib", "1", "--model", small_model]
    in_the_copy = {"cwd": tree, "PYTHONPATH": str(tree), "RECORDS": ""}
    out = python(SMOKE, *small, check=0, **in_the_copy).stdout
    assert "Paris" in out and (tree / "runs/records/01_single_gpu_smoke/01_smoke.json").exists()


def test_read_only_home(small_model):
    done = python(SMOKE, "--matmul-size", "128", "--copy-mib", "1", check=0, HOME="/proc")
    assert "Paris" in done.stdout
    exported = python("-m", "lab.profile", check=0, HOME="/proc").stdout
    assert f"HF_HOME={ROOT}" in exported.replace("'", "") and os.environ.get("HOME") != "/proc"


def test_what_is_compiled_lies_where_compilers_can_cope(monkeypatch, tmp_path):
    """HOME writable: nothing is moved. With a blank: what compiles. Read-only: everything.

    Compiled things lie apart if runs/ has a blank.
    """
    from lab import profile

    monkeypatch.setenv("HOME", str(tmp_path))
    assert profile.writable_home() == {}
    monkeypatch.setenv("HOME", str(tmp_path / "a blank"))
    monkeypatch.setattr(profile, "RUNS", tmp_path / "runs")
    assert profile.writable_home()["TORCH_EXTENSIONS_DIR"] == str(
        tmp_path / "runs/cache/torch_extensions"
    )
    assert "HF_HOME" not in profile.writable_home()
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setattr(profile, "RUNS", tmp_path / "a blank/runs")
    places = profile.writable_home()
    assert places["HF_HOME"] == str(tmp_path / "a blank/runs/cache/huggingface")
    for variable in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert " " not in places[variable]


def test_compiling_without_openssl(tmp_path):
    """torch.compile's precompiled headers need the program openssl, which a small system lacks."""
    line = "export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS=0\n"
    assert line in python("-m", "lab.profile", check=0, PATH=str(tmp_path)).stdout
    (tmp_path / "openssl").touch(0o755)
    assert line not in python("-m", "lab.profile", check=0, PATH=str(tmp_path)).stdout
