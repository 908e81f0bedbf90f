"""The served model: what the readme's commands start, answer, refuse and leave behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from conftest import ENVIRONMENT, ROOT, refused, run

from lab import jobs, memory, models

SERVE = "modules/03_vllm/01_serve.py"


def ask(address: str, **request) -> dict:
    body = json.dumps({"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 20} | request)
    call = urllib.request.Request(f"{address}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(call, timeout=60))


def test_it_answers_under_both_names(server):
    for name in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert "Paris" in ask(server, model=name)["choices"][0]["message"]["content"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, model="gpt-5")


def test_it_listens_on_loopback_only(server):
    listening = subprocess.run(["ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
    addresses = [line.split()[3] for line in listening.splitlines() if line.split()[3].endswith(":8000")]
    assert addresses == ["127.0.0.1:8000"]


def test_the_planner_predicts_the_cache(server):
    """Blocks that the engine made of the profile's 1 GiB, against the planner's bytes per token."""
    metrics = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    facts = dict(re.findall(r'(\w+)="([^"]*)"', re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.M)[1]))
    tokens = int(facts["num_gpu_blocks"]) * int(facts["block_size"])
    assert tokens * memory.kv_bytes_per_token(memory.read(models.config("smollm2-135m"))) / memory.GIB == pytest.approx(1, rel=0.02)


def test_streaming_client(server):
    done = run("make", "vllm-chat", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in done.stdout and result["ttft_ms"] > 0 and result["completion_tokens_count"] > 5
    assert "refused the request" in refused("python", "modules/03_vllm/02_chat.py", "--max-tokens", "99999")
    assert "prompt is empty" in refused("python", "modules/03_vllm/02_chat.py", "--prompt", " ")


def test_watch_sees_the_load(server):
    done = run("python", "modules/03_vllm/04_watch.py", "--load", "4", "--seconds", "8", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["running_count"] <= 4 and result["generation_tok_per_s"] > 0 and result["kv_cache_pct"] > 0


def test_monitoring(server, tmp_path):
    """The real Prometheus accepts the configuration and scrapes the live server; every panel of the dashboard then finds data."""
    monitoring = ROOT / "modules/03_vllm/configs/monitoring"
    run("promtool", "check", "config", monitoring / "prometheus.yml", check=0)
    command = ["prometheus", f"--config.file={monitoring / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path}", "--web.listen-address=127.0.0.1:19090"]
    prometheus = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def query(expression: str) -> list:
        call = f"http://127.0.0.1:19090/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        answer = json.load(urllib.request.urlopen(call, timeout=10))
        assert answer["status"] == "success"
        return answer["data"]["result"]

    def samples() -> int:
        try:
            return int(query('count_over_time(up{job="vllm"}[1m])')[0]["value"][1])
        except (OSError, IndexError):
            return 0

    try:
        deadline = time.monotonic() + 90
        while samples() < 3 and time.monotonic() < deadline:  # three scrapes: a rate needs two
            ask(server)
            time.sleep(1)
        assert query('up{job="vllm"}')[0]["value"][1] == "1"
        panels = json.loads((monitoring / "grafana/dashboards/vllm.json").read_text())["panels"]
        expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
        assert len(expressions) >= 12
        for expression in expressions:
            result = query(expression.replace("$__rate_interval", "30s"))
            assert result or "gpu_" in expression, f"no data: {expression}"
    finally:
        prometheus.terminate()
        prometheus.wait(timeout=30)


def test_dashboard_names_exist(server):
    """Every vLLM metric that a monitoring file names is one that the live server has, so that no panel stays empty."""
    live = urllib.request.urlopen(f"{server}/metrics").read().decode()
    files = [f for f in (ROOT / "modules/03_vllm/configs/monitoring").rglob("*") if f.is_file()]
    named = {name for file in files for name in re.findall(r"vllm:\w+", file.read_text())}
    assert len(named) >= 8
    assert not {name for name in named if not re.search(rf"^{name}[ {{]", live, re.M)}
    scrape = (ROOT / "results/h100-cap24/03_vllm/nvitop_exporter.txt").read_text()  # of nvitop-exporter, recorded on a GPU
    gpus = set(re.findall(r"gpu_[a-zA-Z_]+", (ROOT / "modules/03_vllm/configs/monitoring/grafana/dashboards/vllm.json").read_text()))
    assert len(gpus) >= 4 and not {name for name in gpus if not re.search(rf"^{name}{{", scrape, re.M)}


def test_a_second_server_is_refused(server):
    assert "already runs at http://127.0.0.1:8000" in refused("make", "vllm-serve")
    assert "Paris" in json.dumps(ask(server))


def test_stop_ends_ours_and_nothing_else(server):
    """A stranger whose command line looks like vLLM's lives on; a killed leader's workers do not."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "vllm.entrypoints.openai.api_server"])
    try:
        job = jobs.running()["vllm"]
        processes = jobs.members(job)
        assert len(processes) >= 2
        os.kill(job["pid"], signal.SIGKILL)
        time.sleep(1)
        assert "vllm" in jobs.running() or not any(p.is_running() and p.status() != "zombie" for p in processes)
        run("make", "stop", check=0)
        assert not [p for p in processes if p.is_running() and p.status() != "zombie"]
        assert stranger.poll() is None
    finally:
        stranger.kill()


@pytest.fixture
def no_server():
    run("make", "stop", check=0)


def test_no_server(no_server):
    assert "make vllm-serve" in refused("make", "vllm-chat")
    assert "make vllm-serve" in refused("make", "watch")


def test_port_in_use(no_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused("make", "vllm-serve", f"PORT={port}")


@pytest.mark.parametrize("flag, words", [("--tensor-parallel-size=2", "attention heads"), ("--no-such-flag", "unrecognized arguments: --no-such-flag")])
def test_settings_the_engine_refuses(no_server, flag, words):
    said = refused("make", "vllm-serve", f"ARGS={flag}")
    assert words in said and "runs/03_vllm/serve.log" in said
    assert not jobs.running()


def test_interrupted_start_leaves_nothing(no_server):
    """Ctrl+C while the server starts, then Ctrl+C on one in front: both leave no process."""
    for arguments in ([], ["FG=1"]):
        process = subprocess.Popen(
            ["make", "vllm-serve", *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while "vllm" not in jobs.running() and time.monotonic() < deadline:
            time.sleep(0.2)
        members = jobs.members(jobs.running()["vllm"])
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0 and not jobs.running()
        assert not [p for p in members if p.is_running() and p.status() != "zombie"]
