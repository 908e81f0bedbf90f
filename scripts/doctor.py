"""Is this machine fit for the six stages? Every check does the thing and compares: `make doctor`.

    make doctor                              # three minutes the first time, which compiles
    make doctor ARGS="--only ports all-reduce"
    make doctor ARGS="--json"
    make doctor ARGS="--strict"              # exit code 1 for warnings

Look at: the verdicts. `failed` and `warning` name the entry of the FAQ
(modules/01_single_gpu_smoke/faq.md) that mends it; a check of something that this machine does not
have is `not applicable`, never `ok`. Exit code 2 where a check failed. The checks themselves are in
scripts/doctor_checks/.
"""

import argparse
import json
import os
import re
import sys
import time

from doctor_checks import ABSENT, FAILED, OK, WARNING, cards, host, links, software

from lab import ROOT, fail, machine, results
from lab.profile import load_profile

FAQ = "modules/01_single_gpu_smoke/faq.md"

# Name, the check, the anchor of its entry in the FAQ.
CHECKS = {
    "versions": (software.versions, "faq-versions"),
    "path": (software.path, "faq-path"),
    "driver": (cards.driver, "faq-driver"),
    "headers": (software.headers, "faq-headers"),
    "compiler": (software.compiler, "faq-compiler"),
    "torch-compile": (software.torch_compile, "faq-torch-compile"),
    "triton": (software.triton, "faq-triton"),
    "nvcc": (software.nvcc, "faq-nvcc"),
    "all-reduce": (links.all_reduce, "faq-gloo"),
    "nccl": (links.nccl, "faq-p2p"),
    "iommu": (links.iommu, "faq-iommu"),
    "ram": (host.ram, "faq-ram"),
    "pinned": (cards.pinned, "faq-pinned"),
    "shared-memory": (host.shared_memory, "faq-shm"),
    "disk": (host.disk, "faq-disk"),
    "limits": (host.limits, "faq-limits"),
    "ports": (host.ports, "faq-ports"),
    "proxy": (host.proxy, "faq-proxy"),
    "hub": (host.hub, "faq-hub"),
    "desktop": (cards.desktop, "faq-desktop"),
    "orphans": (host.orphans, "faq-orphans"),
    "load": (cards.load, "faq-load"),
    "xid": (cards.xid, "faq-xid"),
    "wsl": (cards.wsl, "faq-wsl"),
}


def snapshot(findings: dict[str, dict], profile) -> None:
    """Put this machine, the versions and the verdicts between the marks of .CLAUDE.md."""
    facts = machine.describe()
    gpus = ", ".join(
        f"{g['name']} ({g['memory_gib']} GiB, driver {g['driver']})" for g in facts["gpus"]
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
    lines = [
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB; {gpus or 'no GPU'}; "
        f"profile {profile.name}.",
        f"- {versions}; Python {sys.version.split()[0]}.",
    ]
    for name, finding in findings.items():
        if finding["verdict"] != ABSENT:
            lines.append(f"- {name}: {finding['verdict']}, {finding['found']}")
    file = ROOT / ".CLAUDE.md"
    marks = re.compile(r"(<!-- snapshot -->\n).*?(<!-- /snapshot -->)", re.S)
    text = file.read_text(encoding="utf-8")
    text, count = marks.subn(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)
    if not count:
        fail(
            ".CLAUDE.md has no place for a snapshot: "
            "put back the lines <!-- snapshot --> and <!-- /snapshot -->"
        )
    file.write_text(text, encoding="utf-8")
    print("written: .CLAUDE.md", file=sys.stderr)


def examine(name: str, profile) -> dict:
    """The check's verdict, what was found, its seconds, and the FAQ's entry where it is wanted."""
    check, anchor = CHECKS[name]
    began = time.monotonic()
    try:
        verdict, description = check(profile)
    except Exception as error:  # a check that breaks has found something
        verdict = FAILED
        description = f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - began, 1)
    finding = {"verdict": verdict, "found": description, "seconds": seconds}
    if verdict in (WARNING, FAILED):
        finding["faq"] = f"{FAQ}#{anchor}"
    return finding


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(CHECKS)
    parser.add_argument("--only", nargs="+", metavar="CHECK", help=f"only these: {names}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--snapshot", action="store_true", help="write it into .CLAUDE.md")
    parser.add_argument("--strict", action="store_true", help="exit code 1 for a warning")
    args = parser.parse_args()
    if unknown := set(args.only or []) - CHECKS.keys():
        fail(f"there is no check {', '.join(sorted(unknown))}: choose from {names}")

    profile = load_profile(check=False)
    findings = {}
    for name in CHECKS:
        if args.only and name not in args.only:
            continue
        finding = findings[name] = examine(name, profile)
        if not args.json:
            print(f"{finding['verdict']:15} {name:14} {finding['found']}", flush=True)
            if "faq" in finding:
                print(f"{'':30} -> {finding['faq']}", flush=True)
    verdicts = [finding["verdict"] for finding in findings.values()]
    if args.json:
        print(json.dumps(findings, ensure_ascii=False))
    else:
        counts = {verdict: verdicts.count(verdict) for verdict in (OK, WARNING, FAILED, ABSENT)}
        print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    if args.snapshot:
        snapshot(findings, profile)
    if os.environ.get("STORE") == "1" and not args.only:
        metrics = {name: f"{f['verdict']}: {f['found']}" for name, f in findings.items()}
        metrics["took_s"] = round(sum(finding["seconds"] for finding in findings.values()))
        results.finish(__file__, metrics)
    else:
        results.note(results.name_of(__file__))
    if FAILED in verdicts:
        raise SystemExit(2)
    raise SystemExit(1 if args.strict and WARNING in verdicts else 0)


if __name__ == "__main__":
    main()
