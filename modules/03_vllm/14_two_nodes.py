"""One model on two machines, without Ray: vLLM's own multi-node serving, over a counted cable.

    make two-nodes                        # pipeline parallel: each machine has half of the layers
    make two-nodes ARGS="--parallel tp"   # tensor parallel: each machine has half of every layer

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
import os
import shlex
import signal
import sys
from pathlib import Path

import psutil

from lab import RUNS, cable, engine, fail, jobs, models, results, shown
from lab.profile import load_profile

PORT = 8000  # machine 0's own: nothing else can have taken it
LOGS = [RUNS / "03_vllm" / f"node{rank}.log" for rank in (0, 1)]
MOVED = "TWO_NODES_MODEL"  # variable: the model's folder, for the same script on machine 0
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
)


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    # The server
    division = "divide the layers, or every layer (default: %(default)s)"
    parser.add_argument("--parallel", choices=("pp", "tp"), default="pp", help=division)
    models.add_model_flag(parser, "smollm2-135m")
    patience = "seconds to wait for a healthy server (default: %(default)s)"
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help=patience)
    # The answers
    length = "of each answer (default: %(default)s)"
    parser.add_argument("--tokens", type=int, default=32, help=length)
    args = parser.parse_args()
    check(args, profile)
    if MOVED not in os.environ:
        way = cable.way_to_machine_0()
        # Here, where there is a network to fetch it from.
        os.environ[MOVED] = str(models.model_folder(args.model))
        os.execvp(way[0], [*way, sys.executable, *sys.orig_argv[1:]])

    from even_heads import with_even_heads  # the files beside this one
    from two_machines import Servers, ask, per_token

    # -----------------------------------------------------------------------------
    # 1. The same command on both machines, but for the rank, who serves, and each one's own address

    tp = args.parallel == "tp"
    whole = Path(os.environ[MOVED])
    folder = with_even_heads(whole) if tp else whole
    common = {
        "dtype": "float32",
        "max-model-len": 512,
        "max-num-batched-tokens": 512,
        "distributed-executor-backend": "mp",
    }
    if tp:
        common |= {"tensor-parallel-size": 2, "enforce-eager": True}
    else:
        # vLLM 0.28 on a CPU: stage 2 gets its buffers in the warm-up of compilation, which
        # enforce-eager skips (AssertionError). So: the warm-up, without anything to compile.
        common |= {
            "pipeline-parallel-size": 2,
            "compilation-config.mode": 2,
            "compilation-config.backend": "eager",
        }
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    common |= {"nnodes": 2, "master-addr": cable.ADDRESSES[0], "master-port": 29500}
    os.environ |= {
        "GLOO_SOCKET_IFNAME": cable.CABLE,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, psutil.cpu_count() // 2)),
    }
    server = ["vllm.entrypoints.openai.api_server", "--model", str(folder)]
    server += ["--host", "127.0.0.1", "--port", str(PORT)]
    worker = ["lab.vllm_cli", "serve", str(folder)]
    own = ({"node-rank": 0}, {"node-rank": 1, "headless": True})
    servers = Servers()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        for rank, module in enumerate((server, worker)):
            address = f"VLLM_HOST_IP={cable.ADDRESSES[rank]}"
            command = ["-m", *module, *engine.words(common | own[rank])]
            print(f"node{rank}: {shlex.join([address, 'python', *command])}", flush=True)
            command = ["env", address, sys.executable, *command]
            servers.start(f"node{rank}", command, LOGS[rank])
        start_s = jobs.wait_healthy(
            "two-nodes",
            servers,
            f"http://127.0.0.1:{PORT}/health",
            LOGS[0],
            servers.ended,
            args.timeout,
        )
        half = "every layer" if tp else "the layers"
        print(f"healthy after {start_s:.0f} s: each machine holds half of {half}")

        # -----------------------------------------------------------------------------
        # 2. Questions. Reading the prompt gives the first token; what a longer answer costs beyond
        # that is the other tokens'

        ask(PORT, QUESTIONS[0], 2)  # what happens only once
        answers = []
        first = []
        longer = []
        for question in QUESTIONS:
            first.append(ask(PORT, question, 1)[1])
            answer, traffic = ask(PORT, question, args.tokens)
            answers.append(answer)
            longer.append(traffic)
            print(f"> {question}\n< {' '.join(answer['message']['content'].split())}", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as e:
        logs = f"see {shown(LOGS[0])} and {shown(LOGS[1])}"
        fail(f"no answer any more ({e}): {servers.ended() or logs}")
    finally:
        servers.stop()
    left = cable.inhabitants("node0") + cable.inhabitants("node1")
    print(f"ended; processes left on the two machines: {len(left)}")

    # -----------------------------------------------------------------------------
    # 3. The same questions to one process with the whole model

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # as ignore_eos
    greedy = {"max_new_tokens": args.tokens, "do_sample": False}
    same = 0
    for answer in answers:
        prompt = torch.tensor([answer["prompt_token_ids"]])  # [1, T]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
        expected = output[0, prompt.shape[1] :].tolist()
        same += sum(a == b for a, b in zip(answer["token_ids"], expected, strict=True))
    total = args.tokens * len(QUESTIONS)
    print(f"tokens the same as those of one process: {same} of {total}")

    # -----------------------------------------------------------------------------
    # 4. What the cable carried, beside the arithmetic

    hidden = model.config.hidden_size
    if tp:
        layers = model.config.num_hidden_layers
        vocabulary = model.config.vocab_size
        payload = (2 * layers + 1) * hidden * 4 + vocabulary // 2 * 4
        meaning = (
            f"(2 x {layers} layers + 1 embedding) x {hidden} x 4 bytes summed, "
            f"half of {vocabulary} logits x 4 bytes"
        )
    else:
        payload = 2 * hidden * 4
        meaning = f"hidden state and residual: 2 x {hidden} x 4 bytes"
    token = per_token(longer, first, total - len(QUESTIONS))
    itl_ms = 1000 * token.seconds
    headers = token.packets * cable.HEADERS
    rest = token.sent - payload - headers
    both = f"{token.sent:,.0f} bytes from node0 to node1, {token.returned:,.0f} back"
    print(f"a token: {both}; ITL {itl_ms:.0f} ms")
    print(f"  {payload:9,.0f}  {meaning}")
    print(f"  {headers:9,.0f}  headers of {token.packets:.0f} packets")
    messages = "what vLLM's scheduler tells the worker, and gloo's own messages"
    print(f"  {rest:9,.0f}  the rest: {messages}")
    metrics = {
        "same_tokens_ratio": same / total,
        "tokens_count": total,
        "sent_per_token_bytes": round(token.sent),
        "returned_per_token_bytes": round(token.returned),
        "payload_per_token_bytes": payload,
        "packets_per_token_count": round(token.packets, 1),
        "itl_ms": round(itl_ms, 1),
        "start_s": round(start_s, 1),
        "left_count": len(left),
    }
    results.finish(__file__, metrics, vars(args), variant=args.parallel)
    raise SystemExit(0 if same == total and not left else 1)


def check(args, profile) -> None:
    """Exit code 2 where this cannot be done here."""
    if not 2 <= args.tokens <= 256:
        others = "the first comes of reading the prompt, the others are measured"
        fail(f"--tokens must be 2 to 256: {others}")
    if profile.device != "cpu":
        way = "make two-nodes PROFILE=cpu, in the CPU environment (LOCK=cpu)"
        fail(f"this script computes on the CPU: {way}")
    cable.refuse_running()


if __name__ == "__main__":
    main()
