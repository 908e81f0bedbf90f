"""Full fine-tuning by DeepSpeed: ZeRO divides what plain data parallelism keeps whole in every process.

    make train-z2                                              # train-z0, -z1, -z3; train-z2-offload: this folder's ds_config.json
    cd modules/05_DeepSpeed && deepspeed --num_gpus=2 train.py --deepspeed ds_config.json
    make train-z3 ARGS="--save runs/05_DeepSpeed/z3"           # a Hugging Face folder, gathered from all processes

Look at: the table of bytes. It measures the tensors that the running engine holds in this process (parameters, gradients,
optimizer states) beside the theory for this stage and number of processes. The losses are those of plain data parallelism
(modules/04_Accelerate/01_train_ddp.py) at every stage: ZeRO changes where numbers are kept, not what is computed.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path

from lab import data, fail, jobs, machine, models, results
from lab.profile import load_profile


class Asked(dict):
    """A configuration that remembers which keys DeepSpeed asked for: a mistyped `zero_optimisation` it would ignore without a word."""

    asked: set = set()  # one for all parts of a configuration

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


def read_config(file: Path) -> dict:
    """The JSON object in a DeepSpeed configuration file."""
    if not file.is_file():
        fail(f"there is no DeepSpeed configuration {file}: those here are ds_config.json and configs/z0.json to z3.json of modules/05_DeepSpeed")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        fail(f"{file} is not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}")
    if not isinstance(config, dict) or not isinstance(config.get("optimizer"), dict) or not isinstance(config["optimizer"].get("params"), dict):
        fail(f"{file} must be an object with an optimizer that has params: see modules/05_DeepSpeed/configs/z2.json")
    return config


def settle(file: Path, settings: dict, key: str, flag, default) -> None:
    """Put a number where the file leaves it open (absent or "auto", as transformers' Trainer writes it); refuse two different ones."""
    if settings.get(key, "auto") == "auto":
        settings[key] = default if flag is None else flag
    elif flag not in (None, settings[key]):
        fail(f'{file} fixes {key} at {settings[key]}, the command line says {flag}: change one of them, or write "auto" in the file')


def theory(stage: int, world: int, dtype: str, accumulate: int, offload: bool) -> dict[str, float]:
    """Bytes that each parameter costs one process, by kind. Source: arXiv 1910.02054; two additions are DeepSpeed's own.

    AdamW has two fp32 moments (8 bytes); bf16 adds an fp32 master copy (K = 12). In fp32 the parameters could be their own master
    copy, but from stage 1 on DeepSpeed copies this process's part of them all the same. Stage 1 keeps whole gradients only while
    they accumulate: after the last micro-step it too keeps its part. An offloaded optimizer gets its part of them in fp32.
    """
    width = 2 if dtype == "bfloat16" else 4
    optimizer = 12 if width == 2 or stage >= 1 else 8
    divided = {"parameters": stage == 3, "gradients": stage >= 2 or (stage == 1 and accumulate == 1), "optimizer": stage >= 1}
    whole = {"parameters": width, "gradients": 4 if offload else width, "optimizer": optimizer}
    return {kind: whole[kind] / world if divided[kind] else whole[kind] for kind in whole}


def nbytes(tensors, device: str = "") -> int:
    """Bytes of the tensors (of those on `device`), each counted once: tied weights are one."""
    return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None and t.numel() and device in ("", t.device.type)}.values())


def main() -> None:
    profile = load_profile()
    p = profile.train
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", type=Path, default=Path(__file__).with_name("ds_config.json"), metavar="FILE", help="its configuration")
    parser.add_argument("--model", help=f"name in configs/models.yaml, hub id or folder (default: {profile.zero.model}; at stage 0 {p.model})")
    parser.add_argument("--data", default=p.data, help="data set, or a .json file of chat rows (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=p.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help=f"blocks of one process and micro-step (default: the file's, else {p.micro_batch})")
    parser.add_argument("--accumulate", type=int, help=f"micro-steps of one optimizer step (default: the file's, else {p.accumulate})")
    parser.add_argument("--seq-len", type=int, default=p.seq_len, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help=f"constant (default: the file's, else {p.learning_rate})")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is random in the model, such as dropout (default: %(default)s)")
    parser.add_argument("--save", metavar="FOLDER", help="where to leave the trained model (default: nowhere)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. Who am I, and does the configuration agree with the command line?

    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world < 2:
        fail(f"ZeRO divides states over the processes and needs at least 2, here is {world}: make train-z2, or deepspeed --num_gpus=2 train.py ...")
    if profile.device == "cuda" and local_rank >= len(machine.gpus()):
        fail(f"{os.environ.get('LOCAL_SIZE', world)} processes need as many GPUs, {len(machine.gpus())} found: lower --num_gpus")
    jobs.refuse_taken_cards()
    config = read_config(args.deepspeed)
    settle(args.deepspeed, config, "train_micro_batch_size_per_gpu", args.micro_batch, p.micro_batch)
    settle(args.deepspeed, config, "gradient_accumulation_steps", args.accumulate, p.accumulate)
    settle(args.deepspeed, config["optimizer"]["params"], "lr", args.learning_rate, p.learning_rate)
    settle(args.deepspeed, config.setdefault("bf16", {}), "enabled", None, p.dtype == "bfloat16")
    micro_batch, accumulate = config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]
    if not all(isinstance(n, int) and n > 0 for n in (micro_batch, accumulate, args.steps)) or args.seq_len < 2:
        fail("steps, micro-batch and accumulation must be whole numbers above 0, --seq-len at least 2")
    if not isinstance(lr := config["optimizer"]["params"]["lr"], int | float) or lr <= 0:
        fail(f"the learning rate must be a number above 0, it is {lr!r}")
    step_blocks = micro_batch * accumulate * world
    if config.setdefault("train_batch_size", step_blocks) not in ("auto", step_blocks):
        fail(
            f"{args.deepspeed}: train_batch_size is {config['train_batch_size']}, but micro-batch {micro_batch} x accumulation {accumulate} x "
            f"{world} processes = {step_blocks}: correct one of them, or leave train_batch_size out"
        )
    config["train_batch_size"] = step_blocks

    if profile.device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # the launcher names GPUs 0,1 even where there is none
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // world)))  # torchrun would have said 1
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations import HfDeepSpeedConfig

    try:
        parts = {"optimizer": Asked(config["optimizer"])}
        parsed = deepspeed.DeepSpeedConfig(Asked({k: v for k, v in config.items() if k != "train_batch_size"} | parts))
    except (ValueError, AssertionError, deepspeed.DeepSpeedConfigError) as e:
        fail(f"DeepSpeed refuses {args.deepspeed}: {' '.join(str(e).split(chr(10))[1:3]) or e}")
    if unknown := ({*config} | {*config["optimizer"]}) - Asked.asked - {"train_batch_size"}:
        fail(f"DeepSpeed never reads {', '.join(sorted(unknown))} of {args.deepspeed}: correct the name, or take it out")

    # -----------------------------------------------------------------------------
    # 2. Data, the meeting of the processes, model, engine

    args.model = args.model or (profile.zero.model if parsed.zero_optimization_stage else p.model)  # whole in every process: a smaller one
    folder = models.model_folder(args.model)
    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    if len(blocks) < step_blocks:
        fail(f"one step needs {step_blocks} blocks, {args.data} has {len(blocks)}: lower --micro-batch, --accumulate or --seq-len")
    blocks = blocks[: len(blocks) // step_blocks * step_blocks]  # whole steps only; then the data begins anew

    deepspeed.init_distributed(dist_backend="nccl" if profile.device == "cuda" else "gloo")
    dist.barrier()  # on a CPU each process has opened 66 MiB of shared memory that DeepSpeed leaves behind: take its name away
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    loader = DataLoader(blocks, batch_size=micro_batch, sampler=DistributedSampler(blocks, shuffle=False))

    dtype = "bfloat16" if config["bf16"]["enabled"] else "float32"
    keep = HfDeepSpeedConfig(config)  # while it lives, from_pretrained divides a stage 3 model as it loads it  # noqa: F841
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).train()
    parameters = sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters())
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    except TypeError as e:  # the optimizer's constructor takes `params` as it is
        fail(f"DeepSpeed refuses the optimizer of {args.deepspeed}: {e}")
    zero = engine.optimizer  # what runs, whatever the file says: one class does stages 1 and 2, one stage 3
    divides_gradients = getattr(zero, "partition_gradients", False)
    stage = {"DeepSpeedZeroOptimizer": 1 + divides_gradients, "DeepSpeedZeroOptimizer_Stage3": 3}.get(type(zero).__name__, 0)
    if stage != engine.zero_optimization_stage():
        fail(f"the engine is configured for ZeRO stage {engine.zero_optimization_stage()} but runs stage {stage} ({type(zero).__name__})")

    # -----------------------------------------------------------------------------
    # 3. Train: the engine counts the micro-steps, divides the loss by them and steps after the last one

    def endless(loader):
        while True:
            yield from loader

    batches, losses, seconds = endless(loader), [], []
    for step in range(args.steps):
        began, step_loss, most = time.perf_counter(), torch.zeros((), device=engine.device), (0, 0)
        for _ in range(accumulate):
            batch = next(batches).to(engine.device)
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            gradients = [w.grad for w in engine.module.parameters()] + [w.grad for w in getattr(zero, "single_partition_of_fp32_groups", [])]
            gradients += [part for group in getattr(zero, "averaged_gradients", {}).values() for part in group or []]
            most = max(most, (nbytes(gradients), nbytes(gradients, profile.device)))  # what is kept from backward to step
            del gradients  # or they would live into the next step
            engine.step()
            step_loss += loss.detach().float() / accumulate
        dist.all_reduce(step_loss)  # the sum over the processes, for the eye only
        losses.append(round(step_loss.item() / world, 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            print(f"step {step + 1:3}   loss {losses[-1]:.4f}   {seconds[-1]:.2f} s", flush=True)

    # -----------------------------------------------------------------------------
    # 4. What this process holds: parameters, gradients, optimizer states (master copy and moments). Buffers on the way (reduce
    #    bucket, copies for offload) are no states: peak memory has them.

    weights = [t for w in engine.module.parameters() for t in (w.data, getattr(w, "ds_tensor", None))]  # stage 3: own part, rest empty
    moments = [t for key, state in engine.basic_optimizer.state.items() for t in (key, *state.values()) if torch.is_tensor(t)]
    held = {"parameters": nbytes(weights), "gradients": most[0], "optimizer": nbytes([*weights, *moments]) - nbytes(weights)}
    on_device = nbytes([*weights, *moments], profile.device) + most[1]
    adam = type(engine.basic_optimizer).__name__
    offload = getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)
    expected = {kind: each * parameters for kind, each in theory(stage, world, dtype, accumulate, offload).items()}
    if rank == 0:
        print(f"\nZeRO stage {stage} ({type(zero).__name__} over {adam}), {world} processes, {parameters:,} parameters, {dtype}")
        print(f"  {'bytes in this process':22}{'measured':>16}{'theory':>16}{'per parameter':>15}")
        for kind in (*held, "sum"):
            measured, said = (sum(d.values()) if kind == "sum" else d[kind] for d in (held, expected))
            print(f"  {kind:22}{measured:16,}{said:16,.0f}{measured / parameters:15.2f}")

    # -----------------------------------------------------------------------------
    # 5. Save: under stage 3 every process holds a part of each tensor, so all of them gather, one tensor at a time, and one writes

    if args.save:
        state = {}
        for name, weight in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters(weight):  # does nothing to a whole parameter; without it, stage 3 saves empty tensors
                if rank == 0:
                    state[name] = weight.detach().to("cpu", copy=True)
        if rank == 0:
            engine.module.save_pretrained(args.save, state_dict=state)
            AutoTokenizer.from_pretrained(folder).save_pretrained(args.save)
    if rank == 0:
        steady = seconds[1:] or seconds  # the first step warms up
        tokens = step_blocks * args.seq_len  # of a step
        peak = torch.cuda.max_memory_allocated() if profile.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"zero_stage": stage, "world_size": world, "losses": losses, "step_tok_count": tokens}
        for kind, name in (("parameters", "parameter_state"), ("gradients", "gradient_state"), ("optimizer", "optimizer_state")):
            metrics |= {f"{name}_gib": held[kind] / 2**30, f"{name}_theory_gib": expected[kind] / 2**30}
        metrics |= {"state_gib": sum(held.values()) / 2**30, "state_theory_gib": sum(expected.values()) / 2**30}
        metrics |= {"state_bytes_per_parameter_ratio": round(sum(held.values()) / parameters, 3), "state_on_device_gib": on_device / 2**30}
        metrics |= {"throughput_tok_per_s": round(tokens * len(steady) / sum(steady), 1), "peak_memory_gib": round(peak / 2**30, 2)}
        metrics |= {"parameters_count": parameters, "optimizer": adam, "dtype": dtype}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        settings |= {"learning_rate": lr, "micro_batch": micro_batch, "accumulate": accumulate, "deepspeed_config": config}
        results.finish(__file__, metrics, settings, f"z{stage}" + "-offload" * offload)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
