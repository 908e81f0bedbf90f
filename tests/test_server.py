"""The served model: what the readme's commands start, answer, refuse and leave behind."""

import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, RUNS, refused, run

from lab import jobs, models, shown
from lab.planner.config import read
from lab.planner.constants import GIB
from lab.planner.serving import kv_bytes_per_token
from lab.profile import load_profile

SERVE = "modules/03_vllm/01_serve.py"
PRODUCTION = ROOT / "modules/03_vllm/production.md"
KEY = {"Authorization": "Bearer secret"}


def ask(address: str, **request) -> dict:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 20,
        }
        | request
    )
    call = urllib.request.Request(
        f"{address}/v1/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(call, timeout=300))


def test_it_answers_under_both_names(server):
    for name in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert "Paris" in ask(server, model=name)["choices"][0]["message"]["content"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, model="gpt-5")


def test_it_listens_on_loopback_only(server):
    listening = [s.laddr for s in psutil.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == 8000] == ["127.0.0.1"]


def test_the_planner_predicts_the_cache(server):
    """Blocks that the engine made of the profile's 1 GiB, against the planner's bytes per token."""
    metrics = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    facts = dict(
        re.findall(
            r'(\w+)="([^"]*)"', re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.M)[1]
        )
    )
    tokens = int(facts["num_gpu_blocks"]) * int(facts["block_size"])
    sizes = read(models.config("smollm2-135m"))
    each = kv_bytes_per_token(sizes, dtype=load_profile("cpu").dtype)
    assert tokens * each / GIB == pytest.approx(1, rel=0.02)


def test_streaming_client(server):
    done = run("make", "vllm-chat", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (
        "Paris" in done.stdout and result["ttft_ms"] > 0 and result["completion_tokens_count"] > 5
    )
    assert "refused the request" in refused(
        "python", "modules/03_vllm/02_chat.py", "--max-tokens", "99999"
    )
    assert "prompt is empty" in refused("python", "modules/03_vllm/02_chat.py", "--prompt", " ")


def test_structured(server):
    """JSON of the schema and a call with the right argument, from a model that was asked for
    neither in words; our function's own result.
    """
    lines = dict(
        line.split(None, 1)
        for line in run("make", "vllm-structured", check=0).stdout.splitlines()
        if " " in line
    )
    assert json.loads(lines["JSON"]) == {"name": "Alice", "age": 30, "city": "Paris"}
    assert (
        lines["call"] == 'kv_bytes_per_token({"model": "smollm2-135m"})'
        and lines["result"] == "23040 bytes"
    )
    assert "text is empty" in refused("make", "vllm-structured", "ARGS=--text ' '")
    assert "make vllm-serve" in refused(
        "make", "vllm-structured", "ARGS=--address http://127.0.0.1:9"
    )


def test_watch_sees_the_load(server):
    done = run("python", "modules/03_vllm/04_watch.py", "--load", "4", "--seconds", "8", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (
        0 < result["running_count"] <= 4
        and result["generation_tok_per_s"] > 0
        and result["kv_cache_pct"] > 0
    )
    assert 0 < result["itl_p50_ms"] <= result["itl_p99_ms"]


@pytest.mark.needs("prometheus", "promtool")
def test_monitoring(server):
    """`make monitor`: the real Prometheus scrapes the live server; every panel of the dashboard and
    every recording rule then finds data.
    """
    monitoring = ROOT / "modules/03_vllm/configs/monitoring"
    run("promtool", "check", "config", monitoring / "prometheus.yml", check=0)
    said = run("make", "monitor", check=0).stdout
    assert re.search(r"target vllm +up", said) and re.search(r"VllmDown +inactive", said)
    assert "prometheus" in jobs.running()

    def query(expression: str) -> list:
        call = f"http://127.0.0.1:9090/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        answer = json.load(urllib.request.urlopen(call, timeout=10))
        assert answer["status"] == "success"
        return answer["data"]["result"]

    try:
        rules = [
            r
            for group in yaml.safe_load((monitoring / "rules.yml").read_text())["groups"]
            for r in group["rules"]
        ]
        panels = json.loads((monitoring / "grafana/dashboards/vllm.json").read_text())["panels"]
        expressions = [
            target["expr"] for panel in panels for target in panel.get("targets", [])
        ] + [r["record"] for r in rules if "record" in r]
        assert len(expressions) >= 19

        def missing() -> list[str]:
            return [
                e
                for e in expressions
                if "gpu_" not in e and not query(e.replace("$__rate_interval", "30s"))
            ]

        deadline = time.monotonic() + 60
        while missing() and time.monotonic() < deadline:  # a rate needs two scrapes
            ask(server)
            time.sleep(1)
        assert not missing()
        assert re.search(r"VllmDown +inactive", run("make", "monitor", check=0).stdout), (
            "asked again, it shows the state now"
        )
    finally:
        jobs.stop(jobs.running()["prometheus"])


def test_dashboard_names_exist(server):
    """Every metric that a monitoring file names is one that the live server has, or nvitop-exporter
    on a GPU: no panel stays empty, no alert blind.
    """
    ask(server)  # http_requests_total begins with the first
    live = urllib.request.urlopen(f"{server}/metrics").read().decode()
    files = [f for f in (ROOT / "modules/03_vllm/configs/monitoring").rglob("*") if f.is_file()]
    named = {
        name
        for file in files
        for name in re.findall(r"\bvllm:\w+|\bhttp_\w+_total", file.read_text())
    }
    assert len(named) >= 12
    assert not {name for name in named if not re.search(rf"^{name}[ {{]", live, re.M)}
    for label in ("handler", "status"):  # that rules.yml selects by
        assert re.search(rf'^http_requests_total{{.*{label}="', live, re.M)
    assert {"abort", "error"} <= set(
        re.findall(r'^vllm:request_success_total{.*finished_reason="(\w+)"', live, re.M)
    )
    scrape = (
        ROOT / "results/h100-cap24/03_vllm/nvitop_exporter.txt"
    ).read_text()  # of nvitop-exporter, recorded on a GPU
    gpus = {name for file in files for name in re.findall(r"gpu_[a-zA-Z_]+", file.read_text())} - {
        "gpu_"
    }
    assert {"gpu_temperature_C", "gpu_clock_sm_MHz"} <= gpus and not {
        name for name in gpus if not re.search(rf"^{name}{{", scrape, re.M)
    }


def test_a_second_server_is_refused(server):
    assert "already runs at http://127.0.0.1:8000" in refused("make", "vllm-serve")
    assert "Paris" in json.dumps(ask(server))


def test_stop_ends_ours_and_nothing_else(server):
    """A stranger whose command line looks like vLLM's lives on; a killed leader's workers do not."""
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "vllm.entrypoints.openai.api_server"]
    )
    try:
        job = jobs.running()["vllm"]
        processes = jobs.members(job)
        assert len(processes) >= 2
        os.kill(job["pid"], signal.SIGKILL)
        time.sleep(1)
        assert "vllm" in jobs.running() or not any(
            p.is_running() and p.status() != "zombie" for p in processes
        )
        run("make", "stop", check=0)
        assert not [p for p in processes if p.is_running() and p.status() != "zombie"]
        assert stranger.poll() is None
    finally:
        stranger.kill()


# -----------------------------------------------------------------------------
# A server with a key: what production.md says of it


@pytest.fixture(scope="module")
def guarded_server():
    run("make", "stop", check=0)
    run("make", "vllm-serve", check=0, VLLM_API_KEY="secret")
    yield "http://127.0.0.1:8000"
    run("make", "stop", check=0)


def status(address: str, method: str = "GET", headers: dict | None = None) -> int:
    """The HTTP status of that request, its body an empty JSON object."""
    body = b"{}" if method == "POST" else None
    call = urllib.request.Request(
        address, body, {"Content-Type": "application/json"} | (headers or {}), method=method
    )
    no_proxy = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
    )
    try:
        return no_proxy.open(call, timeout=300).status
    except urllib.error.HTTPError as e:
        return e.code


def test_what_the_key_does_not_guard(guarded_server):
    """Every path of the live server, asked without the key: refused or answered as the table in
    production.md says; one of them generates.
    """
    table = re.search(
        r"<!-- paths -->(.*?)<!-- /paths -->", PRODUCTION.read_text(encoding="utf-8"), re.S
    )[1]
    rows = [line.split("|")[1:3] for line in table.strip().splitlines()[2:]]
    guarded = {
        path.removesuffix("...")
        for paths, answer in rows
        if "401" in answer
        for path in re.findall(r"`([^`]+)`", paths)
    }
    listed = {
        path
        for paths, answer in rows
        if "401" not in answer
        for path in re.findall(r"`([^`]+)`", paths)
    }

    described = json.load(urllib.request.urlopen(f"{guarded_server}/openapi.json", timeout=10))[
        "paths"
    ]
    routes = {(path, method.upper()) for path, methods in described.items() for method in methods}
    routes |= {(path, "GET") for path in ("/docs", "/redoc", "/openapi.json")}
    answers = {
        (path, method): status(f"{guarded_server}{re.sub('{.*?}', 'x', path)}", method)
        for path, method in routes
    }
    opened = {path for (path, _), code in answers.items() if code != 401}
    assert len(routes) >= 20 and opened == listed
    assert {path for path, _ in answers} - opened == {
        path for path, _ in answers if path.startswith(tuple(guarded))
    }

    question = json.dumps(
        {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 8,
        }
    )
    call = urllib.request.Request(
        f"{guarded_server}/invocations", question.encode(), {"Content-Type": "application/json"}
    )
    assert (
        "Paris"
        in json.load(urllib.request.urlopen(call, timeout=300))["choices"][0]["message"]["content"]
    )
    assert status(f"{guarded_server}/v1/models", headers=KEY) == 200


@pytest.mark.needs("nginx", "openssl")
def test_nginx_lets_only_the_allowlist_through(guarded_server, tmp_path):
    """The real nginx with production.md's configuration before the live server."""
    certificate = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=llm.example.com",
    ]
    run(*certificate, "-keyout", tmp_path / "llm.key", "-out", tmp_path / "llm.crt", check=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = re.search(r"```nginx\n(.*?)```", PRODUCTION.read_text(encoding="utf-8"), re.S)[1]
    site = page.replace("listen 443", f"listen 127.0.0.1:{port}").replace(
        "/etc/nginx/", f"{tmp_path}/"
    )
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{site}}}\n"
    )
    nginx = subprocess.Popen(["nginx", "-c", configuration, "-g", "daemon off;"], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 10
        while not jobs.port_taken(port) and time.monotonic() < deadline:
            time.sleep(0.1)
        proxy = f"https://127.0.0.1:{port}"
        assert (
            status(f"{proxy}/v1/models") == 401 and status(f"{proxy}/v1/models", headers=KEY) == 200
        )
        assert status(f"{proxy}/v1/chat/completions", "POST", KEY) == 400, (
            "it reaches vLLM, which finds the request incomplete"
        )
        for path in (
            "/invocations",
            "/v1/../invocations",
            "/v1/models/../../invocations",
            "//invocations",
            "/v1%2f..%2finvocations",
            "/tokenize",
        ):
            assert status(f"{proxy}{path}", "POST", KEY) == 404, path
        for path in ("/metrics", "/docs", "/openapi.json", "/health"):
            assert status(f"{proxy}{path}", headers=KEY) == 404, path
    finally:
        nginx.terminate()
        nginx.wait(timeout=10)


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


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--tensor-parallel-size=2", "attention heads"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_settings_the_engine_refuses(no_server, flag, words):
    said = refused("make", "vllm-serve", f"ARGS={flag}")
    assert words in said and shown(RUNS / "03_vllm/serve.log") in said
    assert not jobs.running()


@pytest.mark.long
def test_recipes(no_server):
    """Each recipe's command is one that vLLM's own parser takes, its model one of the catalogue; an
    unknown one is refused by name.
    """
    recipes = sorted((ROOT / "modules/03_vllm/configs/recipes").glob("*.yaml"))
    assert len(recipes) >= 3 and all(
        models.entry(yaml.safe_load(f.read_text())["model"])[1] for f in recipes
    )
    commands = [
        shlex.split(
            run("python", SERVE, "--recipe", f.stem, "--dry-run", check=0, PROFILE="4090x2").stdout
        )[3:]
        for f in recipes
    ]
    assert all(
        f"{key}" in " ".join(words)
        for f, words in zip(recipes, commands, strict=True)
        for key in yaml.safe_load(f.read_text())
    )
    code = """
import json, sys
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser, commands = make_arg_parser(FlexibleArgumentParser()), json.loads(sys.argv[1])
for words in commands:
    parser.parse_args(words)
try:
    parser.parse_args([*commands[0], "--no-such-flag"])
except SystemExit as e:
    sys.exit(e.code - 2)
sys.exit("the parser takes anything")
"""
    run("python", "-c", code, json.dumps(commands), check=0)
    assert "choose one of 32b-awq-tp2" in refused("make", "vllm-serve", "RECIPE=nope")


def test_interrupted_start_leaves_nothing(no_server):
    """Ctrl+C while the server starts, then Ctrl+C on one in front: both leave no process."""
    for arguments in ([], ["FG=1"]):
        process = subprocess.Popen(
            ["make", "vllm-serve", *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + 60
        while "vllm" not in jobs.running() and time.monotonic() < deadline:
            time.sleep(0.2)
        members = jobs.members(jobs.running()["vllm"])
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=300)
        assert process.returncode != 0 and not jobs.running()
        assert not [p for p in members if p.is_running() and p.status() != "zombie"]
