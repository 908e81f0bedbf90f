"""The served model: what the commands start, answer, refuse and leave behind.

One server for all of these tests, with a key, which every client takes from VLLM_API_KEY. The
readme's blocks start one without.
"""

import base64
import http.server
import io
import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import psutil
import pytest
import yaml
from conftest import ENVIRONMENT, PATIENCE, ROOT, RUNS, refused, run

from lab import engine, jobs, models, shown
from lab.planner.config import read
from lab.planner.constants import GIB
from lab.planner.serving import kv_bytes_per_token
from lab.profile import load_profile

SERVE = "modules/03_vllm/01_serve.py"
EMBED = "modules/03_vllm/17_embed.py"
PICTURE = "modules/03_vllm/18_picture.py"
RECIPES = ROOT / "modules/03_vllm/configs/recipes"
PRODUCTION = ROOT / "modules/03_vllm/production.md"
MONITORING = ROOT / "modules/03_vllm/configs/monitoring"
KEY = {"Authorization": "Bearer secret"}
JSON = {"Content-Type": "application/json"}
QUESTION = {
    "messages": [
        {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    ],
    "temperature": 0,
    "max_tokens": 20,
}


@pytest.fixture(scope="module")
def server():
    """Its address; ended afterwards, and nothing of it may stay."""
    run("make", "stop", check=0)
    ENVIRONMENT["VLLM_API_KEY"] = "secret"
    run("make", "vllm-serve", check=0)
    yield "http://127.0.0.1:8000"
    del ENVIRONMENT["VLLM_API_KEY"]
    run("make", "stop", check=0)
    assert "nothing of this repository is running" in run("make", "stop", check=0).stdout


def post(address: str, request: dict, headers: dict) -> str:
    """The text of the answer."""
    call = urllib.request.Request(address, json.dumps(request).encode(), JSON | headers)
    reply = json.load(urllib.request.urlopen(call, timeout=PATIENCE))
    return reply["choices"][0]["message"]["content"]


def ask(address: str, **request) -> str:
    return post(f"{address}/v1/chat/completions", QUESTION | request, KEY)


def living(processes) -> list:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_it_answers_under_both_names(server):
    for name in ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert "Paris" in ask(server, model=name)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(server, model="gpt-5")


def test_it_listens_on_loopback_only(server):
    listening = [s.laddr for s in psutil.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == 8000] == ["127.0.0.1"]


def test_the_planner_predicts_the_cache(server):
    """Blocks that the engine made of the profile's 1 GiB, against the planner's bytes per token."""
    metrics = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    labels = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.M)[1]
    facts = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    tokens = int(facts["num_gpu_blocks"]) * int(facts["block_size"])
    sizes = read(models.config("smollm2-135m"))
    each = kv_bytes_per_token(sizes, dtype=load_profile("cpu").dtype)
    assert tokens * each / GIB == pytest.approx(1, rel=0.02)


def test_streaming_client(server):
    done = run("make", "vllm-chat", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert "Paris" in done.stdout
    assert result["ttft_ms"] > 0 and result["completion_tokens_count"] > 5
    chat = ("python", "modules/03_vllm/02_chat.py")
    assert "refused the request" in refused(*chat, "--max-tokens", "99999")
    assert "prompt is empty" in refused(*chat, "--prompt", " ")


def test_structured(server):
    """JSON of the schema and a call with the right argument, from a model that was asked for
    neither in words; our function's own result.
    """
    out = run("make", "vllm-structured", check=0).stdout
    lines = dict(line.split(None, 1) for line in out.splitlines() if " " in line)
    assert json.loads(lines["JSON"]) == {"name": "Alice", "age": 30, "city": "Paris"}
    assert lines["call"] == 'kv_bytes_per_token({"model": "smollm2-135m"})'
    assert lines["result"] == "23040 bytes"
    assert "text is empty" in refused("make", "vllm-structured", "ARGS=--text ' '")
    assert "make vllm-serve" in refused(
        "make", "vllm-structured", "ARGS=--address http://127.0.0.1:9"
    )


def test_pictures_and_vectors_that_are_refused(server):
    """By the small model, which answers and does not see; and what no server is asked for."""
    assert "is not a multimodal model" in refused("python", PICTURE)
    assert "make vllm-serve ARGS='--runner pooling'" in refused("python", EMBED)
    assert "at least 28" in refused("python", PICTURE, "--side", "3")
    assert "is no picture" in refused("python", PICTURE, "--image", "readme.md")
    assert "No such file" in refused("python", PICTURE, "--image", "nowhere.png")
    assert "the query is empty" in refused("python", EMBED, "--query", " ")


def test_watch_sees_the_load(server):
    done = run("python", "modules/03_vllm/04_watch.py", "--load", "4", "--seconds", "8", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["running_count"] <= 4
    assert result["generation_tok_per_s"] > 0 and result["kv_cache_pct"] > 0
    assert 0 < result["itl_p50_ms"] <= result["itl_p99_ms"]


@pytest.mark.needs("prometheus", "promtool")
def test_monitoring(server):
    """`make monitor`: the real Prometheus scrapes the live server; every panel of the dashboard and
    every recording rule then finds data.
    """
    run("promtool", "check", "config", MONITORING / "prometheus.yml", check=0)
    out = run("make", "monitor", check=0).stdout
    assert re.search(r"target vllm +up", out) and re.search(r"VllmDown +inactive", out)
    assert "prometheus" in jobs.running()

    def query(expression: str) -> list:
        question = urllib.parse.urlencode({"query": expression})
        call = f"http://127.0.0.1:9090/api/v1/query?{question}"
        answer = json.load(urllib.request.urlopen(call, timeout=PATIENCE))
        assert answer["status"] == "success"
        return answer["data"]["result"]

    try:
        groups = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        panels = json.loads((MONITORING / "grafana/dashboards/vllm.json").read_text())["panels"]
        targets = [target for panel in panels for target in panel.get("targets", [])]
        expressions = [target["expr"] for target in targets]
        expressions += [rule["record"] for rule in rules if "record" in rule]
        assert len(expressions) >= 19
        here = [e.replace("$__rate_interval", "30s") for e in expressions if "gpu_" not in e]

        def missing() -> list[str]:
            return [expression for expression in here if not query(expression)]

        deadline = time.monotonic() + PATIENCE / 4
        while missing() and time.monotonic() < deadline:  # a rate needs two scrapes
            ask(server)
            time.sleep(1)
        assert not missing()
        again = run("make", "monitor", check=0).stdout
        assert re.search(r"VllmDown +inactive", again), "asked again, it shows the state now"
    finally:
        jobs.stop(jobs.running()["prometheus"])


def test_dashboard_names_exist(server):
    """Every metric that a monitoring file names is one that the live server has, or nvitop-exporter
    on a GPU: no panel stays empty, no alert blind.
    """
    ask(server)  # http_requests_total begins with the first
    live = urllib.request.urlopen(f"{server}/metrics").read().decode()
    files = "\n".join(file.read_text() for file in MONITORING.rglob("*") if file.is_file())
    named = set(re.findall(r"\bvllm:\w+|\bhttp_\w+_total", files))
    assert len(named) >= 12
    assert not {name for name in named if not re.search(rf"^{name}[ {{]", live, re.M)}
    for label in ("handler", "status"):  # that rules.yml selects by
        assert re.search(rf'^http_requests_total{{.*{label}="', live, re.M)
    ends = r'^vllm:request_success_total{.*finished_reason="(\w+)"'
    assert {"abort", "error"} <= set(re.findall(ends, live, re.M))
    # Of nvitop-exporter, recorded on a GPU
    scrape = (ROOT / "results/h100-cap24/03_vllm/nvitop_exporter.txt").read_text()
    gpus = set(re.findall(r"gpu_[a-zA-Z_]+", files)) - {"gpu_"}
    assert {"gpu_temperature_C", "gpu_clock_sm_MHz"} <= gpus
    assert not {name for name in gpus if not re.search(rf"^{name}{{", scrape, re.M)}


def test_a_second_server_is_refused(server):
    assert "already runs at http://127.0.0.1:8000" in refused("make", "vllm-serve")
    assert "Paris" in ask(server)


# -----------------------------------------------------------------------------
# What production.md says of its key


def status(address: str, method: str = "GET", headers: dict | None = None) -> int:
    """The HTTP status of that request, its body an empty JSON object."""
    body = b"{}" if method == "POST" else None
    call = urllib.request.Request(address, body, JSON | (headers or {}), method=method)
    no_proxy = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
    )
    try:
        return no_proxy.open(call, timeout=PATIENCE).status
    except urllib.error.HTTPError as e:
        return e.code


def test_what_the_key_does_not_guard(server):
    """Every path of the live server, asked without the key: refused or answered as the table in
    production.md says; one of them generates.
    """
    page = PRODUCTION.read_text(encoding="utf-8")
    table = re.search(r"<!-- paths -->(.*?)<!-- /paths -->", page, re.S)[1]
    rows = [line.split("|")[1:3] for line in table.strip().splitlines()[2:]]
    guarded = set()
    listed = set()
    for paths, answer in rows:
        named = re.findall(r"`([^`]+)`", paths)
        if "401" in answer:
            guarded |= {path.removesuffix("...") for path in named}
        else:
            listed |= set(named)

    openapi = urllib.request.urlopen(f"{server}/openapi.json", timeout=PATIENCE)
    described = json.load(openapi)["paths"]
    routes = {(path, method.upper()) for path, methods in described.items() for method in methods}
    routes |= {(path, "GET") for path in ("/docs", "/redoc", "/openapi.json")}
    answers = {
        (path, method): status(f"{server}{re.sub('{.*?}', 'x', path)}", method)
        for path, method in routes
    }
    opened = {path for (path, _), code in answers.items() if code != 401}
    assert len(routes) >= 20 and opened == listed
    assert {path for path, _ in answers} - opened == {
        path for path, _ in answers if path.startswith(tuple(guarded))
    }

    assert "Paris" in post(f"{server}/invocations", QUESTION, headers={})
    assert status(f"{server}/v1/models", headers=KEY) == 200


@pytest.mark.needs("nginx", "openssl")
def test_nginx_lets_only_the_allowlist_through(server, tmp_path):
    """The real nginx with production.md's configuration before the live server."""
    flags = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=llm.example.com"]
    files = ["-keyout", tmp_path / "llm.key", "-out", tmp_path / "llm.crt"]
    run("openssl", "req", *flags, *files, check=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = re.search(r"```nginx\n(.*?)```", PRODUCTION.read_text(encoding="utf-8"), re.S)[1]
    site = page.replace("listen 443", f"listen 127.0.0.1:{port}")
    site = site.replace("/etc/nginx/", f"{tmp_path}/")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = [f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds]
    around = [f"pid {tmp_path}/pid;", f"error_log {tmp_path}/error.log;", "events {}"]
    http = ["http {", "access_log off;", *folders, site, "}"]
    configuration = tmp_path / "nginx.conf"
    configuration.write_text("\n".join([*around, *http]) + "\n")
    nginx = subprocess.Popen(["nginx", "-c", configuration, "-g", "daemon off;"], env=ENVIRONMENT)
    try:
        while not jobs.port_taken(port):
            assert nginx.poll() is None, "nginx has ended"
            time.sleep(0.1)
        proxy = f"https://127.0.0.1:{port}"
        assert status(f"{proxy}/v1/models") == 401
        assert status(f"{proxy}/v1/models", headers=KEY) == 200
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
        nginx.wait(timeout=PATIENCE)


def test_stop_ends_ours_and_nothing_else(server):
    """A stranger whose command line looks like vLLM's lives on; a killed leader's workers end."""
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "vllm.entrypoints.openai.api_server"]
    )
    try:
        job = jobs.running()["vllm"]
        processes = jobs.members(job)
        assert len(processes) >= 2
        os.kill(job["pid"], signal.SIGKILL)
        time.sleep(1)
        assert "vllm" in jobs.running() or not living(processes)
        run("make", "stop", check=0)
        assert not living(processes)
        assert stranger.poll() is None
    finally:
        stranger.kill()


# -----------------------------------------------------------------------------
# Without a server


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
    "flag, reason",
    [
        ("--tensor-parallel-size=2", "attention heads"),
        pytest.param(
            "--no-such-flag", "unrecognized arguments: --no-such-flag", marks=pytest.mark.long
        ),
    ],
)
def test_settings_the_engine_refuses(no_server, flag, reason):
    sentence = refused("make", "vllm-serve", f"ARGS={flag}")
    assert reason in sentence and shown(RUNS / "03_vllm/serve.log") in sentence
    assert not jobs.running()


@pytest.mark.long
def test_recipes(no_server):
    """Each recipe's command is one that vLLM's own parser takes, its model one of the catalogue; an
    unknown one is refused by name.
    """
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert len(recipes) >= 11
    commands = []
    for recipe in recipes:
        settings = yaml.safe_load(recipe.read_text())
        assert models.entry(settings["model"])[1]
        dry = ["python", SERVE, "--recipe", recipe.stem, "--dry-run"]
        command = run(*dry, check=0, PROFILE="4090x2").stdout
        assert all(key in command for key in settings)
        commands.append(shlex.split(command)[3:])
    code = """
import json, sys
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser, commands = make_arg_parser(FlexibleArgumentParser()), json.loads(sys.argv[1])
for words in commands:
    parser.parse_args(words)
told = parser.parse_args(["--default-chat-template-kwargs.enable_thinking=false"])  # of lf-merge
assert told.default_chat_template_kwargs == {"enable_thinking": False}
try:
    parser.parse_args([*commands[0], "--no-such-flag"])
except SystemExit as e:
    sys.exit(e.code - 2)
sys.exit("the parser takes anything")
"""
    run("python", "-c", code, json.dumps(commands), check=0)
    assert "choose one of 32b-awq-tp2" in refused("make", "vllm-serve", "RECIPE=nope")


@pytest.fixture
def seeing_server():
    """(address, the requests that it got): a server that answers as one with a model that sees."""
    requests = []

    class Page(http.server.BaseHTTPRequestHandler):
        def answer(self, reply: dict) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def do_GET(self):
            self.answer({"object": "list", "data": [{"id": "seer", "object": "model"}]})

        def do_POST(self):
            length = int(self.headers["Content-Length"])
            requests.append(json.loads(self.rfile.read(length)))
            parts = requests[-1]["messages"][0]["content"]
            message = {"role": "assistant", "content": "A red circle and a blue square."}
            usage = {"prompt_tokens": 226 if len(parts) == 2 else 30, "completion_tokens": 9}
            self.answer({"choices": [{"index": 0, "message": message}], "usage": usage})

        def log_message(self, *_):
            pass

    page = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{page.server_address[1]}", requests
    page.shutdown()


def sent_picture(request: dict):
    from PIL import Image

    picture, question = request["messages"][0]["content"]
    assert question["type"] == "text" and picture["type"] == "image_url"
    kind, data = picture["image_url"]["url"].split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{image.format.lower()}"
    return image.convert("RGB")


def test_a_picture_is_sent_inside_the_message(seeing_server, tmp_path):
    """vLLM's vision-language models need torchvision, which the CPU lock lacks: a stand-in here."""
    from PIL import Image

    address, requests = seeing_server
    done = run("python", PICTURE, "--address", address, "--side", "300", check=0)
    assert "196 of them the picture" in done.stdout and "A red circle" in done.stdout
    drawn = sent_picture(requests[0])
    assert drawn.size == (300, 300)
    left, right = drawn.getpixel((80, 150)), drawn.getpixel((215, 150))
    assert (left, right) == ((255, 0, 0), (0, 0, 255))
    assert len(requests[1]["messages"][0]["content"]) == 1  # the same question without it

    Image.new("RGB", (40, 30), "green").save(tmp_path / "mine.jpg")
    run("python", PICTURE, "--address", address, "--image", tmp_path / "mine.jpg", check=0)
    assert sent_picture(requests[2]).size == (40, 30)


@pytest.mark.long
def test_the_recipe_of_the_reranker_scores_as_transformers_does(no_server, small_model, tmp_path):
    """A two-layer Qwen3 served with the recipe's own values: its score of a text is the share that
    `yes` has beside `no` where the published form of question and text ends.
    """
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.3,  # scores that differ
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(shape).eval()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")

    recipe = yaml.safe_load((RECIPES / "qwen3-reranker-0.6b.yaml").read_text())
    flags = {name: recipe[name] for name in ("runner", "hf-overrides", "chat-template")}
    flags |= {"dtype": "float32", "max-model-len": 512}
    run("python", SERVE, "--model", tmp_path / "tiny", *engine.words(flags), check=0)
    texts = ["Paris is the capital of France.", "A cat sleeps.", "Bread is baked."]
    body = {"model": "tiny", "query": "What is the capital of France?", "documents": texts}
    address = "http://127.0.0.1:8000/v1/rerank"
    call = urllib.request.Request(address, json.dumps(body).encode(), JSON | KEY)
    ranking = json.load(urllib.request.urlopen(call, timeout=PATIENCE))["results"]
    scores = {item["index"]: item["relevance_score"] for item in ranking}
    run("make", "stop", check=0)

    template = (ROOT / recipe["chat-template"]).read_text()
    answers = tokenizer.convert_tokens_to_ids(
        json.loads(recipe["hf-overrides"])["classifier_from_token"]
    )
    for place, text in enumerate(texts):
        turns = [{"role": "query", "content": body["query"]}, {"role": "document", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        assert prompt.endswith("<think>\n\n</think>\n\n")
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, answers]
        assert scores[place] == pytest.approx(logits.softmax(0)[1].item(), abs=1e-4)
    assert max(scores.values()) - min(scores.values()) > 0.01


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
        while "vllm" not in jobs.running():
            assert process.poll() is None, process.communicate()
            time.sleep(0.2)
        members = jobs.members(jobs.running()["vllm"])
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        assert process.returncode != 0 and not jobs.running()
        assert not living(members)
