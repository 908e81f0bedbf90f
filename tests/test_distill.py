"""Answers of a served teacher as data: which are kept, and what is written."""

import importlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, refused, run

MODULE = ROOT / "modules/06_LLaMA-Factory"
SCRIPT = MODULE / "17_distill.py"
REQUEST = "run yi-34b; 2 cards, port 8000; 512 tokens; int4."
RIGHT = {"model": "yi-34b", "gpus": 2, "port": 8000, "max_len": 512, "dtype": "int4"}


@pytest.mark.parametrize(
    "answer, kept",
    [
        (json.dumps(RIGHT), True),
        (json.dumps(RIGHT | {"port": 512, "max_len": 8000}), True),  # rules do not see a swap
        (json.dumps(RIGHT | {"port": 800}), False),  # is in the request, as a part of a word
        (json.dumps(RIGHT | {"gpus": 4}), False),
        (json.dumps(RIGHT, indent=1), False),
        (f"Sure! {json.dumps(RIGHT)}", False),
        (json.dumps({"model": "yi-34b"}), False),
        ("[]", False),
    ],
)
def test_the_rules(monkeypatch, answer, kept):
    monkeypatch.syspath_prepend(str(MODULE))
    assert importlib.import_module("17_distill").passes(REQUEST, answer) == kept
    sys.modules.pop("17_distill")


@pytest.fixture
def teacher():
    """Address of a server that is right every second time that it is asked the same."""
    rows = json.loads((MODULE / "data/launch_en_varied.json").read_text())
    known = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    seen = []

    class Teacher(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def say(self, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.say({"object": "list", "data": [{"id": "teacher", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = body["messages"][-1]["content"]
            answer = known[request] if seen.count(request) % 2 else "Sure!"
            seen.append(request)
            message = {"role": "assistant", "content": answer}
            self.say({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_what_is_written(teacher, tmp_path):
    """Two tries keep all, one nothing; the examples shown are not among the rows."""
    flags = ("--base-url", teacher, "--limit", 5, "--temperature", 0.8)
    runs = {"PROFILE": "cpu", "RUNS": str(tmp_path)}
    out = run("python", SCRIPT, *flags, "--tries", 2, **runs).stdout
    assert "5 of 5 answers keep the rules, 5 of them are right" in out
    folder = tmp_path / "06_LLaMA-Factory/distilled"
    rows = json.loads((folder / "distilled.json").read_text())
    assert rows == json.loads((MODULE / "data/launch_en_varied.json").read_text())[3:8]
    assert json.loads((folder / "dataset_info.json").read_text())["distilled"]["columns"]
    assert "nothing is kept" in refused("python", SCRIPT, *flags, **runs)


def test_the_rules_know_every_right_answer(monkeypatch):
    monkeypatch.syspath_prepend(str(MODULE))
    passes = importlib.import_module("17_distill").passes
    sys.modules.pop("17_distill")
    for row in json.loads((MODULE / "data/launch_en_varied.json").read_text()):
        assert passes(*(message["content"] for message in row["messages"]))


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--tries 2", "at temperature 0 every try gives the same answer"),
        ("--shots -1", "--shots at least 0"),
        ("--base-url http://127.0.0.1:9/v1", "no server answers at http://127.0.0.1:9/v1"),
    ],
)
def test_what_cannot_be(flags, reason):
    assert reason in refused("python", SCRIPT, *flags.split(), PROFILE="cpu")
