"""LLaMA-Factory's two servers in the background: the OpenAI-style API with the tuned model, or the web UI.

    make lf-api                                # http://127.0.0.1:8010/v1, base model plus adapter
    make lf-webui                              # http://127.0.0.1:7860: training, chat and export by mouse
    make lf-api ARGS="--port 8011"
    make stop                                  # ends both

Both listen on every network interface unless told otherwise, without a password: here they get 127.0.0.1. The API is for trying out:
it answers one request at a time. For load, merge (make lf-merge) and serve by vLLM.
Look at: the printed command with its variables.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from lab import fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("api", "webui"), default="api", help="(default: %(default)s)")
    parser.add_argument("--port", type=int, help=f"on 127.0.0.1 (default: {profile.finetune.api_port}, web UI {profile.finetune.webui_port})")
    parser.add_argument("--adapter", default=f"runs/{HERE.name}/lora", help="of the API: folder that training wrote (default: %(default)s)")
    args = parser.parse_args()

    import factory

    # -----------------------------------------------------------------------------
    # 1. The command and its variables

    name = f"lf-{args.what}"
    port = args.port or (profile.finetune.api_port if args.what == "api" else profile.finetune.webui_port)
    address = f"http://127.0.0.1:{port}"
    if name in (running := jobs.running()):
        fail(f"it already runs at {running[name]['address']}: end it with 'make stop' first")
    if args.what == "api":
        jobs.refuse_taken_cards()
        settings = factory.settings_for(HERE / "configs" / "infer.yaml", args.adapter, profile.finetune.dtype)
        config = factory.write(settings, "api", f"infer.yaml and {settings.adapter_name_or_path}/config.yaml")
        words = ["api", shown(config)]
        environment = {"API_HOST": "127.0.0.1", "API_PORT": str(port), "API_MODEL_NAME": "tuned"}
    else:
        words = ["webui"]
        environment = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    jobs.refuse_taken_port(port, f"take another one: make {name} ARGS=\"--port {port + 1}\"")
    command = factory.prepare(environment, *words)

    # -----------------------------------------------------------------------------
    # 2. Start, and wait until it answers

    log = factory.FOLDER / f"{args.what}.log"
    if args.what == "webui":  # it looks for the folder data where it runs, and writes its results there
        place = factory.FOLDER / "webui"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "data").exists():
            (place / "data").symlink_to(HERE / "data")
        os.chdir(place)
        os.environ["BROWSER"] = "true"  # the program of that name: do not open a browser on a machine that may have no screen
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that wait_healthy ends the job
    cards = jobs.cards() if args.what == "api" else []
    process = jobs.start(name, command, log, address=address, cards=cards)
    url = f"{address}/v1/models" if args.what == "api" else f"{address}/"
    try:
        seconds = jobs.wait_healthy(name, process, url, log, lambda: factory.cause(log))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(f"healthy after {seconds:.0f} s: {address}{'/v1' if args.what == 'api' else ''}")
    print(f"log: {shown(log)}   end it: make stop")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
