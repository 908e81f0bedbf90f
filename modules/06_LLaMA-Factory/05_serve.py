"""LLaMA-Factory's two servers in the background: the API with the tuned model, or the web UI.

    make lf-api                  # OpenAI-style, http://127.0.0.1:8010/v1, base model plus adapter
    make lf-webui                # http://127.0.0.1:7860: training, chat and export by mouse
    make lf-api ARGS="--port 8011"
    API_KEY=change-me make lf-api    # who asks must send this key
    make stop                    # ends both

Both listen on every network interface unless told otherwise, without a password: here they get
127.0.0.1. The web UI begins in Chinese, and holds the settings of `make lf-train` (board.py). The
API is for trying out: it answers one request at a time. For load, merge (make lf-merge) and serve
by vLLM.
Look at: the printed command with its variables.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import board
import factory

from lab import fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def main() -> None:
    profile = load_profile()
    ports = {"api": profile.finetune.api_port, "webui": profile.finetune.webui_port}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=ports, default="api", help="the server (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        help=f"port on 127.0.0.1 (default: {ports['api']}, of the web UI {ports['webui']})",
    )
    parser.add_argument(
        "--adapter",
        default=shown(factory.FOLDER / "lora"),
        help="folder that training wrote, for the API (default: %(default)s)",
    )
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The command and its variables

    name = f"lf-{args.what}"
    port = args.port or ports[args.what]
    address = f"http://127.0.0.1:{port}"
    running = jobs.running()
    if name in running:
        fail(f"it already runs at {running[name]['address']}: end it with 'make stop' first")
    if args.what == "api":
        jobs.refuse_taken_cards()
        source = HERE / "configs" / "infer.yaml"
        done = factory.trained(args.adapter)
        settings = factory.settings_for(source, done, profile.finetune.dtype)
        comment = f"infer.yaml and {args.adapter}/config.yaml"
        arguments = ["api", shown(factory.write(settings, "api", comment))]
        environment = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_MODEL_NAME": "tuned"}
    else:
        arguments = ["webui"]
        environment = {
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
    jobs.refuse_taken_port(port, f'take another one: make {name} ARGS="--port {port + 1}"')
    command = factory.prepare(environment, *arguments)

    # -----------------------------------------------------------------------------
    # 2. Start, and wait until it answers

    if args.what == "webui":
        os.chdir(board.folder_for(profile.finetune))
        os.environ["BROWSER"] = "true"  # a program that does nothing: there may be no screen here
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that wait_healthy ends the job
    log = factory.FOLDER / f"{args.what}.log"
    cards = jobs.cards() if args.what == "api" else []
    process = jobs.start(name, command, log, address=address, cards=cards)
    api = "/v1" if args.what == "api" else ""
    ready = f"{address}/docs" if api else f"{address}/"  # both are answered without a key
    try:
        seconds = jobs.wait_healthy(
            name,
            process,
            ready,
            log,
            cause=lambda: factory.last_exception(log.read_text(errors="replace")),
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"healthy after {seconds:.0f} s: {address}{api}")
    if api and os.environ.get("API_KEY"):  # LLaMA-Factory reads it itself
        print("it asks for the key in API_KEY: send the header Authorization: Bearer ...")
    print(f"log: {shown(log)}   end it: make stop")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
