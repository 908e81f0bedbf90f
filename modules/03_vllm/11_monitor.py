"""Start Prometheus beside the server and show what it sees: targets, recording rules, alerts.

    make vllm-serve                     # first, or there is little to see: VllmDown fires then
    make monitor                        # returns once it has scraped; again: the state now
    make monitor ARGS="--port 9091"     # where 9090 is taken
    make stop                           # ends it too; what it stored stays in runs/03_vllm

The program is Debian's package (sudo apt install prometheus), without Docker; the rules are in
configs/monitoring/rules.yml. Where the profile computes on GPUs, nvitop-exporter is started beside
it.
Look at: an alert goes from `inactive` over `pending` (its condition holds) to `firing` (has held
for its `for`), and back.
"""

import argparse
import json
import re
import shutil
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from lab import RUNS, fail, jobs, results, shown
from lab.profile import load_profile

CONFIG = Path(__file__).parent / "configs" / "monitoring" / "prometheus.yml"
FOLDER = RUNS / "03_vllm"


def get(address: str, path: str, **query) -> dict:
    """The `data` of Prometheus' answer to /api/v1/<path>."""
    url = f"{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


def cause(log: Path) -> str:
    """The error that Prometheus wrote last, else its last line."""
    text = log.read_text(errors="replace")
    errors = re.findall(r'err="((?:[^"\\]|\\.)*)"', text)
    lines = errors or text.splitlines() or ["it wrote nothing"]
    return lines[-1][:300]


def start_exporter() -> None:
    """nvitop-exporter on 127.0.0.1:5050, where prometheus.yml expects it."""
    if "nvitop-exporter" in jobs.running():
        return
    jobs.refuse_taken_port(5050, "let that be the exporter and set PROFILE=cpu")
    program = str(Path(sys.executable).parent / "nvitop-exporter")
    address = "http://127.0.0.1:5050/metrics"
    log = FOLDER / "nvitop-exporter.log"
    command = [program, "--bind-address", "127.0.0.1", "--port", "5050"]
    process = jobs.start("nvitop-exporter", command, log)
    jobs.wait_healthy("nvitop-exporter", process, address, log, lambda: cause(log), timeout_s=60)


def start_prometheus(program: str, port: int) -> str:
    """Start it on 127.0.0.1:`port` and wait until it is ready. Returns its address."""
    address = f"http://127.0.0.1:{port}"
    ready = f"{address}/-/ready"
    log = FOLDER / "prometheus.log"
    command = [
        program,
        f"--config.file={CONFIG}",
        f"--storage.tsdb.path={FOLDER / 'prometheus'}",
        "--storage.tsdb.retention.time=7d",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = jobs.start("prometheus", command, log, address=address)
    jobs.wait_healthy("prometheus", process, ready, log, lambda: cause(log), timeout_s=60)
    return address


def show(address: str, targets: list[dict], rules: list[dict]) -> None:
    """What Prometheus says of its targets, the recording rules' values and the alerts' states."""
    print(f"Prometheus: {address}   alerts: {address}/alerts   end it: make stop")
    for target in targets:
        name = target["labels"]["job"]
        error = target["lastError"][:90]
        print(f"  target {name:6} {target['health']:5} {target['scrapeUrl']}  {error}")
    for rule in rules:
        if rule["type"] == "recording":
            samples = get(address, "query", query=rule["name"])["result"]
            value = f"{float(samples[0]['value'][1]):.4g}" if samples else "no data yet"
            print(f"  {rule['name']:46} {value}")
    for rule in rules:
        if rule["type"] == "alerting":
            why = "" if rule["state"] == "inactive" else f"<- {rule['annotations']['summary']}"
            print(f"  {rule['name']:19} {rule['state']:9} {why}")
    if any(target["labels"]["job"] == "vllm" and target["health"] != "up" for target in targets):
        print("no server answers: start one with 'make vllm-serve'; then again 'make monitor'")


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--port", type=int, default=9090, help="of Prometheus, on 127.0.0.1 (default: %(default)s)"
    )
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. Start what is not running yet

    program = shutil.which("prometheus")
    if not program:
        way = "install it (Debian, Ubuntu: sudo apt install prometheus), then repeat 'make monitor'"
        fail(f"Prometheus is not installed: {way}")
    running = jobs.running().get("prometheus")
    if running:
        address = running["address"]
    else:
        # Debian's package starts one of its own at once.
        debian = "Debian's own Prometheus ends by 'sudo systemctl disable --now prometheus'"
        jobs.refuse_taken_port(args.port, f"take another one with --port; {debian}")
        if profile.device == "cuda":
            start_exporter()
        address = start_prometheus(program, args.port)

    # -----------------------------------------------------------------------------
    # 2. Wait until every target was scraped and every rule computed since

    def targets() -> list[dict]:
        return get(address, "targets", state="active")["activeTargets"]

    def rules() -> list[dict]:
        return [rule for group in get(address, "rules")["groups"] for rule in group["rules"]]

    def wait_until(done) -> None:
        patience = time.monotonic() + 60
        while not done():
            if time.monotonic() > patience:
                log = shown(FOLDER / "prometheus.log")
                fail(f"Prometheus at {address} has scraped nothing for a minute: see {log}")
            time.sleep(0.5)

    wait_until(lambda: targets() and all(target["health"] != "unknown" for target in targets()))
    scraped = max(target["lastScrape"] for target in targets())
    wait_until(lambda: all(rule["lastEvaluation"] > scraped for rule in rules()))

    # -----------------------------------------------------------------------------
    # 3. What it sees

    show(address, targets(), rules())
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
