"""Prometheus' rules: promtool on made-up series, and, in test-long, the real Prometheus on a live
server whose every trouble is provoked.

What needs the running server and nothing else stands in test_server.py, which has one: that every
panel and rule finds its metrics.
"""

import json
import math
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from conftest import ENVIRONMENT, PATIENCE, ROOT, refused, run

from lab import jobs

MONITORING = ROOT / "modules/03_vllm/configs/monitoring"
MONITOR = "modules/03_vllm/11_monitor.py"
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule["alert"] for rule in RULES if "alert" in rule]


def promtool(folder):
    return subprocess.run(
        ["promtool", "test", "rules", folder / "rules_test.yml"], capture_output=True, text=True
    )


@pytest.mark.needs("promtool")
def test_rules():
    """promtool: every recording rule computes what it should, every alert fires on its cause and
    clears without it.
    """
    done = promtool(MONITORING)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = (MONITORING / "rules_test.yml").read_text()
    for rule in RULES:
        assert (rule.get("alert") or rule["record"]) in tested
    assert all(
        rule["annotations"].keys() == {"summary", "action"} and rule["labels"]["severity"]
        for rule in RULES
        if "alert" in rule
    )


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("alert", ALERTS)
@pytest.mark.parametrize("expression", ["vector(0) > 1", "vector(1)"])
def test_a_broken_alert_is_found(alert, expression, tmp_path):
    """The rule tests notice an alert that never fires, and one that always does."""
    rules = yaml.safe_load((MONITORING / "rules.yml").read_text())
    next(
        rule for group in rules["groups"] for rule in group["rules"] if rule.get("alert") == alert
    )["expr"] = expression
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())
    tests["tests"] = [test for test in tests["tests"] if alert in str(test.get("alert_rule_test"))]
    (tmp_path / "rules_test.yml").write_text(yaml.safe_dump(tests))
    assert f"alertname: {alert}" in promtool(tmp_path).stderr


def test_the_page_explains_every_alert():
    page = (ROOT / "modules/03_vllm/production.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| .* \| .* \| .* \|$", page, re.M) == ALERTS


def test_objectives_are_those_of_the_benchmark():
    """The alerts' two constants are the GPU profiles' objectives, in seconds."""
    limit = {
        rule["alert"]: float(rule["expr"].split(">")[1])
        for rule in RULES
        if "Slow" in rule.get("alert", "")
    }
    for file in (ROOT / "configs/profiles").glob("*.yaml"):
        bench = yaml.safe_load(file.read_text())["bench"]
        if bench["slo_ttft_ms"] is None:  # a multiple of the run's own
            assert file.stem == "cpu" and bench["slo_tpot_ms"] is None
            continue
        objectives = {
            "VllmSlowFirstToken": bench["slo_ttft_ms"],
            "VllmSlowTokens": bench["slo_tpot_ms"],
        }
        assert limit == {name: ms / 1000 for name, ms in objectives.items()}, file.name


def test_quantiles_of_a_histogram():
    """make watch computes them as histogram_quantile does: linear within a bucket, of what came
    between two scrapes only.
    """
    quantile = runpy.run_path(str(ROOT / "modules/03_vllm/live_metrics.py"))["quantile"]
    before = {"x_bucket{1.0}": 100.0, "x_bucket{2.0}": 100.0, "x_bucket{+Inf}": 100.0}
    now = {"x_bucket{1.0}": 110.0, "x_bucket{2.0}": 130.0, "x_bucket{+Inf}": 140.0}
    assert [quantile(q, "x", before, now) for q in (0.125, 0.5, 0.99)] == [0.5, 1.5, 2.0]
    assert math.isnan(quantile(0.5, "x", now, now)) and math.isnan(quantile(0.5, "y", before, now))


def test_no_prometheus():
    assert "not installed" in refused(sys.executable, MONITOR, PATH="/nonexistent")


@pytest.mark.needs("prometheus")
def test_a_taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is in use" in refused("make", "monitor", f"ARGS=--port {taken.getsockname()[1]}")
    assert "prometheus" not in jobs.running()


# -----------------------------------------------------------------------------
# The same rules with short windows, on a live server with room for two requests


def alerts_firing() -> set[str]:
    try:
        answer = json.load(
            urllib.request.urlopen("http://127.0.0.1:19090/api/v1/alerts", timeout=10)
        )
    except OSError:  # Prometheus is starting
        return set()
    return {
        alert["labels"]["alertname"]
        for alert in answer["data"]["alerts"]
        if alert["state"] == "firing"
    }


def wait_until(condition, meanwhile=lambda: None) -> None:
    deadline = time.monotonic() + PATIENCE / 4  # counts as hung, however busy the machine is
    while not condition():
        assert time.monotonic() < deadline, f"firing: {alerts_firing()}"
        meanwhile()
        time.sleep(0.3)


@pytest.fixture
def prometheus(tmp_path):
    """The real one on rules.yml, every window and every `for` shortened to seconds."""
    rules = (MONITORING / "rules.yml").read_text().replace("[5m]", "[10s]").replace("[1m]", "[5s]")
    (tmp_path / "rules.yml").write_text(re.sub(r"for: \w+", "for: 1s", rules))
    (tmp_path / "prometheus.yml").write_text(
        re.sub(r"_interval: 5s", "_interval: 1s", (MONITORING / "prometheus.yml").read_text())
    )
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        "--web.listen-address=127.0.0.1:19090",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield
    process.terminate()
    process.wait(timeout=300)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.needs("prometheus", "curl")
def test_every_engine_alert_fires_and_clears(prometheus):
    """Down: no server, then its engine killed. Queue, cache, first token: more requests than fit.
    Preemptions: answers that outgrow the cache. Errors: too long a prompt. Tokens: the engine
    stopped for 0.3 s again and again. Stalled: stopped.
    """
    clients: list[subprocess.Popen] = []

    def ask(tokens: int = 118, prompt: int = 390) -> None:
        """A client in the background; one that is killed has hung up."""
        body = json.dumps(
            {
                "prompt": [1000 + len(clients)] + [2000] * (prompt - 1),
                "max_tokens": tokens,
                "ignore_eos": True,
            }
        )
        command = ["curl", "-sN", "http://127.0.0.1:8000/v1/completions"]
        command += ["-H", "Content-Type: application/json", "-d", body]
        clients.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT))

    def running() -> float:
        metrics = urllib.request.urlopen("http://127.0.0.1:8000/metrics").read().decode()
        return float(re.search(r"^vllm:num_requests_running\S* (\S+)$", metrics, re.M)[1])

    def hang_up() -> None:
        for client in clients:
            client.kill()
            client.wait()

    run("make", "stop", check=0)
    try:
        wait_until(lambda: "VllmDown" in alerts_firing())
        run(
            "make",
            "vllm-serve",
            "ARGS=--num-gpu-blocks-override 9 --max-model-len 512 --max-num-seqs 3",
            check=0,
        )
        wait_until(lambda: not alerts_firing())

        too_many = {"VllmQueueGrowing", "VllmKvCacheFull", "VllmSlowFirstToken"}
        wait_until(lambda: too_many <= alerts_firing(), meanwhile=ask)
        hang_up()
        wait_until(lambda: not alerts_firing())

        # 255 tokens are two blocks of 128: three requests fit, and outgrow the eight blocks at
        # their second token.
        wait_until(
            lambda: "VllmPreemptions" in alerts_firing(),
            meanwhile=lambda: ask(tokens=8, prompt=255),
        )
        hang_up()
        wait_until(lambda: not alerts_firing())

        wait_until(lambda: "VllmErrorRate" in alerts_firing(), meanwhile=lambda: ask(prompt=600))
        wait_until(lambda: not alerts_firing())

        engine = next(p for p in jobs.members(jobs.running()["vllm"]) if "EngineCore" in p.name())

        def stop_for_a_moment() -> None:
            ask(prompt=10)  # quickly read, so that there are tokens to wait for
            engine.suspend()
            time.sleep(0.3)
            engine.resume()

        wait_until(lambda: "VllmSlowTokens" in alerts_firing(), meanwhile=stop_for_a_moment)
        hang_up()
        wait_until(lambda: not alerts_firing())

        for _ in range(4):
            ask()
        wait_until(lambda: running() > 0)
        engine.suspend()
        wait_until(lambda: "VllmStalled" in alerts_firing())
        engine.resume()
        wait_until(lambda: "VllmStalled" not in alerts_firing())

        engine.send_signal(signal.SIGKILL)
        wait_until(lambda: "VllmDown" in alerts_firing())
        assert "vllm" not in jobs.running(), "the server of a killed engine must end, and whole"
    finally:
        hang_up()
        run("make", "stop", check=0)
