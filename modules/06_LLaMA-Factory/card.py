"""The folder that is pushed to a hub: the weights, and a README.md (model card) that says of them
what they are, how they were made, how good they are. The card's fields: docs/hub/model-cards of
huggingface.co.
"""

import json
import os
import shutil
from pathlib import Path

from lab import ROOT, models, results

# What of a folder is pushed; not the states of a training, nor what a run has logged
OF_MERGED = ("*.safetensors", "*.json", "*.jinja", "*.txt")
OF_ADAPTER = ("adapter_*", "tokenizer*", "*.jinja")
SETTINGS = (
    *("stage", "finetuning_type", "lora_rank", "lora_alpha", "template", "cutoff_len"),
    *("max_samples", "num_train_epochs", "learning_rate", "lr_scheduler_type"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
)
LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # others have names of their own
SCORES = {"exact": "exact match, %", "field": "fields, %"}


def score_of(adapter: Path) -> dict | None:
    """The record that lf-score has left of this adapter; None where there is none."""
    variant = "" if adapter.name == "lora" else f"-{adapter.name}"
    file = results.FOLDER / f"06_LLaMA-Factory/02_score{variant}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    is_of_it = (ROOT / record["config"]["adapter"]).resolve() == adapter.resolve()
    return record if is_of_it else None


def score_lines(record: dict | None) -> list[str]:
    """The table of a record, each share with its 95 % interval."""
    if not record:
        return ["Not scored yet: `make lf-score`, then `make lf-export` once more."]
    metrics = record["metrics"]
    columns = [name for name in ("base", "tuned") if f"{name}_exact_pct" in metrics]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for measure, label in SCORES.items():
        cells = []
        for name in columns:
            ends = ("_pct", "_low_pct", "_high_pct")
            values = [metrics.get(f"{name}_{measure}{end}") for end in ends]
            cells.append("{} ({} to {})".format(*values))
        if "None" not in cells[0]:
            lines.append(f"| {label} | {' | '.join(cells)} |")
    where = f"{metrics['row_count']} held-out requests of `{record['config']['test']}`"
    lines += ["", f"{where}, with 95 % intervals, in {record['config']['dtype']}; greedy answers."]
    return lines


def text(adapter: Path, name: str, is_merged: bool) -> str:
    """README.md of what was trained in the folder `adapter`; `name` is what it will be called."""
    from huggingface_hub import ModelCardData
    from omegaconf import OmegaConf

    settings = OmegaConf.load(adapter / "config.yaml")
    base = models.served_names(str(ROOT / settings.model_name_or_path))[-1]
    known = models.entry(base)[1]
    licence = known.get("licence", "unknown")
    data_sets = [each.strip() for each in str(settings.dataset).split(",")]
    parts = {part for data_set in data_sets for part in data_set.split("_")}
    front = ModelCardData(
        base_model=known.get("hub", base),
        datasets=data_sets,
        language=sorted(parts & {"en", "zh"}) or None,
        library_name="transformers" if is_merged else "peft",
        license=LICENSES.get(licence, "other"),
        license_name=None if licence in LICENSES else licence.lower().replace(" ", "-"),
        pipeline_tag="text-generation",
    )
    serve = f"vllm serve YOUR_NAME/{name}"
    if not is_merged:
        serve = (
            f"vllm serve {front.base_model} --enable-lora --lora-modules {name}=YOUR_NAME/{name}"
        )
    trained = [f"| `{key}` | {settings[key]} |" for key in SETTINGS if key in settings]
    lines = [
        *("---", front.to_yaml().strip(), "---", "", f"# {name}", ""),
        f"{front.base_model}, fine-tuned with LLaMA-Factory on {', '.join(data_sets)}.",
        *("", "## Scores", "", *score_lines(score_of(adapter)), "", "## Training", ""),
        *("| setting | value |", "|---|---|", *trained, "", "## Serving", ""),
        *("```bash", serve, "```", ""),
        "Ask through the tokenizer's own chat template, as the training did.",
    ]
    return "\n".join(lines) + "\n"


def link(source: Path, target: Path) -> None:
    """The same file under another name where the disk can do that, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write(folder: Path, source: Path, card: str, is_merged: bool) -> None:
    """`folder`: what of `source` is pushed, and the card. Written beside and renamed."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in OF_MERGED if is_merged else OF_ADAPTER:
        for file in source.glob(pattern):
            link(file, partial / file.name)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
