"""Measure on this machine what the planner predicts: `make calibrate` runs the lines of
configs/calibration.yaml and stores a record each.

    make calibrate                                        # every line that this machine can run
    make calibrate ARGS="--only serve-7b lora-7b"
    make calibrate ARGS="--list"

Models have the real shapes and random weights, which cost the same memory: nothing is downloaded.
With MEMORY_CAP_GIB=24 a larger GPU stands in for a 24 GB card. Lines marked `fit` were used to fix
the constants of lab/planner, lines marked `test` were not.
"""

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import ROOT, RUNS, fail, jobs, machine, models, results, shown
from lab.profile import load_profile, read_yaml

CASES = ROOT / "configs" / "calibration.yaml"
STEPS = 3  # from the second step on, the optimizer's states exist


# -----------------------------------------------------------------------------
# 1. Serving: vLLM itself says what its weights take and how many tokens its cache holds


def cuda_total_gib() -> float:
    """Memory of the first card as CUDA counts it: a 4090's driver keeps some of the 24 GiB to
    itself.
    """
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(machine.handles()[0], version=pynvml.nvmlMemory_v2)
    return (memory.total - memory.reserved) / 2**30


def serve(args, log: Path) -> dict:
    """Start vLLM's engine with dummy weights in a process of its own and read what it reports: GiB
    of each card, KV tokens.
    """
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "tensor_parallel_size": args.tp,
        "pipeline_parallel_size": args.pp,
    }
    options |= {
        "dtype": "bfloat16" if args.dtype in ("auto", "fp8") else args.dtype,
        "quantization": "fp8" if args.dtype == "fp8" else None,
    }
    options |= {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enforce_eager": args.enforce_eager,
    }
    options |= {
        "kv_cache_dtype": args.kv_dtype,
        "max_model_len": args.max_model_len,
        "disable_custom_all_reduce": True,
    }
    if machine.gpus():
        options["gpu_memory_utilization"] = (
            (args.gpu_memory_utilization or 0.9) * args.gpu_memory_gib / cuda_total_gib()
        )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(models.config(args.model)))
        code = "import json, sys\nfrom vllm import LLM\nif __name__ == '__main__': LLM(**json.loads(sys.argv[1]))"
        script = Path(folder, "engine.py")
        script.write_text(code)
        done = subprocess.run([sys.executable, script, json.dumps(options | {"model": folder})], capture_output=True, text=True,
                              env=os.environ | {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_LOGGING_STREAM": "ext://sys.stderr"})  # fmt: skip
    said = done.stdout + done.stderr
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(said)
    patterns = {
        "weights_gib": r"Model loading took ([\d.]+) GiB",
        "kv_cache_gib": r"Available KV cache memory: ([\d.]+) GiB",
    }
    patterns |= {
        "kv_tok_count": r"KV cache size: ([\d,]+) tokens",
        "activations_gib": r"torch peak memory increase: ([\d.]+)GiB",
    }
    patterns |= {
        "other_gib": r"non-torch forward increase memory: ([\d.]+)GiB",
        "cuda_graphs_gib": r"Estimated CUDA graph memory: ([\d.]+) GiB",
    }
    patterns |= {"captured_gib": r"Graph capturing finished in \d+ secs, took ([\d.]+) GiB"}
    found = {name: re.findall(pattern, said) for name, pattern in patterns.items()}
    if not found["kv_tok_count"] and not found["kv_cache_gib"]:
        fail(
            f"vLLM did not start: {said.strip().splitlines()[-1] if said.strip() else done.returncode} ({shown(log)} has it all)"
        )
    return {name: float(values[0].replace(",", "")) for name, values in found.items() if values}


# -----------------------------------------------------------------------------
# 2. Training: three steps on random tokens, the peak of each part of a step


def worker(args) -> None:
    """One process of a training: prints {part of a step: GiB at its peak} of the process that needs
    most.
    """
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if machine.gpus()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    values = models.config(args.model)
    config = AutoConfig.for_model(**values)
    deepspeed_engine = args.engine == "deepspeed"
    if deepspeed_engine:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
        settings = json.loads(
            (ROOT / f"modules/05_DeepSpeed/configs/z{args.zero}.json").read_text()
        )
        settings |= {
            "bf16": {"enabled": args.dtype == "bfloat16"},
            "train_micro_batch_size_per_gpu": args.micro_batch,
            "gradient_accumulation_steps": args.accumulate,
        }
        settings["optimizer"]["params"]["lr"] = 1e-5
        if args.zero:
            settings["zero_optimization"]["reduce_bucket_size"] = args.bucket
        if args.offload != "none":
            settings["optimizer"]["params"].pop("torch_adam")
            settings["zero_optimization"]["offload_optimizer"] = {
                "device": "cpu",
                "pin_memory": True,
            }
        if args.offload == "optimizer+param":
            settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
        HfDeepSpeedConfig(settings)  # while it lives, a stage 3 model is divided as it is built  # noqa: F841
    elif world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    whole = (
        args.method == "full" and not deepspeed_engine
    )  # these engines keep the weights in fp32 and compute in bf16
    held = torch.float32 if whole or args.dtype == "float32" else torch.bfloat16
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=held)
    if args.method == "qlora":
        pack(model, device)
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if args.method != "full":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    if deepspeed_engine:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=settings,
        )
        backward, step = engine.backward, engine.step
    else:
        engine = model
        if args.engine == "fsdp":
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if args.dtype == "bfloat16" else None
            )
            for layer in model.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
        elif world > 1:
            engine = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=[device.index] if device.type == "cuda" else None
            )
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0
        )
        backward = torch.Tensor.backward

        def step():
            optimizer.step()
            optimizer.zero_grad()

    autocast = not deepspeed_engine and args.dtype == "bfloat16" and args.engine != "fsdp"
    measured: dict[str, float] = {}

    def lap(part: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            measured[f"{part}_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()

    for _ in range(STEPS):
        for _ in range(args.accumulate):
            ids = torch.randint(
                0, config.vocab_size, (args.micro_batch, args.seq_len), device=device
            )
            lap("between")
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            lap("forward")
            backward(loss)
            lap("backward")
            if deepspeed_engine:
                step()
        if not deepspeed_engine:
            step()
        lap("step")
    measured["peak_gib"] = max(measured.values(), default=0.0)
    if device.type == "cuda":
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["context_gib"] = (
            torch.cuda.mem_get_info()[1]
            - torch.cuda.mem_get_info()[0]
            - torch.cuda.memory_reserved()
        ) / 2**30
    measured["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    everyone = [measured]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, measured)
    if rank == 0:
        most = {name: round(max(m[name] for m in everyone), 3) for name in measured} | {
            "host_gib": round(sum(m["host_gib"] for m in everyone), 2)
        }
        print("measured " + json.dumps(most), flush=True)
    if world > 1:
        dist.barrier()
        os._exit(0)  # gloo's threads can abort an orderly end, and there is nothing left to keep


def pack(model, device) -> None:
    """Put 4-bit layers (nf4, double quantisation, as LLaMA-Factory's quantization_bit: 4) in the
    place of the decoder's linear layers.
    """
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            small = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            small.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(),
                requires_grad=False,
                quant_type="nf4",
                compress_statistics=True,
            )
            if module.bias is not None:
                small.bias = torch.nn.Parameter(module.bias.data)
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), leaf, small.to(device))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def train(args, line: list[str]) -> dict:
    """Run `worker` in as many processes as the line has GPUs; its numbers."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.gpus),
        __file__,
        "--worker",
        shlex.join(line),
    ]
    if args.gpus == 1 and args.engine != "deepspeed":
        command = [sys.executable, __file__, "--worker", shlex.join(line)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^measured (\{.*\})$", done.stdout, re.M)
    if not found:
        error = (
            [text for text in done.stderr.splitlines() if "Error" in text]
            or done.stderr.strip().splitlines()
            or [str(done.returncode)]
        )
        fail(f"the training ended without a result: {error[0].strip()[:300]}")
    return json.loads(found[1])


# -----------------------------------------------------------------------------
# 3. The lines of configs/calibration.yaml, one after another


def able(args) -> str:
    """Why this machine cannot run the line; "" when it can."""
    have = machine.gpus()
    cap = machine.memory_cap_gib() or (have[0]["memory_gib"] if have else 0)
    if len(have) < args.gpus or cap < args.gpu_memory_gib - 0.5:
        return f"it needs {args.gpus} x {args.gpu_memory_gib:g} GiB"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these lines")
    parser.add_argument("--list", action="store_true", help="show the lines and run none")
    parser.add_argument("--worker", metavar="LINE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    import plan  # beside this script

    if asked.worker:
        return worker(plan.parse(shlex.split(asked.worker)))
    cases = read_yaml(CASES)
    if unknown := set(asked.only or []) - cases.keys():
        fail(
            f"there is no line {', '.join(sorted(unknown))} in configs/calibration.yaml: {', '.join(cases)}"
        )
    if asked.list:
        for name, case in cases.items():
            print(f"{name:20} {case['use']:5} plan.py {case['plan']}")
        return
    load_profile(check=False)  # a line says itself how many cards it needs
    jobs.refuse_taken_cards()
    failed, able_here = [], 0
    for name, case in cases.items():
        if asked.only and name not in asked.only:
            continue
        args = plan.parse(shlex.split(case["plan"]))
        if why := able(args):
            print(f"{name}: not run here, {why}", file=sys.stderr)
            continue
        able_here += 1
        print(f"{name} ({case['use']}): {case['plan']}", file=sys.stderr, flush=True)
        try:
            metrics = (
                serve(args, RUNS / "calibrate" / f"{name}.log")
                if args.task == "serve"
                else train(args, shlex.split(case["plan"]))
            )
        except SystemExit:
            failed.append(name)
            continue
        results.finish(__file__, metrics, case, name)
    if not able_here:
        print(
            "nothing to measure on this machine: the lines need GPUs. On a CPU, make test holds the planner against the tensors of the engines"
        )
    if failed:
        fail(f"{', '.join(failed)} could not be measured (see above); the others are stored")


if __name__ == "__main__":
    main()
