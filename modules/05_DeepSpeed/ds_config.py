"""A DeepSpeed configuration file: read, and filled as transformers' Trainer fills it.

What is wrong in it and can be seen without DeepSpeed is one sentence and exit code 2 here; what
only DeepSpeed knows, in ds_check.py.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

from lab import fail, shown

SECTIONS = {
    "zero_optimization": '{"stage": 2}',
    "bf16": '{"enabled": true}',
    "fp16": '{"enabled": true}',
    "optimizer": '{"type": "AdamW", "params": {"lr": "auto"}}',
    "scheduler": '{"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}',
}
# Other parts of a file that are objects, of which DeepSpeed would say "object has no attribute".
OBJECTS = {
    *("aio", "activation_checkpointing", "flops_profiler", "comms_logger", "tensorboard", "wandb"),
    *("csv_monitor", "comet", "data_types", "checkpoint", "elasticity", "autotuning", "compile"),
    *("torch_autocast", "tensor_parallel", "timers", "data_efficiency", "pipeline"),
    *("hybrid_engine", "expert_parallel"),
}
MONITORS = {"tensorboard", "wandb", "csv_monitor", "comet"}  # their texts are names of all kinds


def leaves(value, path: tuple[str, ...] = ()):
    """(path, value) of everything in `value` that is no dictionary and no list."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part, path)
    else:
        yield path, value


def unquoted(text) -> str:
    """What a text that stands for a boolean or a number should be; "" where it is a real text."""
    if not isinstance(text, str):
        return ""
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        return text if math.isfinite(float(text)) else ""
    except ValueError:
        return ""


class Config:
    """The settings of one file. `values`: what DeepSpeed gets, whole after `settle` and `fill`."""

    def __init__(self, file: Path):
        self.file = file
        if not file.is_file():
            fail(
                f"there is no DeepSpeed configuration {shown(file)}: those here are "
                "ds_config.json and configs/*.json of modules/05_DeepSpeed"
            )
        try:
            text = file.read_text(encoding="utf-8")
            pairs = {"object_pairs_hook": self.once_each, "parse_constant": self.no_number}
            self.values = json.loads(text, **pairs)
        except json.JSONDecodeError as e:
            self.refuse(f"not valid JSON at line {e.lineno}, column {e.colno}: {e.msg}")
        except UnicodeDecodeError:
            self.refuse("it is not UTF-8 text: save it as UTF-8")
        if not isinstance(self.values, dict):
            self.refuse("it must be an object of keys and values, such as {}")
        self.refuse_shapes()
        self.zero = self.values.setdefault("zero_optimization", {})
        self.stage = self.zero.setdefault("stage", 0)
        self.refuse_stage()

    def refuse(self, problem: str):
        fail(f"{shown(self.file)}: {problem}")

    def once_each(self, pairs: list[tuple[str, object]]) -> dict:
        """An object of the file; DeepSpeed, too, refuses a key that stands there twice."""
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                self.refuse(f"{key} stands there twice: take one out")
        return dict(pairs)

    def no_number(self, name: str):
        """NaN and Infinity, which Python reads and DeepSpeed takes."""
        self.refuse(f"not valid JSON: {name} is no number of it; where null is meant, write null")

    # -----------------------------------------------------------------------------
    # Without DeepSpeed: what can be seen at once

    def refuse_shapes(self) -> None:
        """Sections that are no objects, and booleans and numbers in quotation marks."""
        examples = SECTIONS | dict.fromkeys(OBJECTS, "{}")
        for name, example in examples.items():
            value = self.values.get(name, {})
            if not isinstance(value, dict):
                self.refuse(f"{name} is {json.dumps(value)}: write an object, such as {example}")
        for name in ("offload_optimizer", "offload_param"):
            value = self.values.get("zero_optimization", {}).get(name, {})
            if not isinstance(value, dict | None):
                example = '{"device": "cpu"}'
                self.refuse(f"{name} is {json.dumps(value)}: write an object, such as {example}")
        for name in ("optimizer", "scheduler"):
            if not isinstance(self.values.get(name, {}).get("params", {}), dict):
                self.refuse(f"{name}.params must be an object, such as {{}}")
        for path, value in leaves(self.values):
            right = unquoted(value)
            if right and path and path[0] not in MONITORS:
                key = ".".join(path)
                self.refuse(f'{key} is the text "{value}": write {right}, without quotation marks')
        if "bfloat16" in self.values:  # its old name, which DeepSpeed reads where bf16 is absent
            if "bf16" in self.values:
                self.refuse("bfloat16 is the old name of bf16, which is there too: take one out")
            self.values["bf16"] = self.values.pop("bfloat16")
            self.refuse_shapes()

    def refuse_stage(self) -> None:
        """A stage that does not exist, and options that the stage does not read."""
        if type(self.stage) is not int or not 0 <= self.stage <= 3:
            self.refuse(f"zero_optimization.stage is {json.dumps(self.stage)}: write 0, 1, 2 or 3")
        offload = self.zero.get("offload_optimizer") or {}
        if self.stage in (1, 2) and offload.get("device") == "nvme":
            self.refuse(
                f"at stage {self.stage} DeepSpeed keeps in host memory what offload_optimizer "
                'moves, whatever its device: write "device": "cpu", or "stage": 3'
            )
        for key in self.zero:
            least = 0
            if key.startswith("stage3_") or key == "sub_group_size" or self.offloads(key, "param"):
                least = 3
            elif self.offloads(key, "optimizer"):
                least = 1
            if self.stage < least:
                self.refuse_without_effect(key, least)

    def refuse_without_effect(self, key: str, least: int) -> None:
        self.refuse(
            f"zero_optimization.{key} has no effect at stage {self.stage}: take it out, or write "
            f'"stage": {least}'
        )

    def offloads(self, key: str, what: str) -> bool:
        """Whether this key of zero_optimization moves `what` (optimizer, param) off the device."""
        value = self.zero.get(key)
        if key == f"offload_{what}":
            return isinstance(value, dict) and value.get("device", "none") != "none"
        old = {"optimizer": "cpu_offload", "param": "cpu_offload_param"}
        return key == old[what] and value is True

    def chosen(self, section: dict, key: str, flag):
        """What the file or the command line says; None where both leave it open."""
        fixed = section.get(key, "auto")
        if fixed == "auto":
            return flag
        if flag not in (None, fixed):
            self.refuse(
                f"{key} is {fixed}, the command line says {flag}: change one of them, or write "
                '"auto" in the file'
            )
        return fixed

    def settle(self, args, train, world: int) -> None:
        """Batch, learning rate, optimizer and type.

        From the file, else the command line, else `train`, the profile's.
        """
        self.settle_batch(args, train, world)
        self.settle_optimizer(args, train)
        self.settle_type(train)

    def count(self, key: str, flag: int | None = None) -> int | None:
        """A whole number of the file or the command line; None where both leave it open."""
        number = self.chosen(self.values, key, flag)
        if number is not None and (type(number) is not int or number < 1):
            self.refuse(f"{key} is {json.dumps(number)}: write a whole number above 0")
        return number

    def settle_batch(self, args, train, world: int) -> None:
        """train_batch_size = micro-batch x accumulation x processes; any of them may be open."""
        total = self.count("train_batch_size")
        micro_batch = self.count("train_micro_batch_size_per_gpu", args.micro_batch)
        accumulate = self.count("gradient_accumulation_steps", args.accumulate)
        # Where the total is given: DeepSpeed's own rules for what is missing.
        if total and not micro_batch:
            accumulate = accumulate or 1
            micro_batch = total // (accumulate * world)
        elif total and not accumulate:
            accumulate = total // (micro_batch * world)
        self.micro_batch = micro_batch or train.micro_batch
        self.accumulate = accumulate or train.accumulate
        self.step_blocks = self.micro_batch * self.accumulate * world
        if total not in (None, self.step_blocks):
            self.refuse(
                f"train_batch_size is {total}, but micro-batch {self.micro_batch} x accumulation "
                f"{self.accumulate} x {world} processes = {self.step_blocks}: correct one of "
                "them, or leave train_batch_size out"
            )
        self.values["train_batch_size"] = self.step_blocks
        self.values["train_micro_batch_size_per_gpu"] = self.micro_batch
        self.values["gradient_accumulation_steps"] = self.accumulate

    def settle_optimizer(self, args, train) -> None:
        """AdamW where the file names none, as the Trainer does, and its learning rate."""
        if "optimizer" not in self.values:
            params = {"betas": "auto", "eps": "auto", "weight_decay": "auto"}
            if not any(self.offloads(key, "optimizer") for key in self.zero):
                params["torch_adam"] = True  # PyTorch's; offloaded, it is DeepSpeed's own
            self.values["optimizer"] = {"type": "AdamW", "params": params}
        optimizer = self.values["optimizer"]
        if not isinstance(optimizer.get("type"), str):
            self.refuse('the optimizer has no type: write "type": "AdamW"')
        params = optimizer.setdefault("params", {})
        rate = self.chosen(params, "lr", args.learning_rate)
        schedule = self.values.get("scheduler", {}).get("params", {})
        peak = self.chosen(schedule, "warmup_max_lr", args.learning_rate)  # overrides the other
        rate = peak if rate is None else rate
        self.learning_rate = train.learning_rate if rate is None else rate
        if type(self.learning_rate) not in (int, float) or not 0 < self.learning_rate < math.inf:
            self.refuse(
                f"optimizer.params.lr is {json.dumps(self.learning_rate)}: the learning rate "
                "must be a number above 0"
            )
        params["lr"] = self.learning_rate

    def settle_type(self, train) -> None:
        """bf16 and fp16; where neither is said, the profile's type."""
        bf16 = self.values.setdefault("bf16", {"enabled": "auto"})
        fp16 = self.values.setdefault("fp16", {"enabled": False})
        if fp16.get("enabled") == "auto":
            fp16["enabled"] = train.dtype == "float16"
        if bf16.get("enabled", "auto") == "auto":
            bf16["enabled"] = train.dtype == "bfloat16" and not fp16.get("enabled")
        for name, section in (("bf16", bf16), ("fp16", fp16)):
            enabled = section.get("enabled", False)
            if type(enabled) is not bool:
                right = 'write true, false or "auto"'
                self.refuse(f"{name}.enabled is {json.dumps(enabled)}: {right}")
        if bf16["enabled"] and fp16.get("enabled"):
            self.refuse("bf16 and fp16 are both enabled: write false in one of them")
        self.dtype = "float32"
        if bf16["enabled"] or fp16.get("enabled"):
            self.dtype = "bfloat16" if bf16["enabled"] else "float16"

    # -----------------------------------------------------------------------------
    # With transformers

    def fill(self, steps: int, model):
        """Replace every "auto" by transformers' own rules; `model`: transformers' config of it.

        Returns what must live as long as the training: while it does, from_pretrained divides a
        stage 3 model as it loads it.
        """
        import dataclasses

        from transformers import TrainingArguments
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        trainer = SimpleNamespace(**defaults | {"learning_rate": self.learning_rate})
        trainer.world_size = self.step_blocks // (self.micro_batch * self.accumulate)
        trainer.per_device_train_batch_size = self.micro_batch
        trainer.gradient_accumulation_steps = self.accumulate
        trainer.bf16 = self.dtype == "bfloat16"
        trainer.fp16 = self.dtype == "float16"
        trainer.warmup_steps = 1  # the Trainer's 0 is refused by DeepSpeed's schedulers
        trainer.get_warmup_steps = lambda _: trainer.warmup_steps
        filled = HfTrainerDeepSpeedConfig(self.values)
        filled.trainer_config_process(trainer)
        # What the file itself fixes is right: `settle` has judged it.
        filled.mismatches.clear()
        schedule = self.values.get("scheduler", {}).get("params", {})
        if schedule.get("warmup_num_steps", "auto") != "auto":
            trainer.warmup_steps = schedule["warmup_num_steps"]
        if schedule.get("total_num_steps", "auto") != "auto":
            steps = schedule["total_num_steps"]
        shape = SimpleNamespace(config=model)
        try:
            filled.trainer_config_finalize(trainer, shape, steps)
        except ValueError as e:  # a model that does not say its hidden size
            self.refuse(" ".join(str(e).split()))
        # Accelerate fills this one.
        filled.fill_only("zero_optimization.stage3_gather_16bit_weights_on_model_save", False)
        self.values = filled.config
        self.zero = self.values["zero_optimization"]
        return filled
