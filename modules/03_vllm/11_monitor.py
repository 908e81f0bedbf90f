"""Start Prometheus beside the server and show what it sees: its targets, the recording rules' values, the alerts' states.

    make vllm-serve                                  # first, or there is little to see: VllmDown fires then
    make monitor                                     # starts it in the background and returns once it has scraped; again: the state now
    make monitor ARGS="--port 9091"                  # where 9090 is taken
    make stop                                        # ends it too; what it stored stays in runs/03_vllm/prometheus

The program is Debian's package (sudo apt install prometheus), without Docker; the rules are in configs/monitoring/rules.yml. Where the
profile computes on GPUs, nvitop-exporter is started beside it.
Look at: an alert goes from `inactive` over `pending` (its condition holds) to `firing` (has held for its `for`), and back.
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
    with urllib.request.urlopen(f"{address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
        return json.load(answer)["data"]


def cause(log: Path) -> str:
    """The error that Prometheus wrote last, else its last line."""
    text = log.read_text(errors="replace")
    return (re.findall(r'err="((?:[^"\\]|\\.)*)"', text) or text.splitlines() or ["it wrote nothing"])[-1][:300]


def start_exporter() -> None:
    """nvitop-exporter on 127.0.0.1:5050, where prometheus.yml expects it."""
    if "nvitop-exporter" in jobs.running():
        return
    jobs.refuse_taken_port(5050, "let that be the exporter and set PROFILE=cpu")
    log = FOLDER / "nvitop-exporter.log"
    process = jobs.start("nvitop-exporter", [str(Path(sys.executable).parent / "nvitop-exporter"), "--bind-address", "127.0.0.1", "--port", "5050"], log)
    jobs.wait_healthy("nvitop-exporter", process, "http://127.0.0.1:5050/metrics", log, lambda: cause(log), timeout_s=60)


def start_prometheus(program: str, port: int) -> str:
    """Start it on 127.0.0.1:`port` and wait until it is ready. Returns its address."""
    address, log = f"http://127.0.0.1:{port}", FOLDER / "prometheus.log"
    command = [program, f"--config.file={CONFIG}", f"--storage.tsdb.path={FOLDER / 'prometheus'}", "--storage.tsdb.retention.time=7d"]
    process = jobs.start("prometheus", [*command, f"--web.listen-address=127.0.0.1:{port}"], log, address=address)
    jobs.wait_healthy("prometheus", process, f"{address}/-/ready", log, lambda: cause(log), timeout_s=60)
    return address


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus, on 127.0.0.1 (default: %(default)s)")
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. Start what is not running yet

    program = shutil.which("prometheus")
    if not program:
        fail("Prometheus is not installed: install it (Debian, Ubuntu: sudo apt install prometheus), then repeat 'make monitor'")
    if not (running := jobs.running().get("prometheus")):
        # Debian's package starts one of its own at once
        jobs.refuse_taken_port(args.port, "take another one with --port; Debian's own Prometheus ends by 'sudo systemctl disable --now prometheus'")
        if profile.device == "cuda":
            start_exporter()
    address = running["address"] if running else start_prometheus(program, args.port)

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
                fail(f"Prometheus at {address} has scraped nothing for a minute: see {shown(FOLDER / 'prometheus.log')}")
            time.sleep(0.5)

    wait_until(lambda: targets() and all(t["health"] != "unknown" for t in targets()))
    scraped = max(t["lastScrape"] for t in targets())
    wait_until(lambda: all(r["lastEvaluation"] > scraped for r in rules()))

    # -----------------------------------------------------------------------------
    # 3. What it sees

    print(f"Prometheus: {address}   alerts: {address}/alerts   end it: make stop")
    for target in targets():
        print(f"  target {target['labels']['job']:6} {target['health']:5} {target['scrapeUrl']}  {target['lastError'][:90]}")
    for rule in rules():
        if rule["type"] == "recording":
            values = [float(sample["value"][1]) for sample in get(address, "query", query=rule["name"])["result"]]
            print(f"  {rule['name']:46} {f'{values[0]:.4g}' if values else 'no data yet'}")
    for rule in rules():
        if rule["type"] == "alerting":
            print(f"  {rule['name']:19} {rule['state']:9} {'<- ' + rule['annotations']['summary'] if rule['state'] != 'inactive' else ''}")
    if any(t["labels"]["job"] == "vllm" and t["health"] != "up" for t in targets()):
        print("no server answers: start one with 'make vllm-serve'; make monitor shows the state again")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
