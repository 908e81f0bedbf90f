"""Under load: what the load test counts as a failure (on a made-up server), and, in test-long, the
real server under it, drained, and killed.
"""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import ENVIRONMENT, PATIENCE, ROOT, python, refused, run

from lab import jobs

LOAD = "modules/03_vllm/12_load.py"


# -----------------------------------------------------------------------------
# A made-up server that answers as vLLM would on a bad day


@contextlib.contextmanager
def pretender(
    finish_reason: str = "length", kv: float = 0.0, missing: int = 0, root: str = "", key: str = ""
):
    """Address of a server whose answers end by `finish_reason`, `missing` tokens short, and whose
    cache afterwards is `kv` full; `root` is its model's folder, `key` what it wants to be told
    before it says which.
    """
    metrics = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
    metrics += f"vllm:kv_cache_usage_perc {kv}\n"
    metrics += "# TYPE vllm:generation_tokens counter\nvllm:generation_tokens_total 9\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, text: str, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            if key and self.path != "/metrics" and self.headers["Authorization"] != f"Bearer {key}":
                return self.reply('{"error":"Unauthorized"}', "application/json", 401)
            models = json.dumps(
                {
                    "object": "list",
                    "data": [
                        {"id": "m", "object": "model", "created": 0, "owned_by": "x", "root": root}
                    ],
                }
            )
            self.reply(
                *(
                    (metrics, "text/plain")
                    if self.path == "/metrics"
                    else (models, "application/json")
                )
            )

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            count = asked["max_tokens"] - missing
            piece = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
            pieces = [
                piece
                | {
                    "choices": [
                        {
                            "index": 0,
                            "text": "x",
                            "finish_reason": finish_reason if i == count - 1 else None,
                        }
                    ]
                }
                for i in range(count)
            ]
            pieces.append(
                piece
                | {
                    "choices": [],
                    "usage": {
                        "prompt_tokens": 1,
                        "completion_tokens": count,
                        "total_tokens": count + 1,
                    },
                }
            )
            self.reply(
                "".join(f"data: {json.dumps(p)}\n\n" for p in pieces) + "data: [DONE]\n\n",
                "text/event-stream",
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    "trouble, failed", [({}, 0), ({"finish_reason": "abort"}, 6), ({"missing": 1}, 6)]
)
def test_what_counts_as_failed(trouble, failed):
    """A cut answer has status 200 and is a failure all the same; so is one that lacks a token."""
    with pretender(**trouble) as address:
        flags = ["--address", address, "--requests", "6", "--cancel", "0", "--disconnect", "0"]
        done = python(LOAD, *flags, check=1 if failed else 0)
    assert json.loads(done.stdout.splitlines()[-1])["failed_count"] == failed
    assert not failed or "failed:" in done.stdout


@pytest.mark.parametrize("script", ["04_watch.py", "12_load.py", "13_bench.py"])
def test_a_server_that_wants_a_key(script):
    with pretender(key="secret") as address:
        sentence = refused("python", f"modules/03_vllm/{script}", "--address", address)
    assert "wants an API key: set VLLM_API_KEY" in sentence and address in sentence


def test_refusals():
    assert "make vllm-serve" in refused("python", LOAD, "--address", "http://127.0.0.1:9")
    assert "shares of 1" in refused("python", LOAD, "--cancel", "0.8", "--disconnect", "0.5")
    assert "must be positive" in refused("python", LOAD, "--requests", "0")


# -----------------------------------------------------------------------------
# The real server


def post(**request) -> dict:
    body = json.dumps({"prompt": [1000, 2000], "ignore_eos": True} | request).encode()
    call = urllib.request.Request(
        "http://127.0.0.1:8000/v1/completions", body, {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(call, timeout=PATIENCE))


@pytest.mark.long
def test_cache_that_stays_full():
    """10 s of patience, then exit code 1."""
    with pretender(kv=0.25) as address:
        flags = ["--address", address, "--requests", "4", "--cancel", "0", "--disconnect", "0"]
        done = python(LOAD, *flags, check=1)
    assert "NOT EMPTY" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["kv_cache_after_pct"] == 25


def running_requests(address: str) -> bool:
    metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return bool(re.search(r"^vllm:num_requests_running.* [1-9]", metrics, re.M))


@pytest.mark.long
def test_load_then_drain(server):
    """Nothing fails, the queue was used, the cache is empty after; too long a request is refused
    with the reason; SIGTERM lets answers end.
    """
    done = run("make", "vllm-load", "ARGS=--requests 40 --output-tokens 24", check=0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failed_count"] == 0 and result["kv_cache_after_pct"] == 0
    ended = [result[f"{how}_count"] for how in ("finished", "cancelled", "disconnected")]
    assert sum(ended) == 40 and result["cancelled_count"] == 6
    assert result["running_peak_count"] <= 32 and result["waiting_peak_count"] > 0
    assert result["ttft_p50_ms"] < result["e2e_p50_ms"] < result["e2e_p99_ms"]

    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(prompt=[1000] * 3000, max_tokens=1)
    assert refusal.value.code == 400
    message = json.load(refusal.value)["error"]["message"]
    assert "maximum context length is 2048" in message

    answers: list[dict] = []
    reader = threading.Thread(target=lambda: answers.append(post(max_tokens=40)))
    reader.start()
    while reader.is_alive() and not running_requests(server):
        time.sleep(0.05)
    assert not answers
    assert "ended vllm" in run("make", "stop", check=0).stdout
    reader.join(timeout=PATIENCE)
    (answer,) = answers  # none, had jobs.stop had to kill the server
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 40
    assert not jobs.running()


@pytest.mark.long
def test_killed_engine():
    """In front: its engine process killed, the server ends with exit code 1 and one clear line, and
    leaves no process.
    """
    run("make", "stop", check=0)
    front = subprocess.Popen(
        ["make", "vllm-serve", "FG=1"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(front.stdout), daemon=True).start()
    try:
        healthy = False
        while not healthy:  # as long as it takes: the test's own time limit ends a hang
            ended = f"the server ended before it was ready: {''.join(lines)}"
            assert front.poll() is None, ended
            with contextlib.suppress(OSError):
                healthy = urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=2)
            time.sleep(0.5)
        processes = jobs.members(jobs.running()["vllm"])
        os.kill(next(p.pid for p in processes if "EngineCore" in p.name()), signal.SIGKILL)
        front.wait(timeout=PATIENCE)
        time.sleep(0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(front.pid, signal.SIGKILL)
        run("make", "stop", check=0)
    log = "".join(lines)
    # make's exit code for a recipe that failed, and the recipe's own
    assert front.returncode == 2 and "Error 1" in log
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "ended though nobody stopped it" in sentence
    assert "EngineDeadError" in log
    assert not [p for p in processes if p.is_running() and p.status() != "zombie"]
