"""Measure on this machine what the planner predicts: `make calibrate`.

    make calibrate                                        # every line that this machine can run
    make calibrate ARGS="--only serve-7b lora-7b"
    make calibrate ARGS="--list"

It runs the lines of configs/calibration.yaml and stores a record each. Models have the real shapes
and random weights, which cost the same memory: nothing is downloaded. With MEMORY_CAP_GIB=24 a
larger GPU stands in for a 24 GB card. Lines marked `fit` were used to fix the constants of
lab/planner, lines marked `test` were not.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from plan_parts import Request
from plan_parts.arguments import read_line

from lab import ROOT, RUNS, fail, jobs, machine, models, results, shown
from lab.planner.serving import Serving
from lab.planner.training import Training
from lab.profile import load_profile, read_yaml

CASES = ROOT / "configs" / "calibration.yaml"
STEPS = 3  # from the second step on, the optimizer's states exist

# -----------------------------------------------------------------------------
# 1. Serving: vLLM itself says what its weights take and how many tokens its cache holds

ENGINE = """
import json, sys
from vllm import LLM

if __name__ == "__main__":
    LLM(**json.loads(sys.argv[1]))
"""
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
    }
    if machine.gpus():
        planned_gib = (setup.gpu_memory_utilization or 0.9) * setup.gpu_memory_gib
        options["gpu_memory_utilization"] = planned_gib / cuda_total_gib()
    return options


def serve(request: Request, log: Path) -> dict:
    """Start vLLM's engine in a process of its own; what it reports: GiB of a card, KV tokens."""
    options = engine_options(request.setup)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(models.config(request.model)))
        script = Path(folder, "engine.py")
        script.write_text(ENGINE)
        command = [sys.executable, script, json.dumps(options | {"model": folder})]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | LOUD)
    output = done.stdout + done.stderr
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    reports = {name: re.findall(pattern, output) for name, pattern in REPORTED.items()}
    if not reports["kv_tok_count"] and not reports["kv_cache_gib"]:
        last_line = output.strip().splitlines()[-1] if output.strip() else done.returncode
        fail(f"vLLM did not start: {last_line} ({shown(log)} has it all)")
    return {name: float(values[0].replace(",", "")) for name, values in reports.items() if values}


# -----------------------------------------------------------------------------
# 2. Training: three steps on random tokens, the peak of each part of a step


class Engine(NamedTuple):
    """A model ready to be trained, and the two steps that engines do differently."""

    forward: Callable  # of the token ids; .loss
    backward: Callable  # of the loss, once a micro-step
    end_micro_step: Callable  # DeepSpeed counts the micro-steps itself ...
    end_step: Callable  # ... the others step when told to


def worker(request: Request) -> None:
    """One process of a training: prints {part of a step: GiB at its peak}, the most of any."""
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig

    setup = request.setup
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if machine.gpus():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    config = AutoConfig.for_model(**models.config(request.model))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if setup.engine == "deepspeed":
        engine = deepspeed_engine(setup, config, device, backend)
    else:
        if world > 1:
            dist.init_process_group(backend)
        engine = torch_engine(setup, config, device, world)

    measured = measured_steps(setup, engine, config.vocab_size, device)
    everyone = [measured]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, measured)
    if rank == 0:
        most = {name: round(max(each[name] for each in everyone), 3) for name in measured}
        most["host_gib"] = round(sum(each["host_gib"] for each in everyone), 2)
        print("measured " + json.dumps(most), flush=True)
    if world > 1:
        dist.barrier()
        os._exit(0)  # gloo's threads can abort an orderly end, and there is nothing left to keep


def measured_steps(setup: Training, engine: Engine, vocabulary: int, device) -> dict[str, float]:
    """{part of a step: GiB at its peak, ...} of this process; on a CPU only the host's memory."""
    import torch

    autocast = setup.engine == "ddp" and setup.dtype == "bfloat16"
    measured: dict[str, float] = {}

    def lap(part: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            measured[f"{part}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()

    for _ in range(STEPS):
        for _ in range(setup.accumulate):
            shape = (setup.micro_batch, setup.seq_len)
            ids = torch.randint(0, vocabulary, shape, device=device)
            lap("between")
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = engine.forward(input_ids=ids, labels=ids, use_cache=False).loss
            lap("forward")
            engine.backward(loss)
            lap("backward")
            engine.end_micro_step()
        engine.end_step()
        lap("step")
    measured["peak_gib"] = max(measured.values(), default=0.0)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["context_gib"] = (total - free - torch.cuda.memory_reserved()) / 2**30
    measured["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return measured


def random_model(setup: Training, config, device, dtype):
    """A model with random weights of `dtype`, as the line's method trains it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if setup.method == "qlora":
        pack(model, device)
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if setup.method != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=setup.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    return model.train()


def trained(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def deepspeed_settings(setup: Training) -> dict:
    """Module 05's file of this stage, with the line's values."""
    file = ROOT / f"modules/05_DeepSpeed/configs/z{setup.zero}.json"
    settings = json.loads(file.read_text())
    settings["bf16"] = {"enabled": setup.dtype == "bfloat16"}
    settings["train_micro_batch_size_per_gpu"] = setup.micro_batch
    settings["gradient_accumulation_steps"] = setup.accumulate
    optimizer = settings["optimizer"]["params"]
    optimizer["lr"] = 1e-5
    zero = settings["zero_optimization"]
    host = {"device": "cpu", "pin_memory": True}
    if setup.zero:
        zero["reduce_bucket_size"] = setup.bucket
    if setup.offloads:
        optimizer.pop("torch_adam")
        zero["offload_optimizer"] = host
    if setup.offloads_parameters:
        zero["offload_param"] = host
    return settings


def deepspeed_engine(setup: Training, config, device, backend: str) -> Engine:
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(backend)
    settings = deepspeed_settings(setup)
    dividing = HfDeepSpeedConfig(settings)  # while it lives, stage 3 divides a model as it is built
    dtype = torch.float32 if setup.dtype == "float32" else torch.bfloat16
    model = random_model(setup, config, device, dtype)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained(model), config=settings)
    del dividing
    return Engine(engine, engine.backward, engine.step, nothing)


def torch_engine(setup: Training, config, device, world: int) -> Engine:
    """PyTorch alone, DDP or FSDP2: trained weights in fp32, computed with in bf16."""
    import torch

    frozen_in_16_bits = not setup.full and setup.dtype != "float32"
    dtype = torch.bfloat16 if frozen_in_16_bits else torch.float32
    model = random_model(setup, config, device, dtype)
    forward = model
    if setup.engine == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        computed = torch.bfloat16 if setup.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=computed)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    elif world > 1:
        cards = [device.index] if device.type == "cuda" else None
        forward = torch.nn.parallel.DistributedDataParallel(model, device_ids=cards)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-5, weight_decay=0.0)

    def end_step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Engine(forward, torch.Tensor.backward, nothing, end_step)


def nothing() -> None:
    pass


def pack(model, device) -> None:
    """Put 4-bit layers in the place of the decoder's linear layers.

    nf4 with double quantisation, as LLaMA-Factory's quantization_bit: 4.
    """
    import torch

    layers = model.model.layers
    for name, module in list(layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(layers.get_submodule(parent), leaf, packed(module).to(device))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def packed(linear):
    import bitsandbytes as bnb
    import torch

    small = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    small.weight = bnb.nn.Params4bit(
        linear.weight.data.cpu(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    )
    if linear.bias is not None:
        small.bias = torch.nn.Parameter(linear.bias.data)
    return small


def train(request: Request, line: str) -> dict:
    """Run `worker` in as many processes as the line has GPUs; its numbers."""
    gpus = request.setup.gpus
    launcher = []
    if gpus > 1 or request.setup.engine == "deepspeed":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command = [sys.executable, *launcher, __file__, "--worker", line]
    done = subprocess.run(command, capture_output=True, text=True)
    printed = re.search(r"^measured (\{.*\})$", done.stdout, re.M)
    if not printed:
        fail(f"the training ended without a result: {cause(done)[:300]}")
    return json.loads(printed[1])


def cause(done: subprocess.CompletedProcess) -> str:
    """The first line that names an error, else the first of all."""
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [str(done.returncode)])[0].strip()


# -----------------------------------------------------------------------------
# 3. The lines of configs/calibration.yaml, one after another


def obstacle(setup: Serving | Training) -> str:
    """Why this machine cannot run the line; "" when it can."""
    gpus = machine.gpus()
    whole = gpus[0]["memory_gib"] if gpus else 0
    memory = machine.memory_cap_gib() or whole
    if len(gpus) < setup.gpus or memory < setup.gpu_memory_gib - 0.5:
        return f"it needs {setup.gpus} x {setup.gpu_memory_gib:g} GiB"
    return ""


def measure(name: str, case: dict) -> bool:
    """Run a line and store its record; False where it could not be measured."""
    request = read_line(case["plan"])
    print(f"{name} ({case['use']}): {case['plan']}", file=sys.stderr, flush=True)
    try:
        if request.task == "serve":
            metrics = serve(request, RUNS / "calibrate" / f"{name}.log")
        else:
            metrics = train(request, case["plan"])
    except SystemExit:  # it has said why
        return False
    results.finish(__file__, metrics, case, name)
    return True


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these lines")
    parser.add_argument("--list", action="store_true", help="show the lines and run none")
    parser.add_argument("--worker", metavar="LINE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(read_line(args.worker))
        return
    cases = read_yaml(CASES)
    unknown = sorted(set(args.only or []) - cases.keys())
    if unknown:
        lines = ", ".join(cases)
        fail(f"there is no line {', '.join(unknown)} in configs/calibration.yaml: {lines}")
    if args.list:
        for name, case in cases.items():
            print(f"{name:20} {case['use']:5} plan.py {case['plan']}")
        return

    load_profile(check=False)  # a line says itself how many cards it needs
    jobs.refuse_taken_cards()
    measured: dict[str, bool] = {}
    chosen = [name for name in cases if name in (args.only or cases)]
    for name in chosen:
        why = obstacle(read_line(cases[name]["plan"]).setup)
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
