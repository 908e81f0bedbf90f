"""Full fine-tuning by DeepSpeed: ZeRO divides what plain data parallelism keeps whole.

    make train-z2     # likewise train-z0, train-z1, train-z3; train-z2-offload takes ds_config.json
    cd modules/05_DeepSpeed && deepspeed --num_gpus=2 train.py --deepspeed ds_config.json
    make train-z3 ARGS="--save runs/05_DeepSpeed/z3"     # gathered from all processes

Look at: the table of bytes. It measures the tensors that the running engine holds in this process
(parameters, gradients, optimizer states) beside the theory for this stage and number of processes.
The losses are those of plain data parallelism (modules/04_Accelerate/01_train_ddp.py) at every
stage: ZeRO changes where numbers are kept, not what is computed.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import ds_check
import ds_config
import zero_states

from lab import data, fail, machine, models, results, training
from lab.profile import load_profile
from lab.table import table


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What DeepSpeed does
    ours = Path(__file__).with_name("ds_config.json")
    file = "DeepSpeed's configuration (default: ds_config.json beside this script)"
    parser.add_argument("--deepspeed", type=Path, default=ours, metavar="FILE", help=file)
    # Model and data
    models_by_stage = f"{profile.zero.model}; at stage 0 {profile.train.model}"
    training.add_data_flags(parser, profile.train, models_by_stage)
    # Steps
    training.add_step_flags(parser, profile.train, file_decides=True)
    # Inserted by the deepspeed launcher
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. Who am I, and what does the configuration say?

    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2:
        fail(
            f"ZeRO divides states over the processes and needs at least 2, here is {world}: "
            "make train-z2, or deepspeed --num_gpus=2 train.py ..."
        )
    training.refuse_impossible(args, profile.device)
    config = ds_config.Config(args.deepspeed)
    config.settle(args, profile.train, world)
    args.model = args.model or (profile.zero.model if config.stage else profile.train.model)

    if profile.device == "cpu":
        # The launcher names GPUs 0,1 even where there is none, and one thread a process.
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, machine.cores() // world)))
    import deepspeed
    import torch
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = models.model_folder(args.model)
    seen_by_transformers = config.fill(args.steps, AutoConfig.from_pretrained(folder))
    ds_check.check(config)
    ds_check.refuse_type(config)

    # -----------------------------------------------------------------------------
    # 2. Data, the meeting of the processes, model, engine

    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    made_of = f"{world} processes x {config.accumulate} micro-steps x {config.micro_batch}"
    blocks = training.whole_steps(blocks, config.step_blocks, args, made_of)
    deepspeed.init_distributed(dist_backend="nccl" if profile.device == "cuda" else "gloo")
    forget_shared_memory(rank)
    torch.manual_seed(args.seed)
    share = DistributedSampler(blocks, shuffle=False)
    loader = DataLoader(blocks, batch_size=config.micro_batch, sampler=share)

    # At stage 3 divided as it is loaded.
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters())
    with ds_check.refusals_as_sentences(config):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config.values
        )
    del seen_by_transformers
    stage = stage_that_runs(engine)

    # -----------------------------------------------------------------------------
    # 3. Train: the engine counts the micro-steps, divides the loss by their number and steps after
    # the last one

    def endless(loader):
        while True:
            yield from loader

    batches = endless(loader)
    losses = []
    seconds = []
    gradients = Held(0, 0)  # the most that was held between a backward and its step
    for step in range(args.steps):
        began = time.perf_counter()
        step_loss = torch.zeros((), device=engine.device)
        for _ in range(config.accumulate):
            batch = next(batches).to(engine.device)  # [micro_batch, seq_len]
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            now_held = gradients_held(engine)
            if now_held.everywhere > gradients.everywhere:
                gradients = now_held
            engine.step()
            step_loss += loss.detach().float() / config.accumulate
        dist.all_reduce(step_loss)  # the sum over the processes, for the eye only
        losses.append(round(step_loss.item() / world, 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            print(f"step {step + 1:3}   loss {losses[-1]:.4f}   {seconds[-1]:.2f} s", flush=True)

    # -----------------------------------------------------------------------------
    # 4. What this process holds, beside the theory

    held = {"gradients": gradients} | states_held(engine)
    bytes_held = {kind: held[kind].everywhere for kind in zero_states.MIXED}
    offload = offloads(engine)
    each = zero_states.of_deepspeed(stage, world, config.dtype, config.accumulate, offload)
    expected = {kind: each[kind] * parameters for kind in each}
    adam = type(engine.basic_optimizer).__name__
    if rank == 0:
        wrapper = type(engine.optimizer).__name__
        print(
            f"\nZeRO stage {stage} ({wrapper} over {adam}), {world} processes, "
            f"{parameters:,} parameters, {config.dtype}"
        )
        show_bytes(bytes_held, expected, parameters)

    # -----------------------------------------------------------------------------
    # 5. Save: under stage 3 every process holds a part of each tensor, so all of them gather, one
    # tensor at a time, and one writes

    if args.save:
        state = {}
        for name, weight in engine.module.named_parameters():
            # Nothing happens to a whole parameter; at stage 3 it would be saved empty without.
            with deepspeed.zero.GatheredParameters(weight):
                if rank == 0:
                    state[name] = weight.detach().to("cpu", copy=True)
        if rank == 0:
            engine.module.save_pretrained(args.save, state_dict=state)
            AutoTokenizer.from_pretrained(folder).save_pretrained(args.save)
    if rank == 0:
        step_tokens = config.step_blocks * args.seq_len
        on_device = sum(part.on_device for part in held.values())
        metrics = {
            "zero_stage": stage,
            "world_size": world,
            "losses": losses,
            "step_tok_count": step_tokens,
            **gib_of_states(bytes_held, expected),
            "state_bytes_per_parameter_ratio": round(sum(bytes_held.values()) / parameters, 3),
            "state_on_device_gib": on_device / 2**30,
            "throughput_tok_per_s": training.tokens_per_s(step_tokens, seconds),
            "peak_memory_gib": round(training.peak_memory_gib(profile.device), 2),
            "parameters_count": parameters,
            "optimizer": adam,
            "dtype": config.dtype,
        }
        settings = vars(args) | {
            "deepspeed": str(args.deepspeed),
            "learning_rate": config.learning_rate,
            "micro_batch": config.micro_batch,
            "accumulate": config.accumulate,
            "deepspeed_config": config.values,
        }
        results.finish(__file__, metrics, settings, f"z{stage}" + "-offload" * offload)
    dist.destroy_process_group()


# -----------------------------------------------------------------------------
# Measuring. Buffers on the way (reduce bucket, copies for offload) are no states: peak memory has
# them.


class Held(NamedTuple):
    """Bytes of tensors: all of them, and those on the device that computes."""

    everywhere: int
    on_device: int


def bytes_of(tensors, device) -> Held:
    """Each tensor counted once: tied weights are one."""
    once = {t.data_ptr(): t for t in tensors if t is not None and t.numel()}.values()
    return Held(
        sum(tensor.nbytes for tensor in once),
        sum(tensor.nbytes for tensor in once if tensor.device.type == device.type),
    )


def stage_that_runs(engine) -> int:
    """The stage by the class of the optimizer: one does stages 1 and 2, one stage 3."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    zero = engine.optimizer
    stage = 0
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        stage = 3
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        stage = 2 if zero.partition_gradients else 1
    configured = engine.zero_optimization_stage()
    if stage != configured:
        kind = type(zero).__name__
        fail(f"configured for ZeRO stage {configured}, but the engine runs stage {stage} ({kind})")
    return stage


def offloads(engine) -> bool:
    """Whether the optimizer's states are in host memory."""
    zero = engine.optimizer
    return getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False)


def gradients_held(engine) -> Held:
    """What is kept from backward to step, wherever the stage keeps it."""
    zero = engine.optimizer
    tensors = [weight.grad for weight in engine.module.parameters()]
    offloaded = getattr(zero, "single_partition_of_fp32_groups", [])
    tensors += [part.grad for part in offloaded]
    for group in getattr(zero, "averaged_gradients", {}).values():
        tensors += group or []
    return bytes_of(tensors, engine.device)


def states_held(engine) -> dict[str, Held]:
    """Parameters, and the optimizer's states: master copy and moments."""
    import torch

    weights = []
    for weight in engine.module.parameters():
        weights.append(weight.data)  # empty at stage 3 ...
        weights.append(getattr(weight, "ds_tensor", None))  # ... where this is the own part
    moments = []
    for master, state in engine.basic_optimizer.state.items():
        moments += [tensor for tensor in (master, *state.values()) if torch.is_tensor(tensor)]
    parameters = bytes_of(weights, engine.device)
    # In fp32 without ZeRO the master copy is the weight itself: counted together, then taken off.
    both = bytes_of([*weights, *moments], engine.device)
    everywhere = both.everywhere - parameters.everywhere
    optimizer = Held(everywhere, both.on_device - parameters.on_device)
    return {"parameters": parameters, "optimizer": optimizer}


def show_bytes(held: dict[str, int], expected: dict[str, float], parameters: int) -> None:
    """The table of bytes, a row for each kind and one for their sum."""
    held = held | {"sum": sum(held.values())}
    expected = expected | {"sum": sum(expected.values())}
    rows = [
        [kind, f"{held[kind]:,}", f"{expected[kind]:,.0f}", f"{held[kind] / parameters:.2f}"]
        for kind in held
    ]
    table(["bytes in this process", "measured", "theory", "per parameter"], rows)


def gib_of_states(held: dict[str, int], expected: dict[str, float]) -> dict[str, float]:
    """The same table for the record."""
    sums = {"": sum(held.values()), "_theory": sum(expected.values())}
    gib = {}
    for kind in held:
        name = kind.removesuffix("s")
        gib[f"{name}_state_gib"] = held[kind] / 2**30
        gib[f"{name}_state_theory_gib"] = expected[kind] / 2**30
    return gib | {f"state{name}_gib": total / 2**30 for name, total in sums.items()}


def forget_shared_memory(rank: int) -> None:
    """Take the name away from the 66 MiB that each process has opened on a CPU.

    DeepSpeed leaves them behind.
    """
    import torch.distributed as dist

    dist.barrier()
    meeting = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{meeting}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
