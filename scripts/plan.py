"""What fits on which cards, before anything is downloaded: memory of serving, training and image
editing by arithmetic (lab/planner).

    python scripts/plan.py                                                     # this repository's own recipes on 2 x 24 GB: make plan
    python scripts/plan.py serve --model qwen2.5-14b-instruct --gpus 2 --tp 2 --max-model-len 8192
    python scripts/plan.py train --model qwen2.5-7b-instruct --gpus 2 --method qlora --seq-len 2048 --checkpointing
    python scripts/plan.py image-edit --model qwen-image-edit --gpus 2 --recipe fp8 --json

Look at: the verdict, what is left over, and, where it does not fit, the cheapest change that does.
No GPU is needed, no engine is imported, and nothing is downloaded when --model is a folder, a
config.json or a name of configs/models.yaml.
"""

import argparse
import os
from dataclasses import asdict, fields, replace
from typing import NamedTuple

from lab import ROOT, fail, machine, models, results
from lab.planner import config, constants, serving, speed, training, weights
from lab.planner.config import Model
from lab.planner.serving import Serving
from lab.planner.training import Training

FP8 = (8, 9)  # compute capability from which on tensor cores multiply FP8
GPU_PROFILES = {"4090x1": 1, "4090x2": 2}  # cards that they take
TWO_4090S = {"gpus": 2, "gpu_memory_gib": constants.CARD_GIB, "cards": (speed.CARD,), "fp8": True}


def here() -> dict:
    """The cards of this machine that its GPU profile takes, or RTX 4090s where there are none; and
    that profile.

    gpus, gpu_memory_gib as CUDA sees it (of the smallest), cards (their names), fp8 (whether they
    multiply it).
    """
    profile = os.environ.get("PROFILE", "")
    if profile not in GPU_PROFILES:
        profile = "4090x1" if len(machine.gpus()) == 1 else "4090x2"
    gpus = GPU_PROFILES[profile]
    taken = machine.gpus()[:gpus]
    if not taken:
        return TWO_4090S | {"gpus": gpus, "profile": profile}
    sizes = [min(gpu["cuda_gib"], machine.memory_cap_gib() or gpu["cuda_gib"]) for gpu in taken]
    return {
        "profile": profile,
        "gpus": gpus,
        "gpu_memory_gib": min(sizes),
        "cards": tuple(dict.fromkeys(machine.short(gpu["name"]) for gpu in taken)),
        "fp8": all(tuple(gpu["capability"]) >= FP8 for gpu in taken),
    }


def numbers(kind, low, words: str):
    """A type for argparse: a number of `kind` that is at least `low`."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value < 1e12:
            fail(f"{words}, it is {text}")
        return value

    return read


count = numbers(int, 1, "a count must be a whole number of at least 1")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One sentence, as everywhere in this repository."""
        fail(message)


def parser(here: dict) -> argparse.ArgumentParser:
    whole = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = whole.add_subparsers(dest="task", metavar="serve|train|image-edit")
    cards = Parser(add_help=False)
    cards.add_argument(
        "--gpus", type=count, default=here["gpus"], help="cards (default: %(default)s)"
    )
    cards.add_argument("--gpu-memory-gib", type=numbers(float, 0.1, "memory must be at least 0.1 GiB"), default=here["gpu_memory_gib"],
                       help=f"of one card as CUDA sees it (default: %(default)s, as an {' and an '.join(here['cards'])})")  # fmt: skip
    cards.set_defaults(cards=here["cards"], fp8=here["fp8"])
    cards.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    serve = tasks.add_parser("serve", parents=[cards], help="vLLM")
    train = tasks.add_parser("train", parents=[cards], help="full, LoRA or QLoRA fine-tuning")
    edit = tasks.add_parser("image-edit", parents=[cards], help="Qwen-Image-Edit")
    for task in (serve, train, edit):
        task.add_argument(
            "--model",
            required=task is not edit,
            default="qwen-image-edit",
            help="name in configs/models.yaml, hub id, folder or config.json",
        )
    serve.add_argument("--gpu-memory-utilization", type=numbers(float, 0.01, "--gpu-memory-utilization is a share of the card, above 0 and at most 1"),
                       help="share of the card that vLLM takes (default: 0.9, or less where CUDA graphs and NCCL would not fit beside it)")  # fmt: skip
    serve.add_argument(
        "--tp",
        type=count,
        help="tensor parallel size (default: as many cards as --pp leaves and the heads allow)",
    )
    serve.add_argument("--pp", type=count, default=1, help="pipeline parallel size")
    serve.add_argument(
        "--dtype", choices=["auto", *constants.LINEAR_BYTES], default="auto", help="of the weights"
    )
    serve.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    serve.add_argument(
        "--max-model-len",
        type=count,
        help="tokens of the longest request (default: the model's own limit)",
    )
    serve.add_argument(
        "--concurrency", type=count, default=1, help="requests of that length to hold at once"
    )
    serve.add_argument("--max-num-seqs", type=count, default=256)
    serve.add_argument("--max-num-batched-tokens", type=count, default=2048)
    serve.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    train.add_argument("--method", choices=["full", "lora", "qlora"], default="full")
    train.add_argument(
        "--engine",
        choices=["ddp", "fsdp", "deepspeed"],
        help="(default: deepspeed with --zero 1 to 3, else ddp)",
    )
    train.add_argument("--zero", type=int, choices=range(4), default=0)
    train.add_argument(
        "--offload", choices=["none", "optimizer", "optimizer+param"], default="none"
    )
    train.add_argument("--offload-device", choices=["cpu", "nvme"], default="cpu")
    train.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of the computation (default: %(default)s, mixed precision)",
    )
    train.add_argument(
        "--seq-len", type=count, default=1024, help="tokens of a sequence (default: %(default)s)"
    )
    train.add_argument(
        "--micro-batch",
        type=count,
        default=1,
        help="sequences of one card and micro-step (default: %(default)s)",
    )
    train.add_argument(
        "--accumulate",
        type=count,
        default=1,
        help="micro-steps of one optimizer step (default: %(default)s)",
    )
    train.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep only the layers' inputs, compute the rest again",
    )
    train.add_argument(
        "--host-memory-gib",
        type=numbers(float, 0.1, "memory must be at least 0.1 GiB"),
        help="of the host (default: not checked)",
    )
    train.add_argument(
        "--bucket",
        type=numbers(float, 1, "a bucket has at least 1 element"),
        default=1e8,
        help="reduce_bucket_size, elements (default: %(default)g)",
    )
    train.add_argument("--lora-rank", type=count, default=16)
    edit.add_argument(
        "--recipe",
        default="plain",
        help="plain (bf16), fp8, nf4, gguf, model-offload, group-offload, sequential-offload (default: %(default)s)",
    )
    edit.add_argument(
        "--size", type=count, default=1024, help="pixels of a side (default: %(default)s)"
    )
    return whole


def parse(words: list[str] | None = None, here: dict = TWO_4090S) -> argparse.Namespace:
    """A command line of this script; what it does not say of the cards is as in `here`."""
    args = parser(here).parse_args(words)
    if args.task == "serve":
        model = config.read(models.config(args.model), args.model)
        args.tp = args.tp or max(
            n for n in range(1, max(1, args.gpus // args.pp) + 1) if serving.splits(model, n)
        )
        args.max_model_len = args.max_model_len or model.max_len
    if args.task == "train":
        args.engine = args.engine or ("deepspeed" if args.zero or args.offload != "none" else "ddp")
    return args


# -----------------------------------------------------------------------------
# The three tasks: a plan, and the cheapest change that makes it fit


def setup_of(args: argparse.Namespace) -> Serving | Training:
    """What the arguments ask lab.planner for, by its own names."""
    kind = Serving if args.task == "serve" else Training
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def fits(model: Model, setup: Serving | Training) -> bool:
    plan_of = serving.serve if isinstance(setup, Serving) else training.train
    return plan_of(model, setup).fits


def plan(args: argparse.Namespace) -> dict:
    """The plan of a parsed command line, `suggestion` and predicted speed included."""
    if args.task == "image-edit":
        return image_edit(args)
    model = config.read(models.config(args.model), args.model)
    setup = setup_of(args)
    plan_of = serving.serve if args.task == "serve" else training.train
    answer = asdict(plan_of(model, setup))
    if answer.get("nvme_gib") is None:
        answer.pop("nvme_gib", None)
    answer["suggestion"] = "" if answer["fits"] else suggestion(model, args, answer)
    if answer["fits"] and args.task == "train":
        answer["max_micro_batch"] = most(
            lambda number: fits(model, replace(setup, micro_batch=number)), setup.micro_batch
        )
        answer["max_seq_len"] = most(
            lambda tokens: fits(model, replace(setup, seq_len=tokens)), setup.seq_len
        )
    answer["parameters"] = weights.parameters(model)
    answer["predicted_speed"] = predicted(model, args)
    answer["notes"] = fp8_notes(model, args, answer["suggestion"])
    return answer


def fp8_notes(model: Model, args: argparse.Namespace, suggestion: str) -> list[str]:
    """What FP8 means on these cards, where the plan has some. Source: vllm/platforms/cuda.py,
    backends' supports_kv_cache_dtype.
    """
    name = " + ".join(args.cards)
    notes = []
    if not args.fp8 and (args.dtype == "fp8" or model.stored == "fp8" or "dtype fp8" in suggestion):
        notes.append(
            f"{name} multiplies no FP8: weights of 8 bits save memory, and are computed with in 16"
        )
    if getattr(args, "kv_dtype", "") == "fp8" or "kv-dtype fp8" in suggestion:
        way = "add --attention-backend TRITON_ATTN" if args.fp8 else "leave --kv-cache-dtype out"
        notes.append(
            f"except on Hopper, vLLM reads an FP8 cache by FlashInfer, which nvcc compiles: without a CUDA toolkit, {way}"
        )
    return notes


def most(fits, value: int) -> int:
    """The largest number that still fits, from `value`, which does; a million at most."""
    top = value
    while top < 1_000_000 and fits(2 * top):
        top *= 2
    low, high = top, 2 * top
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Change(NamedTuple):
    """A flag of this command that something could fit with; costs order the changes, no more."""

    cost: float
    option: str
    value: object

    @property
    def flag(self) -> str:
        name = f"--{self.option.replace('_', '-')}"
        return name if self.value is True else f"{name} {self.value}"


def halved(option: str, value: int, least: int) -> list[Change]:
    """Half of `value`, a quarter ... down to a 32nd, but no less than `least`."""
    smaller = [(2 + times, value // 2**times) for times in range(1, 6)]
    return [Change(cost, option, part) for cost, part in smaller if part >= least]


def serve_changes(model: Model, setup: Serving, plan: dict, fp8: bool) -> list[list[Change]]:
    """What to try when a server does not fit: a list for each option."""
    larger = range(setup.tp + 1, setup.gpus // setup.pp + 1)
    groups = [tp for tp in larger if serving.splits(model, tp)]
    asked = setup.gpu_memory_utilization
    shares = [share for share in (0.95, *serving.UTILIZATIONS) if asked and share != asked]
    held = max(1, plan["kv_tokens"] // setup.max_model_len)  # requests that the cache does hold
    bytes_now = constants.LINEAR_BYTES[model.stored if setup.dtype == "auto" else setup.dtype]
    smaller = [
        Change(cost, "dtype", dtype)
        for cost, dtype in ((8, "fp8"), (10, "int4"))
        if constants.LINEAR_BYTES[dtype] < bytes_now
    ]
    return [
        [Change(1, "tp", groups[-1])] if groups else [],
        [Change(1, "gpu_memory_utilization", share) for share in shares],
        [Change(2, "concurrency", held)] if setup.concurrency > 1 else [],
        [Change(2, "kv_dtype", "fp8")] if setup.kv_dtype != "fp8" and fp8 else [],
        halved("max_model_len", setup.max_model_len, 1024),
        smaller,
    ]


def train_changes(setup: Training) -> list[list[Change]]:
    """What to try when a training does not fit: a list for each option."""
    batches = [(1 + times / 10, setup.micro_batch // 2**times) for times in range(1, 6)]
    changes = [
        [] if setup.checkpointing else [Change(1, "checkpointing", True)],
        [Change(cost, "micro_batch", batch) for cost, batch in batches if batch],
        halved("seq_len", setup.seq_len, 512),
        [Change(1, "dtype", "bfloat16")] if setup.dtype == "float32" else [],
    ]
    if setup.full and setup.engine != "fsdp":
        if setup.gpus > 1:
            changes.append([Change(z, "zero", z) for z in (1, 2, 3) if z > setup.zero])
        if not setup.offloads:
            offloads = ((5, "optimizer"), (7, "optimizer+param"))
            changes.append([Change(cost, "offload", where) for cost, where in offloads])
    lora = Change(12, "method", "lora")
    qlora = Change(14, "method", "qlora")
    changes.append({"full": [lora, qlora], "lora": [qlora], "qlora": []}[setup.method])
    return changes


def combinations(options: list[list[Change]]) -> list[tuple[Change, ...]]:
    """Every choice of at most one change of each option, the cheapest and shortest first."""
    chosen = [()]
    for changes in reversed(options):
        chosen += [(change, *others) for change in changes for others in chosen]
    return sorted(chosen, key=lambda some: (sum(change.cost for change in some), len(some)))


def changed(setup: Serving | Training, chosen: tuple[Change, ...]) -> Serving | Training | None:
    """`setup` with these changes; None where no engine does that together."""
    new = replace(setup, **{change.option: change.value for change in chosen})
    if isinstance(new, Serving):
        return new
    options = {change.option for change in chosen}
    if "method" in options and options & {"zero", "offload"}:
        return None
    if new.offloads and new.zero < (3 if new.offloads_parameters else 1):
        return None
    if new.zero or new.offloads:
        return replace(new, engine="deepspeed")
    return new


def suggestion(model: Model, args: argparse.Namespace, plan: dict) -> str:
    """The cheapest combination of changes that fits, as flags of this command; a sentence where
    none does.
    """
    setup = setup_of(args)
    if args.task == "serve":
        options = serve_changes(model, setup, plan, args.fp8)
    else:
        options = train_changes(setup)
    for chosen in combinations(options):
        new = changed(setup, chosen)
        if chosen and new and fits(model, new):
            return " ".join(change.flag for change in chosen)
    return "nothing the planner knows makes it fit: take a smaller model, or more or larger cards"


def predicted(model: Model, args: argparse.Namespace) -> dict:
    """Bounds of the speed on cards like those here (lab/planner/speed.py); {} where nobody says how
    fast they are.
    """
    cluster = speed.nominal(args.gpus, args.cards)
    if cluster is None:
        return {}
    if args.task == "train":
        bounds = speed.train(model, setup_of(args), cluster)._asdict()
    else:
        tokens = min(1024, args.max_model_len)
        split = {"tp": args.tp, "dtype": args.dtype}
        cache = {"kv_dtype": args.kv_dtype, "batch": args.concurrency, "context": tokens}
        bounds = speed.decode(model, cluster, **split, **cache)._asdict()
        bounds |= speed.prefill(model, cluster, **split, tokens=tokens)._asdict()
    digits = {name: 4 if name.endswith("ratio") else 2 for name in bounds}
    return {
        name: round(value, digits[name]) if isinstance(value, float) else value
        for name, value in bounds.items()
    }


def image_edit(args: argparse.Namespace) -> dict:
    """The recipes of modules/02_qwen_image_edit/recipes.py on these cards."""
    import runpy
    from pathlib import Path

    module = runpy.run_path(str(ROOT / "modules/02_qwen_image_edit/recipes.py"))
    recipes = module["RECIPES"] | module["PLANNED"]
    if args.recipe not in recipes:
        fail(f"unknown recipe {args.recipe}: choose one of {', '.join(recipes)}")
    if Path(args.model).is_dir():
        tensors = module["tensors_of"](Path(args.model))
    elif models.entry(args.model)[0] == "qwen-image-edit":
        tensors = module["published"]()
    else:
        fail(
            f"{args.model} is no image editing model that the planner knows: give qwen-image-edit, or the folder of a QwenImageEditPipeline"
        )
    usable = args.gpu_memory_gib - constants.CONTEXT / constants.GIB

    def lacks(recipe: str) -> bool:
        need = module["needs"](recipe, tensors, args.size)
        return any(
            gib > usable or int(place[5:]) >= args.gpus
            for place, gib in need.items()
            if place != "host"
        )

    need = module["needs"](args.recipe, tensors, args.size)
    cards = {place: round(gib, 2) for place, gib in need.items() if place != "host"}
    fullest = max(cards, key=cards.get)
    lying = {
        c: module["stored_gib"](tensors[c], how) * constants.GIB
        for c, (_, how) in recipes[args.recipe].items()
    }
    places = {c: where for c, (where, _) in recipes[args.recipe].items()}
    weights = sum(lying[c] for c in places if places[c] == fullest) + max(
        (lying[c] for c in places if places[c] == "in turn"), default=0
    )
    parts = {
        "weights": weights,
        "working_memory": cards[fullest] * constants.GIB - weights,
        "cuda_context": constants.CONTEXT,
    }
    parts = {name: round(value, 2) for name, value in constants.gib(parts).items()}
    better = next(
        (f"--recipe {r}" for r in recipes if not lacks(r)),
        "nothing the planner knows makes it fit: take larger cards",
    )
    found = {
        "fits": not lacks(args.recipe),
        "per_gpu_gib": parts,
        "cards_gib": cards,
        "host_gib": round(need["host"], 1),
    }
    return found | {"suggestion": better if lacks(args.recipe) else ""}


# -----------------------------------------------------------------------------
# This repository's own recipes, as the planner's command lines


def recipes(name: str = "4090x2") -> dict[str, tuple[str, str]]:
    """{what a reader types: (file it is written in, the planner's command line)} of a GPU profile
    and of modules/*/configs.

    A line that asks for more cards than the profile takes is there too: its --gpus says so.
    """
    import json

    from lab.profile import read_yaml

    def read(name) -> dict:
        file = ROOT / name
        return (
            json.loads(file.read_text(encoding="utf-8"))
            if file.suffix == ".json"
            else read_yaml(file)
        )

    here = f"configs/profiles/{name}.yaml"
    profile, found = read(here), {}
    servers = {
        command: (here, profile[name]["model"], profile[name]["args"])
        for name, command in (("serve", "make vllm-serve"), ("throughput", "make vllm-throughput"))
    }
    for file in sorted((ROOT / "modules/03_vllm/configs/recipes").glob("*.yaml")):
        recipe = read(file)
        servers[f"make vllm-serve RECIPE={file.stem}"] = (
            file.relative_to(ROOT).as_posix(),
            recipe.pop("model", profile["serve"]["model"]),
            profile["serve"]["args"] | recipe,
        )
    for command, (file, model, args) in servers.items():
        flags = {
            k: v
            for k, v in args.items()
            if k in ("gpu-memory-utilization", "max-model-len", "dtype")
        } | {"tp": args.get("tensor-parallel-size", 1)}
        flags |= {"dtype": args["quantization"]} if "quantization" in args else {}
        found[command] = (
            file,
            f"serve --model {model} --gpus {max(profile['requires']['gpus'], flags['tp'])} "
            + " ".join(f"--{k} {v}" for k, v in flags.items()),
        )
    t = profile["train"]
    steps = f"--micro-batch {t['micro_batch']} --seq-len {t['seq_len']} --accumulate {{}} --dtype {t['dtype']}"
    found["make train-one"] = (here, f"train --model {t['model']} --gpus 1 " + steps.format(2))
    found["make train-ddp"] = (
        here,
        f"train --model {t['model']} --gpus 2 " + steps.format(t["accumulate"]),
    )
    for file in sorted((ROOT / "modules/04_Accelerate/configs").glob("*.yaml")):
        launcher = read(file)
        kind = launcher["distributed_type"]
        engine = {
            "MULTI_GPU": "ddp",
            "FSDP": "fsdp",
            "DEEPSPEED": f"deepspeed --zero {launcher.get('deepspeed_config', {}).get('zero_stage', 0)}",
        }[kind]
        found[f"make train-accelerate CONFIG={file.stem}"] = (
            f"modules/04_Accelerate/configs/{file.name}",
            f"train --model {t['model']} --gpus 2 --engine {engine} "
            + steps.format(t["accumulate"]),
        )
    for target, file in [
        *((f"train-z{z}", f"configs/z{z}.json") for z in range(4)),
        ("train-z2-offload", "ds_config.json"),
    ]:
        config = read(f"modules/05_DeepSpeed/{file}")
        zero = config["zero_optimization"]
        model = profile["zero"]["model"] if zero["stage"] else t["model"]
        accumulate = (
            config["gradient_accumulation_steps"]
            if config["gradient_accumulation_steps"] != "auto"
            else t["accumulate"]
        )
        where = (
            "+".join(
                k.removeprefix("offload_")
                for k in ("offload_optimizer", "offload_param")
                if k in zero
            )
            or "none"
        )
        line = f"train --model {model} --gpus 2 --engine deepspeed --zero {zero['stage']} --offload {where} --bucket {zero.get('reduce_bucket_size', 5e8):g} "
        found[f"make {target}"] = (f"modules/05_DeepSpeed/{file}", line + steps.format(accumulate))
    for file, target in (("sft_lora.yaml", "lf-train"), ("sft_lora_z2.yaml", "lf-train-z2")):
        c = read(f"modules/06_LLaMA-Factory/configs/{file}")
        method = "qlora" if c.get("quantization_bit") == 4 else c["finetuning_type"]
        line = f"train --model {c['model_name_or_path']} --method {method} --lora-rank {c['lora_rank']} --seq-len {c['cutoff_len']}"
        line += f" --micro-batch {c['per_device_train_batch_size']} --accumulate {c['gradient_accumulation_steps']}"
        line += "" if c.get("disable_gradient_checkpointing") else " --checkpointing"
        zero = read(c["deepspeed"])["zero_optimization"]["stage"] if "deepspeed" in c else 0
        found[f"make {target}"] = (
            f"modules/06_LLaMA-Factory/configs/{file}",
            line + (f" --gpus 2 --engine deepspeed --zero {zero}" if zero else " --gpus 1"),
        )
    file = "modules/06_LLaMA-Factory/configs/infer.yaml"
    c = read(file)
    found["make lf-chat"] = (
        file,
        f"serve --model {c['model_name_or_path']} --gpus {profile['requires']['gpus']} --dtype {c['infer_dtype']} --tp 1 --max-model-len 4096",
    )
    e = profile["image_edit"]
    found["make image-edit"] = (
        here,
        f"image-edit --model {e['model']} --gpus {profile['requires']['gpus']} --recipe {e['recipe']} --size {e['size']}",
    )
    return found


# -----------------------------------------------------------------------------
# Words for people


def left_over(found: dict) -> str:
    """What a plan leaves, in the task's own terms."""
    if "kv_tokens" in found:
        return f"{found['kv_tokens']:,} KV tokens = {found['max_concurrency']:g} requests of {found['max_model_len']:,}"
    if "max_micro_batch" in found:
        return f"micro-batch up to {found['max_micro_batch']:,}, or {found['max_seq_len']:,} tokens; host {found['host_gib']:g} GiB"
    return f"host {found['host_gib']:g} GiB"


def show(args: argparse.Namespace, found: dict) -> None:
    print(
        f"{args.task} {args.model} on {args.gpus} x {args.gpu_memory_gib:g} GiB"
        + (f", {found['parameters'] / 1e9:.2f} B parameters" if "parameters" in found else "")
    )
    print(
        f"\n  GiB on {'the fullest card' if args.gpus > 1 else 'the card'}"
        + (f", {found['moment']}" if "moment" in found else "")
    )
    for name, value in found["per_gpu_gib"].items():
        print(f"    {name.replace('_', ' '):22}{value:8.2f}")
    if "kv_tokens" in found:
        print(
            f"  vLLM takes {found['budget_gib']} (--gpu-memory-utilization {found['gpu_memory_utilization']:g}); its cache holds {left_over(found)} tokens"
        )
    parts = [
        f"{name.replace('_', ' ')} {value:.1f}"
        for name, value in found.get("host_parts_gib", {}).items()
        if name != "total" and value
    ]
    print(
        f"  host memory             {found['host_gib']:8.1f}"
        + (f" = {' + '.join(parts)}" if len(parts) > 1 else "")
    )
    if "nvme_gib" in found:
        print(f"  NVMe (nobody has run it){found['nvme_gib']:8.1f}")
    if "max_micro_batch" in found:
        print(f"  left over: {left_over(found).split(';')[0]} a sequence")
    for note in found.get("notes", []):
        print(f"  {note}")
    if speeds := found.get("predicted_speed"):
        print(
            f"  predicted bounds on {' + '.join(args.cards)}s: "
            + ", ".join(
                f"{k} {v:,}" if isinstance(v, float) else f"{k} {v}" for k, v in speeds.items()
            )
        )
    elif speeds == {}:
        print(f"  no predicted bounds: configs/cards.yaml has no {' + '.join(args.cards)}")
    print(
        "\nfits"
        if found["fits"]
        else f"\ndoes not fit; the cheapest change that does: {found['suggestion']}"
    )


def table() -> None:
    """What of this repository fits the cards here, and why: a line for each recipe."""
    cards = here()
    title = f"this repository on {cards['gpus']} x {' + '.join(cards['cards'])}"
    print(f"{title:44} {'GiB on a card':>13}  {'most of it':42} left over")
    for command, (_, line) in recipes(cards["profile"]).items():
        args = parse(line.split(), cards)
        if args.gpus > cards["gpus"]:
            print(f"{command:44} {'-':>13}  needs {args.gpus} cards")
            continue
        found = plan(args)
        parts = {name: value for name, value in found["per_gpu_gib"].items() if name != "total"}
        most = ", ".join(
            f"{name.replace('_', ' ')} {value:.1f}"
            for name, value in sorted(parts.items(), key=lambda p: -p[1])[:2]
        )
        verdict = left_over(found) if found["fits"] else "DOES NOT FIT: " + found["suggestion"]
        print(f"{command:44} {found['per_gpu_gib']['total']:13.1f}  {most:42} {verdict}")
    print(
        f"\nCUDA sees {cards['gpu_memory_gib']:g} GiB of a card here. Predictions; "
        "held against measurement in modules/01_single_gpu_smoke/planner.md."
    )


def main() -> None:
    args = parse(None, here())
    if args.task is None:
        table()
        return results.note("scripts/plan")
    found = plan(args)
    results.note("scripts/plan")
    if args.json:
        import json

        print(json.dumps(found, ensure_ascii=False))
    else:
        show(args, found)


if __name__ == "__main__":
    main()
