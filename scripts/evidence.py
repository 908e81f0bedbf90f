"""Measure this machine's records, store them under results/<machine>/ and write the tables: `make evidence`.

Takes a few minutes on a CPU. Commit results/ afterwards: it is what the numbers in the readmes stand on.
"""

import argparse
import os
import subprocess
import sys

from lab import ROOT, fail, machine

# Scripts that need the server running come between its start and its end.
COMMANDS = [
    "modules/01_single_gpu_smoke/01_smoke.py",
    "modules/03_vllm/03_throughput.py",
    "modules/03_vllm/01_serve.py",
    "modules/03_vllm/02_chat.py",
    "modules/03_vllm/04_watch.py",
    "scripts/stop.py",
    "scripts/tables.py",
]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if machine.commit().endswith("-dirty"):
        print("note: tracked files differ from the commit; the records will say so", file=sys.stderr)
    for command in COMMANDS:
        print(f"== {command}", flush=True)
        if subprocess.run([sys.executable, command], cwd=ROOT, env=os.environ | {"STORE": "1"}).returncode:
            subprocess.run([sys.executable, "scripts/stop.py"], cwd=ROOT)
            fail(f"{command} failed (see above); what was measured before it is stored")


if __name__ == "__main__":
    main()
