"""Fine-tune by LLaMA-Factory: a YAML says everything, `llamafactory-cli train` does it.

    make lf-train                               # LoRA in one process
    make lf-train METHOD=dora                   # configs/methods/: full, qlora, packing ...
    make lf-train-z2                            # DeepSpeed ZeRO-2 in the profile's processes
    make lf-train-z2 METHOD="qlora fsdp"        # the same by DDP, ZeRO-3, FSDP; several at once
    make lf-train ARGS="lora_rank=8 seed=1"     # any setting of LLaMA-Factory, by its own name
    make lf-train RESUME=1                      # go on with an unfinished one; FRESH=1 removes it
    python modules/06_LLaMA-Factory/01_train.py --dry-run    # only print settings and command

It writes the whole settings as YAML, then adapter, logs and plot under runs/06_LLaMA-Factory/.
Look at: the training example (just this is learnt, the loss counts on the labels only), the falling
loss, and with ZeRO-2 the stage and the processes, as DeepSpeed's own checkpoint states them.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import checks
import factory
import methods
import outcome
import unfinished

from lab import ROOT, fail, jobs, models, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What is trained
    methods.add_flags(parser, profile.finetune)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings by LLaMA-Factory's own names"
    )
    # How it is launched
    parser.add_argument(
        "--zero2",
        action="store_true",
        help="train by configs/sft_lora_z2.yaml: DeepSpeed ZeRO-2 in several processes",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=profile.finetune.processes,
        help="number of processes with --zero2 (default: %(default)s)",
    )
    unfinished.add_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print settings and command")
    args = parser.parse_intermixed_args()

    from omegaconf import OmegaConf

    # -----------------------------------------------------------------------------
    # 1. The settings: the YAML, then the profile's values, then the method's, then yours

    source = HERE / "configs" / ("sft_lora_z2.yaml" if args.zero2 else "sft_lora.yaml")
    checks.overrides(args.overrides, source)
    named = methods.chosen(args.method, args.zero2)
    changed = methods.settings(named, profile.finetune)
    model = args.model or changed.get("model_name_or_path", profile.finetune.model)
    listed = models.entry(model)[1]
    here = {
        "model_name_or_path": listed.get("hub", model),
        "template": listed.get("template"),  # None: derived from the model's own
        "output_dir": shown(factory.FOLDER / methods.folder(named, args.zero2)),
        "enable_jit_checkpoint": not args.zero2,  # of two processes each would save by itself
    }
    if args.zero2:
        here["ddp_backend"] = "nccl" if profile.device == "cuda" else "gloo"  # NCCL is for GPUs
    written = OmegaConf.load(source)
    yours = OmegaConf.from_cli(args.overrides)
    settings = OmegaConf.merge(written, profile.finetune.args, changed, here, yours)
    if args.zero2:
        checks.processes(args.processes, args.dry_run)
    checks.needs_a_gpu(settings, profile.device)
    named_stage = checks.named_stage(settings)

    # -----------------------------------------------------------------------------
    # 2. The template: training must say what the model's own, and so every server later, says

    if not args.dry_run:
        jobs.refuse_taken_cards()
        checks.data_sets(settings)
        folder = models.model_folder(settings.model_name_or_path)
        settings.model_name_or_path = shown(folder)
        system = factory.own_system_message(folder)
        if settings.template and "default_system" not in settings and system is not None:
            settings.default_system = system

    # -----------------------------------------------------------------------------
    # 3. LLaMA-Factory's own command

    output = ROOT / settings.output_dir
    settings.output_dir = shown(unfinished.inside(output))
    print(OmegaConf.to_yaml(settings), flush=True)
    environment = methods.environment(settings, profile.device, args.processes * args.zero2)
    config = factory.FOLDER / f"{output.name}.yaml"
    command = factory.prepare(environment, "train", os.path.relpath(config, ROOT))
    if args.dry_run:
        return results.note(results.name_of(__file__))
    run = unfinished.identity(settings, args.processes if args.zero2 else 1)
    resumed = unfinished.begin(output, run, args, config.stem)
    if resumed:
        settings.resume_from_checkpoint = shown(resumed)
        settings.overwrite_output_dir = False  # trainer_log.jsonl goes on
    factory.write(settings, config.stem, f"{source.name} and profile {profile.name}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends with us
    began = time.monotonic()
    factory.run(config.stem, command, unfinished.inside(output))
    wall_s = time.monotonic() - began

    # -----------------------------------------------------------------------------
    # 4. What came of it, from the files that the engines wrote

    log = factory.FOLDER / f"{config.stem}.log"
    trained = outcome.read(unfinished.inside(output), log)
    peak_gib = trained.peak_gib or factory.peak_gib()
    if not trained.steps:
        fail("no step was taken: there is too little of num_train_epochs, max_steps or rows")
    unfinished.refuse_early_end(output, trained, settings)
    methods.keep_plain_adapter(unfinished.inside(output))
    # Merging, chat and API go by this file: they must say what training said.
    settings.output_dir = shown(output)
    unfinished.finish(output, OmegaConf.to_yaml(settings))
    print(
        f"{trained.steps} steps in {trained.seconds:.0f} s, "
        f"loss {trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}, "
        f"world size {trained.processes}, ZeRO stage {trained.zero_stage}"
        f"{', FSDP' * trained.is_fsdp}; {trained.trained_parameters:,} parameters trained, "
        f"{trained.tokens_per_s:.0f} tokens/s, at most {peak_gib:.2f} GiB a process"
    )
    if trained.best_step:
        early = ", where it stopped early" * (trained.steps < trained.planned_steps)
        best = f"{min(trained.eval_losses):.4f} at step {trained.best_step}"
        print(f"loss on rows kept apart: lowest {best}, last {trained.eval_losses[-1]:.4f}{early}")
    print(f"adapter and logs: {shown(output)}")
    if trained.zero_stage != named_stage:
        fail(
            f"the training ran without ZeRO-{named_stage}, though {settings.deepspeed} asks for "
            f"it: its checkpoint is of ZeRO stage {trained.zero_stage}; the adapter is kept"
        )
    if settings.get("fsdp") and not trained.is_fsdp:
        fail(f"the training ran without FSDP, though {config.name} asks for it")
    metrics = {
        "losses": trained.losses,
        "step_count": trained.steps,
        "train_s": round(trained.seconds, 1),
        "wall_s": round(wall_s, 1),
        "world_size": trained.processes,
        "zero_stage": trained.zero_stage,
        "trained_count": trained.trained_parameters,
        "tokens_per_s": trained.tokens_per_s,
        "peak_gib": round(peak_gib, 2),
    }
    if trained.best_step:
        metrics |= {"eval_losses": trained.eval_losses, "best_step_count": trained.best_step}
    used = {"model": model, **OmegaConf.to_container(settings)}
    for path in ("model_name_or_path", "output_dir"):
        del used[path]
    variant = list(named)
    if args.zero2 and not set(named) & set(methods.BETWEEN_PROCESSES):
        variant.append(f"zero{trained.zero_stage}" if trained.zero_stage else "ddp")
    variant += ["resumed"] * bool(resumed)  # its seconds are of the rest
    results.finish(__file__, metrics, used, "-".join(variant))


if __name__ == "__main__":
    main()
