"""The plumbing of 14_two_nodes.py: its two processes, and a question over the cable."""

import json
import subprocess
import urllib.request
from pathlib import Path

from lab import cable, engine, jobs, shown
from lab.cable import Traffic

# A worker has nothing to finish, and would wait for its lost peer.
GRACE_S = {"node0": 25, "node1": 1}


class Servers:
    """The process of each machine. Neither comes up without the other, so neither may end."""

    def __init__(self):
        self.processes: dict[str, subprocess.Popen] = {}
        self.logs: dict[str, Path] = {}

    def start(self, node: str, command: list[str], log: Path) -> None:
        """Run `command` on the machine `node`, as a job of that name."""
        self.logs[node] = log
        self.processes[node] = jobs.start(node, cable.on_machine(node, command), log)

    def poll(self) -> str | None:
        """As that of a process: None while both live."""
        return self.ended() or None

    def ended(self) -> str:
        """Which of them ended, and why; "" while both live."""
        reasons = []
        for node, process in self.processes.items():
            code = process.poll()
            if code is not None:
                log = self.logs[node]
                reasons.append(f"{node} (exit code {code}): {engine.cause(log)} (see {shown(log)})")
        return "; ".join(reasons)

    def stop(self) -> None:
        for node, grace_s in GRACE_S.items():
            running = jobs.running()
            if node in running:
                jobs.stop(running[node], grace_s)


def ask(port: int, question: str, tokens: int) -> tuple[dict, Traffic]:
    """The greedy answer of `tokens` tokens, and its traffic."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    before = cable.counted()
    answer = json.load(urllib.request.urlopen(call, timeout=300))
    after = cable.counted()
    traffic = Traffic(*(now - then for now, then in zip(after, before, strict=True)))
    return answer | answer["choices"][0], traffic


def per_token(longer: list[Traffic], shorter: list[Traffic], tokens: int) -> Traffic:
    """One token's traffic, where the longer answers have `tokens` more, all together."""
    of_longer = [sum(column) for column in zip(*longer, strict=True)]
    of_shorter = [sum(column) for column in zip(*shorter, strict=True)]
    return Traffic(*((a - b) / tokens for a, b in zip(of_longer, of_shorter, strict=True)))
