"""Settings that 01_train.py refuses before anything is loaded, each with one sentence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import entries

from lab import ROOT, fail, shown
from lab.profile import need_cards

HERE = Path(__file__).resolve().parent
ABOVE_ZERO = (
    *("num_train_epochs", "max_samples", "cutoff_len", "lora_rank", "learning_rate"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"),
)


def overrides(pairs: list[str], source: Path) -> None:
    """Each is KEY=VALUE, and a number where the YAML `source` has a number."""
    from omegaconf import OmegaConf

    for pair in pairs:
        if not re.match(r"\w+=.", pair):
            fail(f"{pair!r} is no setting: write KEY=VALUE, for example learning_rate=1e-4")
    defaults = OmegaConf.load(source)
    for key, value in OmegaConf.from_cli(pairs).items():
        default = defaults.get(key)
        number = type(default) in (int, float) or key in (*ABOVE_ZERO, "max_steps")
        if number and not isinstance(value, int | float | None):
            usual = f": configs/{source.name} has {key}={default}" if key in defaults else ""
            fail(f"{key}={value} is no number{usual}")
        if key in ABOVE_ZERO and value is not None and value <= 0:
            fail(f"{key}={value}: it must be more than 0")
        if type(default) is bool and not isinstance(value, bool):
            fail(f"{key}={value}: it is true or false")


def told(pairs: list[str], profile):
    """(settings of a training that is given these KEY=VALUE, those of the pairs alone)."""
    from omegaconf import OmegaConf

    source = HERE / "configs" / "sft_lora.yaml"
    overrides(pairs, source)
    yours = OmegaConf.from_cli(pairs)
    known = engine_settings()
    for key in yours:
        if key not in known:
            fail(f"LLaMA-Factory has no setting {key}{entries.meant(key, known)}")
    return OmegaConf.merge(OmegaConf.load(source), profile.finetune.args, yours), yours


def engine_settings() -> list[str]:
    """The names of every setting that a training of LLaMA-Factory takes."""
    from dataclasses import fields

    from llamafactory import hparams

    kinds = ("Data", "Model", "Finetuning", "Generating", "Training")
    classes = [getattr(hparams, f"{kind}Arguments") for kind in kinds]
    return [field.name for each in classes for field in fields(each)]


def template(name: str | None) -> None:
    """LLaMA-Factory has a template of this name; none is derived."""
    from llamafactory.data.template import TEMPLATES

    if name not in (None, *TEMPLATES):
        fail(f"LLaMA-Factory has no template {name}")


def data_sets(settings) -> None:
    """dataset_info.json knows every data set, and no row of a local one is wrong.

    In a process of its own: LLaMA-Factory's converters bring PyTorch along.
    """
    info = ROOT / settings.dataset_dir / "dataset_info.json"
    known = entries.read_info(info)
    named = [settings.dataset, settings.get("eval_dataset") or ""]
    for name in filter(None, ",".join(map(str, named)).split(",")):
        if name.strip() not in known:
            names = ", ".join(known)
            near = entries.meant(name.strip(), known)
            fail(f"there is no data set {name.strip()}: {shown(info)} has {names}{near}")
        question = [name.strip(), "--info", str(info), "--stage", settings.stage, "--brief"]
        if settings.get("media_dir"):
            question += ["--media-dir", settings.media_dir]
        done = subprocess.run([sys.executable, str(HERE / "00_check_data.py"), *question])
        if done.returncode:
            raise SystemExit(done.returncode)


def processes(count: int, dry_run: bool) -> None:
    """Two processes at least, each with a card of its own where the profile computes on cards."""
    if not dry_run:
        need_cards("lf-train-z2", max(2, count))
    if count < 2:
        fail(
            "ZeRO-2 divides gradients and optimizer states between processes: "
            "it needs at least 2, set --processes 2"
        )


def needs_a_gpu(settings, device: str) -> None:
    """No 16-bit training on a CPU, no Triton kernels, and no FSDP by Accelerate."""
    if settings.get("fsdp") and device == "cpu":
        fail("FSDP needs GPUs: on a CPU Accelerate leaves it out, and plain DDP would run (ddp)")
    if settings.get("enable_liger_kernel") and device == "cpu":
        fail("Liger's kernels are written in Triton and need a GPU: leave enable_liger_kernel out")
    half = settings.get("bf16") or settings.get("fp16") or settings.get("pure_bf16")
    if half and device == "cpu":
        fail(
            "training in bf16 or fp16 needs a GPU, and this profile computes on the CPU: "
            "set bf16=false"
        )


def named_stage(settings) -> int:
    """The ZeRO stage of DeepSpeed's JSON that the settings name; 0 where they name none."""
    if not settings.get("deepspeed"):
        return 0
    file = ROOT / settings.deepspeed
    if not file.is_file():
        fail(f"there is no {shown(file)}: `deepspeed` names a JSON file, or is null for none")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        fail(f"{shown(file)} is not valid JSON: {e}")
    return int(content.get("zero_optimization", {}).get("stage", 0))
