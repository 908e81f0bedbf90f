"""Fine-tune by LLaMA-Factory: a YAML says everything, `llamafactory-cli train` does it.

    make lf-train                                      # LoRA in one process
    make lf-train-z2                                   # the same with DeepSpeed ZeRO-2 in the profile's number of processes
    make lf-train ARGS="lora_rank=8 seed=1"            # any setting of LLaMA-Factory by its own name wins over YAML and profile
    python modules/06_LLaMA-Factory/01_train.py --dry-run    # only print the settings and LLaMA-Factory's own command

What it writes: the whole settings as YAML, then the adapter with LLaMA-Factory's logs and plot under runs/06_LLaMA-Factory/.
Look at: the training example (exactly this text is learnt, the loss counts on the labels only), the falling loss, and with ZeRO-2
the stage and the number of processes as DeepSpeed's own checkpoint states them.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from lab import ROOT, data, fail, jobs, models, results, shown
from lab.profile import load_profile, need_cards

HERE = Path(__file__).resolve().parent


def own_system_message(folder: Path) -> str | None:
    """What the model's own chat template says before a user who gave no system message: "" nothing, None not a ChatML template."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = folder / "chat_template.jinja"
    template = source.read_text() if source.is_file() else json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    if not isinstance(template, str):
        return None
    render = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render
    text = render(messages=[{"role": "user", "content": "?"}], add_generation_prompt=True)
    found = re.fullmatch(r"(?:<\|im_start\|>system\n(.*?)<\|im_end\|>\n)?<\|im_start\|>user\n.*", text, re.S)
    return (found[1] or "") if found else None


def check_data(settings) -> None:
    """Refuse a data set that dataset_info.json does not know, and broken rows of the local ones, before anything is loaded."""
    folder = ROOT / settings.dataset_dir
    if not (folder / "dataset_info.json").is_file():
        fail(f"there is no {shown(folder / 'dataset_info.json')}: it names the data sets; set dataset_dir to a folder that has one")
    info = json.loads((folder / "dataset_info.json").read_text())
    for name in str(settings.dataset).split(","):
        if name.strip() not in info:
            fail(f"there is no data set {name.strip()}: dataset_info.json in {shown(folder)} has {', '.join(info)}")
        entry = info[name.strip()]
        if "messages" in entry.get("columns", {}) and "file_name" in entry:
            data.rows(str(folder / entry["file_name"]))


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero2", action="store_true", help="with DeepSpeed ZeRO-2, configs/sft_lora_z2.yaml")
    parser.add_argument("--processes", type=int, default=profile.finetune.processes, help="of --zero2 (default: %(default)s)")
    parser.add_argument("--model", default=profile.finetune.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and the command, and exit")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of LLaMA-Factory, by its own names")
    args = parser.parse_args()

    import factory
    from omegaconf import OmegaConf

    # -----------------------------------------------------------------------------
    # 1. The settings: the YAML, then the profile's values, then the model's, then yours

    source = HERE / "configs" / ("sft_lora_z2.yaml" if args.zero2 else "sft_lora.yaml")
    if wrong := [word for word in args.overrides if not re.match(r"\w+=.", word)]:
        fail(f"{wrong[0]!r} is no setting: write KEY=VALUE, for example learning_rate=1e-4")
    known = models.entry(args.model)[1]
    model = {"model_name_or_path": known.get("hub", args.model), "template": known.get("template")}  # none: derived from the model's own
    if args.zero2:
        model["ddp_backend"] = "nccl" if profile.device == "cuda" else "gloo"  # NCCL is for GPUs
    settings = OmegaConf.merge(OmegaConf.load(source), profile.finetune.args, model, OmegaConf.from_cli(args.overrides))
    name = Path(settings.output_dir).name
    for key, value in OmegaConf.from_cli(args.overrides).items():
        if type(default := OmegaConf.load(source).get(key)) in (int, float) and not isinstance(value, int | float):
            fail(f"{key}={value} is no number: configs/{source.name} has {key}={default}")
    if args.zero2 and not args.dry_run:
        need_cards("lf-train-z2", max(2, args.processes))
    if args.zero2 and args.processes < 2:
        fail("ZeRO-2 divides gradients and optimizer states between processes: it needs at least 2, set --processes 2")
    if profile.device == "cpu" and (settings.get("bf16") or settings.get("fp16") or settings.get("pure_bf16")):
        fail("training in bf16 or fp16 needs a GPU, and this profile computes on the CPU: set bf16=false")
    check_data(settings)

    # -----------------------------------------------------------------------------
    # 2. The template: training must say what the model's own chat template, and so every server later, says before the user

    if not args.dry_run:
        jobs.refuse_taken_cards()
        folder = models.model_folder(settings.model_name_or_path)
        settings.model_name_or_path = shown(folder)
        if settings.template and "default_system" not in settings and (system := own_system_message(folder)) is not None:
            settings.default_system = system

    # -----------------------------------------------------------------------------
    # 3. LLaMA-Factory's own command. The settings go in as a file: its launcher cuts KEY=VALUE words at spaces

    text = OmegaConf.to_yaml(settings)
    print(text, flush=True)
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(args.processes)} if args.zero2 else {}
    if not args.zero2 and profile.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # of two it would use both
    config = factory.FOLDER / f"{name}.yaml" if args.dry_run else factory.write(settings, name, f"{source.name} and profile {profile.name}")
    command = factory.prepare(environment, "train", os.path.relpath(config, ROOT))
    if args.dry_run:
        return results.note(results.name_of(__file__))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training is ended with us
    output, began = ROOT / settings.output_dir, time.time()
    factory.run(name, command)
    wall = time.time() - began

    # -----------------------------------------------------------------------------
    # 4. What came of it, from the files that the engine wrote

    history = json.loads((output / "trainer_state.json").read_text())
    final = json.loads((output / "all_results.json").read_text())
    losses = [entry["loss"] for entry in history["log_history"] if "loss" in entry] or [final["train_loss"]]
    checkpoint = output / f"checkpoint-{history['global_step']}"
    written = [f for f in sorted(checkpoint.rglob("*.pt*")) if f.stat().st_mtime >= began]
    shards = [f for f in written if f.name.endswith("_optim_states.pt")]  # one of each process, written by a running DeepSpeed only
    stage = 0
    if shards:
        import torch

        stage = int(torch.load(shards[0], map_location="cpu", weights_only=False)["optimizer_state_dict"]["zero_stage"])
    if args.zero2 and stage != 2:
        fail(f"the training ran without ZeRO-2, though the settings name it: {shown(checkpoint)} holds no state of it")
    (output / "config.yaml").write_text(text)  # what merging, chat and API go by: they must say what training said
    processes = len(shards) or sum(f.name.startswith("rng_state") for f in written)
    steps, seconds = history["global_step"], final["train_runtime"]
    print(f"{steps} steps in {seconds:.0f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}, world size {processes}, ZeRO stage {stage}")
    print(f"adapter and logs: {shown(output)}")
    metrics = {"losses": losses, "step_count": steps, "train_s": round(seconds, 1), "wall_s": round(wall, 1)}
    metrics |= {"world_size": processes, "zero_stage": stage}
    used = {key: value for key, value in OmegaConf.to_container(settings).items() if key not in ("model_name_or_path", "output_dir")}
    results.finish(__file__, metrics, {"model": args.model, **used}, "zero2" if args.zero2 else "")


if __name__ == "__main__":
    main()
