"""Full fine-tuning by DeepSpeed: ZeRO divides what plain data parallelism keeps whole.

    make train-z2     # likewise train-z0, train-z1, train-z3; train-z2-offload takes ds_config.json
    cd modules/05_DeepSpeed && deepspeed --num_gpus=2 train.py --deepspeed ds_config.json
    make train-z3 ARGS="--save runs/05_DeepSpeed/z3"     # gathered from all processes
    make train-z3-offload      # parameters and optimizer in host memory; train-z3-nvme: in files
    make train-z3 ARGS="--lora-rank 8 --checkpointing"
    make train-z3 ARGS="--save-every 4"                  # then --resume, with any PROCESSES=N

Look at: the table of bytes. It measures the tensors that the running engine holds in this process
(parameters, gradients, optimizer states) beside the theory for this stage and number of processes.
The losses are those of plain data parallelism (modules/04_Accelerate/01_train_ddp.py) at every
stage: ZeRO changes where numbers are kept, not what is computed.
"""

import argparse
import os
import time
from pathlib import Path

import ds_check
import ds_config
import held
import swap
import universal
import zero_states

from lab import RUNS, checkpoints, data, machine, models, results, training
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What DeepSpeed does
    ours = Path(__file__).with_name("ds_config.json")
    file = "DeepSpeed's configuration (default: ds_config.json beside this script)"
    parser.add_argument("--deepspeed", type=Path, default=ours, metavar="FILE", help=file)
    nvme = "folder of offload to nvme (default: the file's, else runs/05_DeepSpeed/nvme)"
    parser.add_argument("--nvme", metavar="FOLDER", help=nvme)
    # Model and data
    models_by_stage = f"{profile.zero.model}; at stage 0 {profile.train.model}"
    training.add_data_flags(parser, profile.train, models_by_stage)
    lora = "train a LoRA adapter of this rank on every linear layer (default: train all weights)"
    parser.add_argument("--lora-rank", type=int, metavar="R", help=lora)
    recompute = "keep the inputs of the layers only, and compute them again in the backward pass"
    parser.add_argument("--checkpointing", action="store_true", help=recompute)
    # Steps, and states to go on from
    training.add_step_flags(parser, profile.train, file_decides=True)
    training.add_timeout_flag(parser)
    checkpoints.add_flags(parser, RUNS / "05_DeepSpeed" / "states")
    # Inserted by the deepspeed launcher
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. Who am I, and what does the configuration say?

    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    ds_check.refuse_flags(args, world)
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
    shape = AutoConfig.from_pretrained(folder)
    files = swap.settle(config, args, shape, rank, world)
    seen_by_transformers = config.fill(args.steps, shape)
    ds_check.check(config)
    ds_check.refuse_type(config)

    # -----------------------------------------------------------------------------
    # 2. Data, the meeting of the processes, model, engine

    blocks = data.blocks(AutoTokenizer.from_pretrained(folder), args.data, args.seq_len)
    made_of = f"{world} processes x {config.accumulate} micro-steps x {config.micro_batch}"
    blocks = training.whole_steps(blocks, config.step_blocks, args, made_of)
    backend = "nccl" if profile.device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=training.timeout(args))
    training.forget_shared_memory(rank)
    torch.manual_seed(args.seed)
    share = DistributedSampler(blocks, shuffle=False)
    loader = DataLoader(blocks, batch_size=config.micro_batch, sampler=share)

    # At stage 3 divided as it is loaded.
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        model = with_lora(model, args.lora_rank)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    run, begun = universal.last(args, config, blocks, rank, world)
    with ds_check.refusals_as_sentences(config):
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=trained, config=config.values
        )
    del seen_by_transformers
    stage = held.stage_that_runs(engine)

    # -----------------------------------------------------------------------------
    # 3. What a training goes on from: every process reads and writes its part

    def endless(loader):
        while True:
            yield from loader

    batches = endless(loader)
    losses = []
    if begun:
        losses = checkpoints.read(begun)["losses"]
        for _ in range(len(losses) * config.accumulate):
            next(batches)  # what was trained on before
        engine.load_checkpoint(begun, tag="states", load_module_strict=not args.lora_rank)
        checkpoints.load_random_state(begun, rank)  # last: the loader draws from them too

    # -----------------------------------------------------------------------------
    # 4. Train: the engine counts the micro-steps, divides the loss by their number and steps after
    # the last one

    seconds = []
    ending = checkpoints.Ending(args)
    step_tokens = config.step_blocks * args.seq_len
    gradients = held.Held(0, 0)  # the most that was held between a backward and its step
    for step in range(len(losses) + 1, args.steps + 1):
        began = time.perf_counter()
        step_loss = torch.zeros((), device=engine.device)
        for _ in range(config.accumulate):
            batch = next(batches).to(engine.device)  # [micro_batch, seq_len]
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            now_held = held.gradients(engine)
            if now_held.everywhere > gradients.everywhere:
                gradients = now_held
            engine.step()
            step_loss += loss.detach().float() / config.accumulate
        dist.all_reduce(step_loss)  # the sum over the processes, for the eye only
        losses.append(round(step_loss.item() / world, 6))
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            training.show_step(args, losses, seconds, step_tokens, profile.device)
        if checkpoints.due(args, step, ending.heard(engine.device)):
            with checkpoints.written(args, step, run | {"losses": losses}) as partial:
                frozen = {"exclude_frozen_parameters": bool(args.lora_rank)}
                engine.save_checkpoint(partial, tag="states", **frozen)
                checkpoints.save_random_state(partial, rank)
        ending.leave(step)

    # -----------------------------------------------------------------------------
    # 5. What this process holds, beside the theory

    in_memory = {"gradients": gradients} | held.states(engine)
    on_disk = swap.bytes_on_disk(files, rank, engine)
    bytes_held = {kind: in_memory[kind].everywhere + on_disk[kind] for kind in zero_states.MIXED}
    offload = held.offloads(engine)
    parameters = held.numbers(model.parameters())
    updated = held.numbers(trained)
    fp32_sums = held.adds_up_in_fp32(engine)
    running = (stage, world, config.dtype, config.accumulate, offload, fp32_sums)
    each = zero_states.of_deepspeed(*running)
    # Adapted weights are frozen: no gradients of them, and no optimizer states.
    counts = {"parameters": parameters, "gradients": updated, "optimizer": updated}
    expected = {kind: each[kind] * counts[kind] for kind in each}
    adam = type(engine.basic_optimizer).__name__
    if rank == 0:
        wrapper = type(engine.optimizer).__name__
        frozen = f"{updated:,} of them trained, " if args.lora_rank else ""
        print(
            f"\nZeRO stage {stage} ({wrapper} over {adam}), {world} processes, "
            f"{parameters:,} parameters, {frozen}{config.dtype}"
        )
        held.show(bytes_held, expected, parameters)
        if files:
            print(f"{sum(on_disk.values()):,} of them in files of {swap.PATTERN} below {files}")

    # -----------------------------------------------------------------------------
    # 6. Save: under stage 3 every process holds a part of each tensor, so all of them gather, one
    # tensor at a time, and one writes

    if args.save:
        state = {}
        for name, weight in engine.module.named_parameters():
            if not weight.requires_grad:
                continue  # below an adapter, which is saved alone
            # Nothing happens to a whole parameter; at stage 3 it would be saved empty without.
            with deepspeed.zero.GatheredParameters(weight):
                if rank == 0:
                    state[name] = weight.detach().to("cpu", copy=True)
        if rank == 0:
            engine.module.save_pretrained(args.save, state_dict=state)
            AutoTokenizer.from_pretrained(folder).save_pretrained(args.save)
    host_peak = torch.tensor([training.peak_memory_gib("cpu")], device=engine.device)
    dist.all_reduce(host_peak)
    if rank == 0:
        on_device = sum(part.on_device for part in in_memory.values())
        metrics = {
            "zero_stage": stage,
            "world_size": world,
            "losses": losses,
            "step_tok_count": step_tokens,
            **held.gib(bytes_held, expected),
            "state_bytes_per_parameter_ratio": round(sum(bytes_held.values()) / parameters, 3),
            "state_on_device_gib": on_device / 2**30,
            "state_on_disk_gib": sum(on_disk.values()) / 2**30,
            "throughput_tok_per_s": training.tokens_per_s(step_tokens, seconds),
            "peak_memory_gib": round(training.peak_memory_gib(profile.device), 2),
            "host_peak_gib": round(host_peak.item(), 2),
            "parameters_count": parameters,
            "trained_count": updated,
            "optimizer": adam,
            "dtype": config.dtype,
        }
        settings = vars(args) | {
            "deepspeed": str(args.deepspeed),
            "nvme": str(files or ""),
            "learning_rate": config.learning_rate,
            "micro_batch": config.micro_batch,
            "accumulate": config.accumulate,
            "deepspeed_config": config.values,
        }
        where = "-nvme" if files else "-offload" * offload
        adapter = "-lora" if args.lora_rank else ""
        results.finish(__file__, metrics, settings, f"z{stage}{where}{adapter}")
    swap.remove(files, rank)
    dist.destroy_process_group()


def with_lora(model, rank: int):
    """The model with an adapter on every linear layer but the output's; the rest is frozen.

    Before the engine is made: at stage 3 that divides the adapter too. peft would hold it in fp32
    beside 16-bit weights; DeepSpeed keeps an fp32 master copy of it anyway.
    """
    from peft import LoraConfig, get_peft_model

    kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, **kind)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


if __name__ == "__main__":
    main()
