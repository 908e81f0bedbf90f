"""One model on two machines, without Ray: vLLM's own multi-node serving, over a cable whose bytes
are counted.

    make two-nodes                                # pipeline parallel: each machine has half of the layers
    make two-nodes ARGS="--parallel tp"           # tensor parallel: each machine has half of every layer

The two machines are two network namespaces of this one: each has its own interfaces, addresses,
ports and /dev/shm, and between them there is one virtual cable (a veth pair, 10.77.0.1 to
10.77.0.2). Only disk, memory and cores are common. Root is not needed where the system lets users
make namespaces (`unshare --map-root-user`). They belong to the script's own processes: when the
last of these has ended, the kernel takes namespaces and cable away, so there is nothing to clean
up, not even after `kill -9` and `make stop`. Machine 0 runs the API server and rank 0, machine 1
only a worker (`--headless`). In float32 both must answer with the tokens of one process of
transformers. SmolLM2's 9 heads (3 KV) cannot be divided by two: for tp they get 3 (1) more of
zeros, which change nothing.
Look at: the two commands (all that differs is each one's own part), the bytes of a token on the
cable beside the arithmetic, pp against tp.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil

from lab import RUNS, engine, fail, jobs, models, results, shown
from lab.profile import load_profile

CABLE, ADDRESSES, PORT = (
    "vllm-cable",
    ("10.77.0.1", "10.77.0.2"),
    8000,
)  # the port is machine 0's own: nothing else can have taken it
NETWORK = f"""
mount -t tmpfs tmpfs /run        # private to this mount namespace: ip keeps the names of network namespaces in /run/netns
ip netns add node0
ip netns add node1
ip link add {CABLE} netns node0 type veth peer name {CABLE} netns node1
ip -n node0 addr add {ADDRESSES[0]}/24 dev {CABLE}
ip -n node1 addr add {ADDRESSES[1]}/24 dev {CABLE}
for node in node0 node1; do ip -n $node link set lo up; ip -n $node link set {CABLE} up; done
exec ip netns exec node0 "$@"
"""
# in a common one vLLM would see that both are on one host, and pass the cable by
OWN_SHM = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
)
LOGS = [RUNS / "03_vllm" / f"node{i}.log" for i in (0, 1)]
HEADERS = 66  # bytes of a packet's Ethernet, IP and TCP headers
MOVED = "TWO_NODES_MODEL"  # variable: the model's folder, for the same script on machine 0


def way_to_machine_0() -> list[str]:
    """The command that lays the cable and then runs another one on machine 0: as root if this is
    root, else as root of a user namespace.
    """
    if missing := [program for program in ("ip", "unshare") if not shutil.which(program)]:
        fail(f"the program {missing[0]} is not installed: sudo apt install iproute2 util-linux")
    for namespaces in (["--net", "--mount"], ["--map-root-user", "--net", "--mount"]):
        command = ["unshare", *namespaces, "sh", "-ec", NETWORK, "two-nodes"]
        tried = subprocess.run([*command, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return command
    fail(
        f"no network namespaces can be made here ({tried.stderr.strip().rpartition(chr(10))[2]}): be root, or give the container the capabilities NET_ADMIN and SYS_ADMIN"
    )


def ask(question: str, tokens: int) -> tuple[dict, float, list[int]]:
    """The greedy answer, its seconds, and what the cable carried meanwhile: bytes to machine 1,
    bytes back, packets to machine 1.
    """
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    call = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    before, began = psutil.net_io_counters(pernic=True)[CABLE], time.perf_counter()
    answer = json.load(urllib.request.urlopen(call, timeout=300))
    seconds, after = time.perf_counter() - began, psutil.net_io_counters(pernic=True)[CABLE]
    carried = [
        after.bytes_sent - before.bytes_sent,
        after.bytes_recv - before.bytes_recv,
        after.packets_sent - before.packets_sent,
    ]
    return answer | answer["choices"][0], seconds, carried


def ended(processes: list[subprocess.Popen]) -> str:
    """Which of the machines' processes ended, and why; "" while both live."""
    gone = [
        (i, process.poll()) for i, process in enumerate(processes) if process.poll() is not None
    ]
    return "; ".join(
        f"node{i} (exit code {code}): {engine.cause(LOGS[i])} (see {shown(LOGS[i])})"
        for i, code in gone
    )


def inhabitants(node: str) -> list[int]:
    """Processes on that machine, this one apart."""
    pids = subprocess.run(
        ["ip", "netns", "pids", node], capture_output=True, text=True
    ).stdout.split()
    return [
        pid for pid in map(int, pids) if pid != os.getpid() and psutil.pid_exists(pid)
    ]  # `ip` itself has ended


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parallel",
        choices=("pp", "tp"),
        default="pp",
        help="divide the layers, or every layer (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="name in configs/models.yaml, hub id or folder (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=int, default=32, help="of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds to wait for a healthy server (default: %(default)s)",
    )
    args = parser.parse_args()
    if not 2 <= args.tokens <= 256:
        fail(
            "--tokens must be 2 to 256: the first comes of reading the prompt, the others are measured"
        )
    if profile.device != "cpu":
        fail(
            "this script computes on the CPU: make two-nodes PROFILE=cpu, in the CPU environment (LOCK=cpu)"
        )
    if running := {"node0", "node1"} & jobs.running().keys():
        fail(
            f"{' and '.join(sorted(running))} of this repository already run: end them with 'make stop' first"
        )
    if MOVED not in os.environ:
        way = way_to_machine_0()
        os.environ[MOVED] = str(
            models.model_folder(args.model)
        )  # here, where there is a network to fetch it from
        os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])

    # -----------------------------------------------------------------------------
    # 1. The same command on both machines, but for the rank, who serves, and each one's own address

    from even_heads import with_even_heads

    tp, whole = args.parallel == "tp", Path(os.environ[MOVED])
    folder = with_even_heads(whole) if tp else whole
    common = {
        "dtype": "float32",
        "max-model-len": 512,
        "max-num-batched-tokens": 512,
        "distributed-executor-backend": "mp",
    }
    if tp:
        common |= {"tensor-parallel-size": 2, "enforce-eager": True}
    # vLLM 0.28 on a CPU: stage 2 gets its buffers in the warm-up of compilation, which
    # enforce-eager skips (AssertionError)
    else:
        common |= {
            "pipeline-parallel-size": 2,
            "compilation-config.mode": 2,
            "compilation-config.backend": "eager",
        }
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the warm-up, without anything to compile
    common |= {"nnodes": 2, "master-addr": ADDRESSES[0], "master-port": 29500}
    os.environ |= {
        "GLOO_SOCKET_IFNAME": CABLE,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, psutil.cpu_count() // 2)),
    }
    server = [
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(PORT),
    ]
    modules = (server, ["lab.vllm_cli", "serve", str(folder)])
    processes: list[subprocess.Popen] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        for i, own in enumerate(({"node-rank": 0}, {"node-rank": 1, "headless": True})):
            command = [
                "env",
                f"VLLM_HOST_IP={ADDRESSES[i]}",
                sys.executable,
                "-m",
                *modules[i],
                *engine.words(common | own),
            ]
            print(f"node{i}: {shlex.join([command[1], 'python', *command[3:]])}", flush=True)
            processes.append(
                jobs.start(
                    f"node{i}",
                    ["ip", "netns", "exec", f"node{i}", "sh", "-c", OWN_SHM, f"node{i}", *command],
                    LOGS[i],
                )
            )
        either = SimpleNamespace(
            poll=lambda: ended(processes) or None
        )  # neither comes up without the other, so neither may end
        start_s = jobs.wait_healthy(
            "two-nodes",
            either,
            f"http://127.0.0.1:{PORT}/health",
            LOGS[0],
            lambda: ended(processes),
            args.timeout,
        )
        print(
            f"healthy after {start_s:.0f} s: each machine holds half of {'every layer' if tp else 'the layers'}"
        )

        # -----------------------------------------------------------------------------
        # 2. Questions. Reading the prompt gives the first token; what a longer answer costs beyond
        # that is the other tokens'

        ask(QUESTIONS[0], 2)  # what happens only once
        answers, seconds, carried = [], 0.0, [0, 0, 0]
        for question in QUESTIONS:
            _, first_s, first = ask(question, 1)
            answer, all_s, everything = ask(question, args.tokens)
            answers.append(answer)
            seconds += all_s - first_s
            carried = [c + e - f for c, e, f in zip(carried, everything, first, strict=True)]
            print(f"> {question}\n< {' '.join(answer['message']['content'].split())}", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as e:
        fail(
            f"no answer any more ({e}): {ended(processes) or f'see {shown(LOGS[0])} and {shown(LOGS[1])}'}"
        )
    finally:
        for name, grace_s in (
            ("node0", 25),
            ("node1", 1),
        ):  # a worker has nothing to finish, and would wait for its lost peer
            if name in (running := jobs.running()):
                jobs.stop(running[name], grace_s)
    left = inhabitants("node0") + inhabitants("node1")
    print(f"ended; processes left on the two machines: {len(left)}")

    # -----------------------------------------------------------------------------
    # 3. The same questions to one process with the whole model; then what the cable carried, beside
    # the arithmetic

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    same = 0
    for answer in answers:
        prompt = torch.tensor([answer["prompt_token_ids"]])
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.tokens,
            do_sample=False,
        )[0, prompt.shape[1] :]
        same += sum(a == b for a, b in zip(answer["token_ids"], expected.tolist(), strict=True))
    total = args.tokens * len(QUESTIONS)
    print(f"tokens the same as those of one process: {same} of {total}")

    hidden, layers, vocabulary = (
        getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    payload, words = 2 * hidden * 4, f"hidden state and residual: 2 x {hidden} x 4 bytes"
    if tp:
        payload = (2 * layers + 1) * hidden * 4 + vocabulary // 2 * 4
        words = f"(2 x {layers} layers + 1 embedding) x {hidden} x 4 bytes summed, half of {vocabulary} logits x 4 bytes"
    sent, back, packets, itl_ms = (c / (total - len(QUESTIONS)) for c in (*carried, 1000 * seconds))
    print(f"a token: {sent:,.0f} bytes from node0 to node1, {back:,.0f} back; ITL {itl_ms:.0f} ms")
    print(f"  {payload:9,.0f}  {words}")
    print(f"  {packets * HEADERS:9,.0f}  headers of {packets:.0f} packets")
    print(
        f"  {sent - payload - packets * HEADERS:9,.0f}  the rest: what vLLM's scheduler tells the worker, and gloo's own messages"
    )
    metrics = {
        "same_tokens_ratio": same / total,
        "tokens_count": total,
        "sent_per_token_bytes": round(sent),
        "returned_per_token_bytes": round(back),
    }
    metrics |= {
        "payload_per_token_bytes": payload,
        "packets_per_token_count": round(packets, 1),
        "itl_ms": round(itl_ms, 1),
        "start_s": round(start_s, 1),
    }
    results.finish(__file__, metrics | {"left_count": len(left)}, vars(args), variant=args.parallel)
    raise SystemExit(0 if same == total and not left else 1)


if __name__ == "__main__":
    main()
