"""Start vLLM's OpenAI-compatible server with the profile's arguments and wait until it answers.

    make vllm-serve                  # in the background: returns when healthy, `make stop` ends it
    make vllm-serve FG=1             # in front, with the log on the screen: Ctrl+C ends it
    make vllm-serve MODEL=Qwen/Qwen2.5-7B-Instruct ARGS="--tensor-parallel-size 1"
    make vllm-serve RECIPE=32b-awq-tp2    # configs/recipes/: a model, and what differs for it
    python modules/03_vllm/01_serve.py --dry-run    # only print the engine's own command

Flags this script does not know go to vLLM as they are and win over the profile's.
Look at: the printed command (it is all there is to serving), and in the log `GPU KV cache size` or
its CPU twin, which says how many tokens of context the memory left over holds.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from lab import RUNS, engine, fail, jobs, models, results, shown
from lab.profile import load_profile, need_cards, need_vllm, read_yaml

RECIPES = Path(__file__).parent / "configs" / "recipes"


def refuse_what_cannot_start(settings: dict, port: int) -> None:
    """Exit code 2 where vLLM, a card, the port or the place of the one server is not to be had."""
    need_vllm()
    cards = settings.get("tensor-parallel-size", 1)
    need_cards(f"tensor-parallel-size {cards}", cards, "take another recipe")
    server = jobs.running().get("vllm")
    if server:
        there = f"a server of this repository already runs at {server['address']}"
        fail(f"{there}: end it with 'make stop' first")
    jobs.refuse_taken_cards()
    jobs.refuse_taken_port(port, "take another one with --port (make vllm-serve PORT=8001)")


def no_tool_calls(model: str) -> str:
    """What to say of a model whose format of tool calls configs/models.yaml does not know."""
    flags = 'ARGS="--enable-auto-tool-choice --tool-call-parser NAME"'
    what = f"note: no tool-call parser is known for {model}, so it answers no request with tools"
    return f"{what}; if its card names one, add {flags}"


def main() -> None:
    profile = load_profile()
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What is served
    parser.add_argument(
        "--model",
        help="name in configs/models.yaml, hub id or folder"
        f" (default: the recipe's, else {profile.serve.model})",
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"of {shown(RECIPES)}: {known}")
    # How it runs
    parser.add_argument(
        "--port", type=int, default=profile.serve.port, help="on 127.0.0.1 (default: %(default)s)"
    )
    parser.add_argument(
        "--foreground", action="store_true", help="stay in front, with the log on the screen"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900,
        metavar="S",
        help="seconds to wait for a healthy server (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and exit")
    args, engine_args = parser.parse_known_args()

    # -----------------------------------------------------------------------------
    # 1. The engine's command: the profile's arguments, the recipe's instead, then the user's

    recipe = {}
    if args.recipe:
        file = RECIPES / f"{args.recipe}.yaml"
        if not file.is_file():
            fail(f"there is no recipe {args.recipe}: choose one of {known}")
        recipe = read_yaml(file)
    recipe_model = recipe.pop("model", profile.serve.model)
    args.model = args.model or recipe_model
    parsers = {} if recipe.get("runner") == "pooling" else models.parsers(args.model)
    settings = dict(profile.serve.args) | parsers | recipe
    if not args.dry_run:
        refuse_what_cannot_start(settings, args.port)
    folder = args.model if args.dry_run else models.model_folder(args.model)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", *models.served_names(args.model)]
    command += ["--host", "127.0.0.1", "--port", str(args.port)]
    command += engine.words(settings)
    command += engine_args  # argparse lets the last one win
    has_parser = any(word.startswith("--tool-call-parser") for word in command)
    if not has_parser and settings.get("runner") != "pooling":
        print(no_tool_calls(args.model), file=sys.stderr)
    print(shlex.join(["python", *command[1:]]), flush=True)
    if args.dry_run:
        return results.note(results.name_of(__file__))

    # -----------------------------------------------------------------------------
    # 2. Start it in a session of its own, so that it and its workers can be ended whole

    address = f"http://127.0.0.1:{args.port}"
    log = RUNS / "03_vllm" / "serve.log"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # so that `finally` runs
    cards = jobs.cards()[: engine.cards_filled(command)]  # what else may not run on them meanwhile
    process = jobs.start(
        "vllm", command, None if args.foreground else log, address=address, cards=cards
    )
    try:
        if args.foreground:
            code = process.wait()
            if jobs.asked_to_end("vllm"):
                raise SystemExit(code)
            what = f"the server ended though nobody stopped it (its exit code: {code})"
            hint = "EngineDeadError in the log above: its engine process died"
            print(f"error: {what}; {hint}", file=sys.stderr)
            raise SystemExit(max(code, 1))  # vLLM says 0 even when its engine process was killed
        seconds = jobs.wait_healthy(
            "vllm", process, f"{address}/health", log, lambda: engine.cause(log), args.timeout
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        server = jobs.running().get("vllm") if args.foreground else None
        if server:
            jobs.stop(server)

    # -----------------------------------------------------------------------------
    # 3. Healthy

    name = models.served_names(args.model)[0]
    print(f"healthy after {seconds:.0f} s: {address}/v1   model: {name}")
    print(f"log: {shown(log)}   end it: make stop")
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
