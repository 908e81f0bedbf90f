"""The folder that LLaMA-Factory's web UI runs in, with what its page finds there.

    data                                  a link to our data sets: the page looks for this name
    llamaboard_cache/user_config.yaml     its language, model and hub when it opens
    llamaboard_config/lf-train.yaml       the settings of `make lf-train`, for 载入训练参数
    saves/Custom/lora/train_DATE          what it trains

Both YAML files are the page's own: it writes such ones itself (llamafactory/webui/common.py).
"""

import json
from pathlib import Path

import factory

from lab import models

HERE = Path(__file__).resolve().parent
FOLDER = factory.FOLDER / "webui"
# Fields of the page that are called otherwise than the setting, or hold text
NAMES = {"per_device_train_batch_size": "batch_size"}
TEXTS = ("learning_rate", "num_train_epochs", "max_samples")
SLIDERS = (
    *("cutoff_len", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("logging_steps", "warmup_steps", "lora_rank", "lora_alpha"),
)
CHOICES = ("lr_scheduler_type", "lora_target")
# What the page says by fields of other kinds, by itself, or not at all
OTHERWISE = (
    *("stage", "do_train", "model_name_or_path", "dataset_dir", "output_dir", "report_to"),
    *("template", "finetuning_type", "dataset", "bf16", "plot_loss"),
    *("overwrite_output_dir", "overwrite_cache"),
)


def fields(settings: dict) -> dict:
    """{field of the page: value} for settings by LLaMA-Factory's own names.

    What has no field stands in the page's own way out, the JSON of its field 额外参数.
    """
    held = (*TEXTS, *SLIDERS, *CHOICES)
    values = {name: settings[name] for name in held if name in settings}
    values |= {name: str(values[name]) for name in TEXTS if name in values}
    page = {f"train.{NAMES.get(name, name)}": value for name, value in values.items()}
    more = {name: value for name, value in settings.items() if name not in (*held, *OTHERWISE)}
    # The page would run code that lies beside a model's weights, and start 16 processes to
    # tokenize: null is the engine's own default.
    more |= {"trust_remote_code": False, "preprocessing_num_workers": None}
    return page | {
        "top.finetuning_type": settings["finetuning_type"],
        "top.template": settings["template"],
        "train.dataset": settings["dataset"].split(","),
        "train.compute_type": "bf16" if settings["bf16"] else "fp32",
        "train.extra_args": json.dumps(more, ensure_ascii=False),
    }


def write(file: Path, content: dict) -> None:
    import yaml

    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def folder_for(finetune) -> Path:
    """Make the folder for a profile's `finetune`; what a reader has chosen in the page stays."""
    from omegaconf import OmegaConf

    from lab.profile import read_yaml

    FOLDER.mkdir(parents=True, exist_ok=True)
    if not (FOLDER / "data").exists():
        (FOLDER / "data").symlink_to(HERE / "data")

    entry = models.entry(finetune.model)[1]
    model = entry["modelscope" if models.from_modelscope() else "hub"] or finetune.model
    settings = OmegaConf.merge(OmegaConf.load(HERE / "configs/sft_lora.yaml"), finetune.args)
    settings = OmegaConf.to_container(settings) | {"template": entry.get("template", "default")}
    if "package" in entry:  # it needs no download, and can be read
        folder = models.model_folder(finetune.model)
        model = str(folder)
        system = factory.own_system_message(folder)
        settings |= {"default_system": system} if system else {}
    write(FOLDER / "llamaboard_config/lf-train.yaml", {"top.model_path": model} | fields(settings))

    chosen = FOLDER / "llamaboard_cache/user_config.yaml"
    page = {"lang": "zh", "last_model": "Custom", "path_dict": {}, "cache_dir": None}
    page |= read_yaml(chosen) if chosen.is_file() else {}
    # Without this the page undoes USE_MODELSCOPE_HUB=1: it begins with Hugging Face.
    page["hub_name"] = "modelscope" if models.from_modelscope() else "huggingface"
    page["path_dict"].setdefault("Custom", model)
    write(chosen, page)
    return FOLDER
