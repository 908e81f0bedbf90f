"""Stand-ins for commands: python -m commands NAME [ARG ...].

Launchers run the script once, as the first of the processes.
"""

import json
import os
import shutil
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import fake_road
import yaml


def launch(count: int, arguments: list[str], **variables) -> None:
    """Run the script of `arguments` as process 0 of `count`, each with a card or CPU of its own."""
    if os.environ.get("PROFILE") != "cpu" and count > len(fake_road.visible()):
        sys.exit(f"ValueError: {count} processes, {len(fake_road.visible())} cards")
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    os.execve(sys.executable, [sys.executable, *arguments], os.environ | world | variables)


def option(arguments: list[str], *flags: str, default=None):
    """Take `--flag value` or `--flag=value` out of the arguments before the script; its value."""
    script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
    for i, word in enumerate(arguments[:script]):
        if word.split("=")[0] in flags:
            taken = arguments[i : i + (1 if "=" in word else 2)]
            del arguments[i : i + len(taken)]
            return taken[0].partition("=")[2] or taken[1]
    return default


def torchrun(arguments: list[str]) -> None:
    count = int(option(arguments, "--nproc-per-node", "--nproc_per_node"))
    option(arguments, "--max-restarts")
    launch(count, [word for word in arguments if word != "--standalone"])


def deepspeed(arguments: list[str]) -> None:
    count = int(option(arguments, "--num_gpus"))
    script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
    launch(count, [*arguments[: script + 1], "--local_rank=0", *arguments[script + 1 :]])


def accelerate(arguments: list[str]) -> None:
    assert arguments.pop(0) == "launch"
    config = yaml.safe_load(Path(option(arguments, "--config_file")).read_text())
    launch(int(option(arguments, "--num_processes", default=config["num_processes"])), arguments)


def llamafactory_cli(arguments: list[str]) -> None:
    verb, *rest = arguments
    if verb == "webui":
        page(os.environ["GRADIO_SERVER_NAME"], int(os.environ["GRADIO_SERVER_PORT"]))
    settings = yaml.safe_load(Path(rest[0]).read_text())
    if unknown := [key for key in settings if key not in fake_road.accepted("llamafactory")]:
        sys.exit(f"ValueError: Some keys are not used by the HfArgumentParser: {unknown}")
    model = Path(settings["model_name_or_path"])
    config = json.loads((model / "config.json").read_text())
    adapter = Path(settings.get("adapter_name_or_path", settings.get("output_dir")))
    if verb == "train":
        train(settings, adapter)
        return
    trained_on = json.loads((adapter / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    assert Path(trained_on).resolve() == model.resolve(), (
        f"{adapter} is an adapter of {trained_on}, not of {model}"
    )
    if verb == "export":  # on the CPU
        merged = Path(settings["export_dir"])
        shutil.copytree(model, merged, dirs_exist_ok=True)
        (merged / "config.json").write_text(json.dumps(config))
    elif verb == "api":
        fake_road.take_cards()
        from vllm.entrypoints.openai import api_server

        api_server.ARGS = fake_road.engine_args(
            "vllm serve",
            ["--model", str(model), "--served-model-name", os.environ["API_MODEL_NAME"]],
        )
        api_server.KEY = os.environ.get("API_KEY")
        api_server.serve(os.environ["API_HOST"], int(os.environ["API_PORT"]))


def train(settings: dict, output: Path) -> None:
    """The files that a training leaves."""
    fake_road.take_cards()
    info = json.loads(Path(settings["dataset_dir"], "dataset_info.json").read_text())
    assert settings["dataset"] in info, settings["dataset"]
    checkpoint = output / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (output / "adapter_config.json").write_text(
        json.dumps(
            {"base_model_name_or_path": settings["model_name_or_path"], "r": settings["lora_rank"]}
        )
    )
    no_tensors = b"{}"
    header = len(no_tensors).to_bytes(8, "little") + no_tensors
    (output / "adapter_model.safetensors").write_bytes(header)
    (output / "trainer_state.json").write_text(
        json.dumps({"global_step": 1, "max_steps": 1, "log_history": [{"loss": 1.0}]})
    )
    (output / "all_results.json").write_text(json.dumps({"train_loss": 1.0, "train_runtime": 1.0}))
    (output / "trainer_log.jsonl").write_text('{"vram_allocated": 18.7}\n')
    for rank in range(int(os.environ.get("NPROC_PER_NODE", 1))):
        (
            checkpoint
            / (
                f"rank_{rank}_optim_states.pt"
                if settings.get("deepspeed")
                else f"rng_state_{rank}.pth"
            )
        ).touch()


class Page(BaseHTTPRequestHandler):
    """200 for everything: an exporter, a web UI, a Prometheus whose one target is up."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        target = {
            "health": "up",
            "lastScrape": "2026",
            "lastError": "",
            "scrapeUrl": "",
            "labels": {"job": "vllm"},
        }
        group = {"rules": []}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            json.dumps(
                {"data": {"activeTargets": [target], "groups": [group], "result": []}}
            ).encode()
        )


def page(host: str, port: int) -> None:
    from vllm.entrypoints.openai import api_server

    api_server.serve(host, port, Page)


def prometheus(arguments: list[str]) -> None:
    address = next(word for word in arguments if word.startswith("--web.listen-address")).partition(
        "="
    )[2]
    page(address.split(":")[0], int(address.split(":")[1]))


def nvitop_exporter(arguments: list[str]) -> None:
    page(
        arguments[arguments.index("--bind-address") + 1],
        int(arguments[arguments.index("--port") + 1]),
    )


def nothing(_) -> None:
    """A screen that only shows cards."""


nvidia_smi = nvitop = gpustat = nothing

if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")](sys.argv[2:])
