"""Measure on this machine what the planner predicts, memory and speed: `make calibrate`.

    make calibrate                                        # every line that this machine can run
    make calibrate ARGS="--only roofline serve-7b lora-7b"
    make calibrate ARGS="--list"

It runs the lines of configs/calibration.yaml and stores a record each; `roofline` is what the
machine itself reaches, from which speeds are predicted. Models have the real shapes and random
weights, which cost the same memory and time: nothing is downloaded. With MEMORY_CAP_GIB=24 a larger
GPU stands in for a 24 GB card. Lines marked `fit` were used to fix the constants of lab/planner
(`speed: fit`: those of lab/planner/speed.py), lines marked `test` were not.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import calibrate_roofline
import calibrate_training
from plan_parts import Request, read_model
from plan_parts.arguments import read_line

from lab import ROOT, RUNS, fail, jobs, machine, models, results, shown
from lab.planner import weights
from lab.planner.serving import Serving
from lab.profile import load_profile, read_yaml

CASES = ROOT / "configs" / "calibration.yaml"
ROOFLINE = "roofline"  # no line of the planner: what the machine itself reaches

# -----------------------------------------------------------------------------
# 1. Serving: vLLM itself says what its weights take and how many tokens its cache holds

ENGINE = ROOT / "scripts" / "calibrate_serving.py"
LOUD = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
REPORTED = {  # name of a metric: what vLLM writes before it
    "weights_gib": r"Model loading took ([\d.]+) GiB",
    "kv_cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_tok_count": r"KV cache size: ([\d,]+) tokens",
    "activations_gib": r"torch peak memory increase: ([\d.]+)GiB",
    "other_gib": r"non-torch forward increase memory: ([\d.]+)GiB",
    "cuda_graphs_gib": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    "captured_gib": r"Graph capturing finished in \d+ secs, took ([\d.]+) GiB",
}


def cuda_total_gib() -> float:
    """Memory of the first card as CUDA counts it: a 4090's driver keeps some of the 24 GiB."""
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(machine.handles()[0], version=pynvml.nvmlMemory_v2)
    return (memory.total - memory.reserved) / 2**30


def engine_options(setup: Serving) -> dict:
    """What vLLM's LLM takes: the line's values, and random weights."""
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "tensor_parallel_size": setup.tp,
        "pipeline_parallel_size": setup.pp,
        "dtype": "bfloat16" if setup.dtype in ("auto", "fp8") else setup.dtype,
        "quantization": "fp8" if setup.dtype == "fp8" else None,
        "max_num_seqs": setup.max_num_seqs,
        "max_num_batched_tokens": setup.max_num_batched_tokens,
        "enforce_eager": setup.enforce_eager,
        "kv_cache_dtype": setup.kv_dtype,
        "max_model_len": setup.max_model_len,
        "disable_custom_all_reduce": True,
        "language_model_only": setup.language_model_only,
    }
    if machine.gpus():
        planned_gib = (setup.gpu_memory_utilization or 0.9) * setup.gpu_memory_gib
        options["gpu_memory_utilization"] = planned_gib / cuda_total_gib()
    return options


def reads_pictures(request: Request) -> bool:
    """Whether the server will read pictures: vLLM then runs the largest one as it starts."""
    has_tower = weights.vision(read_model(request.model)) > 0
    return has_tower and not request.setup.language_model_only


def full_config(name: str) -> dict:
    """The model's config.json; vLLM wants each layer that is left in 16 bits by its whole name."""
    config = models.config(name)
    quantization = config.get("quantization_config", {})
    if "modules_to_not_convert" not in quantization:
        return config
    kept = []
    for weight in read_model(name).weights:
        if weight.number is None and len(weight.shape) > 1:
            module = weight.name.removesuffix(".weight")
            layers = weight.layers or range(weight.times)
            kept += [module.replace("*", str(layer)) for layer in layers]
    return config | {"quantization_config": quantization | {"modules_to_not_convert": kept}}


def copy_processor(model: str, folder: Path) -> None:
    """Put the model's tokenizer and processor into `folder`: small files from the hub."""
    from huggingface_hub import snapshot_download

    hub = models.entry(model)[1].get("hub", model)
    small = ["*.json", "*.txt", "*.jinja", "*.model"]
    for file in Path(snapshot_download(hub, allow_patterns=small)).iterdir():
        shutil.copy(file, folder)


def serve(request: Request, log: Path) -> dict:
    """Run vLLM's engine in a process of its own.

    What it reports: GiB of a card, KV tokens; and what was timed (scripts/calibrate_serving.py).
    """
    options = engine_options(request.setup)
    with tempfile.TemporaryDirectory() as folder:
        if reads_pictures(request):
            copy_processor(request.model, Path(folder))
            options["skip_tokenizer_init"] = False
        Path(folder, "config.json").write_text(json.dumps(full_config(request.model)))
        command = [sys.executable, ENGINE, json.dumps(options | {"model": folder})]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | LOUD)
    output = done.stdout + done.stderr
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    reports = {name: re.findall(pattern, output) for name, pattern in REPORTED.items()}
    if not printed(done.stdout):
        last_line = output.strip().splitlines()[-1] if output.strip() else done.returncode
        fail(f"vLLM did not start or answer: {last_line} ({shown(log)} has it all)")
    memory = {name: float(values[0].replace(",", "")) for name, values in reports.items() if values}
    return memory | printed(done.stdout)


# -----------------------------------------------------------------------------
# 2. Training: scripts/calibrate_training.py, in as many processes as the line has GPUs


def train(request: Request, line: str) -> dict:
    """{part of a step: GiB at its peak}, of the process that needs most, and a step's time."""
    gpus = request.setup.gpus
    launched = gpus > 1 or request.setup.engine == "deepspeed"
    return in_processes(gpus if launched else 0, "training", line)


def in_processes(number: int, what: str, worker: str) -> dict:
    """What the first of `number` processes of torchrun prints; 0: of one without torchrun."""
    launcher = []
    if number:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
    command = [sys.executable, *launcher, __file__, "--worker", worker]
    done = subprocess.run(command, capture_output=True, text=True)
    return printed(done.stdout) or fail(f"the {what} ended without a result: {cause(done)[:300]}")


def printed(output: str) -> dict:
    """What a measured process prints after the word `measured`; {} where it did not come to it."""
    line = re.search(r"^measured (\{.*\})$", output, re.M)
    return json.loads(line[1]) if line else {}


def cause(done: subprocess.CompletedProcess) -> str:
    """The first line that names an error, else the first of all."""
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [str(done.returncode)])[0].strip()


# -----------------------------------------------------------------------------
# 3. The lines of configs/calibration.yaml, one after another


def obstacle(name: str, case: dict) -> str:
    """Why this machine cannot run the line; "" when it can."""
    gpus = machine.gpus()
    if name == ROOFLINE:
        return "" if gpus else "it needs a GPU"
    setup = read_line(case["plan"]).setup
    whole = gpus[0]["memory_gib"] if gpus else 0
    memory = machine.memory_cap_gib() or whole
    if len(gpus) < setup.gpus or memory < setup.gpu_memory_gib - 0.5:
        return f"it needs {setup.gpus} x {setup.gpu_memory_gib:g} GiB"
    return ""


def measure(name: str, case: dict) -> bool:
    """Run a line and store its record; False where it could not be measured."""
    print(described(name, case), file=sys.stderr, flush=True)
    try:
        metrics = measurements(name, case)
    except SystemExit:  # it has said why
        return False
    results.finish(__file__, metrics, case, name)
    return True


def measurements(name: str, case: dict) -> dict:
    if name == ROOFLINE:
        cards = min(2, len(machine.gpus()))
        return in_processes(cards, "roofline", ROOFLINE)
    request = read_line(case["plan"])
    if request.task == "serve":
        return serve(request, RUNS / "calibrate" / f"{name}.log")
    return train(request, case["plan"])


def described(name: str, case: dict) -> str:
    if name == ROOFLINE:
        return f"{name:20} what the machine itself reaches"
    return f"{name:20} {case['use']:5} plan.py {case['plan']}"


def worker(line: str) -> None:
    """One process of what is measured."""
    if line == ROOFLINE:
        calibrate_roofline.worker()
    else:
        calibrate_training.worker(read_line(line))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these lines")
    parser.add_argument("--list", action="store_true", help="show the lines and run none")
    parser.add_argument("--worker", metavar="LINE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    cases = {ROOFLINE: {}} | read_yaml(CASES)
    unknown = sorted(set(args.only or []) - cases.keys())
    if unknown:
        lines = ", ".join(cases)
        fail(f"there is no line {', '.join(unknown)} in configs/calibration.yaml: {lines}")
    if args.list:
        for name, case in cases.items():
            print(described(name, case))
        return

    load_profile(check=False)  # a line says itself how many cards it needs
    jobs.refuse_taken_cards()
    measured: dict[str, bool] = {}
    chosen = [name for name in cases if name in (args.only or cases)]
    for name in chosen:
        why = obstacle(name, cases[name])
        if why:
            print(f"{name}: not run here, {why}", file=sys.stderr)
        else:
            measured[name] = measure(name, cases[name])
    if not measured:
        print(
            "nothing to measure on this machine: the lines need GPUs. "
            "On a CPU, make test holds the planner against the tensors of the engines"
        )
    failed = [name for name, was_measured in measured.items() if not was_measured]
    if failed:
        fail(f"{', '.join(failed)} could not be measured (see above); the others are stored")


if __name__ == "__main__":
    main()
