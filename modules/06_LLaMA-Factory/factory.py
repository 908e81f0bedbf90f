"""What the scripts share: LLaMA-Factory's command as a job, and settings as in the training."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import checkpoints
import unfinished

from lab import ROOT, RUNS, fail, models, shown

FOLDER = RUNS / "06_LLaMA-Factory"
# Settings of a training that decide the text around a request
OF_TEMPLATE = ("template", "default_system", "enable_thinking")
# Of the engine's output, what tells a reader something: losses, and how much is trained.
TELLING = r"\{'(loss|train_runtime)|.*trainable params:"
children: set[subprocess.Popen] = set()  # those of `child` that run

# -----------------------------------------------------------------------------
# Its command


def write(settings, name: str, comment: str) -> Path:
    """The settings as a YAML file under runs/.

    LLaMA-Factory's launcher cuts KEY=VALUE words at spaces, and so the settings go in as a file.
    """
    from omegaconf import OmegaConf

    path = FOLDER / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {comment}\n{OmegaConf.to_yaml(settings)}", encoding="utf-8")
    return path


def prepare(environment: dict[str, str], *arguments: str) -> list[str]:
    """Print the command as a reader would type it at the repository root, and return it.

    Its environment is set, and the root is where it will run.
    """
    programs = Path(sys.executable).parent  # it calls torchrun by name
    os.environ.update(environment, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    os.chdir(ROOT)
    variables = [f"{name}={value}" for name, value in environment.items()]
    print(*variables, "llamafactory-cli", *arguments, flush=True)
    return ["llamafactory-cli", *arguments]


def show(lines, log) -> None:
    """Copy the engine's `lines` to the file `log`, and what tells something to the screen.

    The training example is a text of several lines; a line of token ids or an empty one ends it,
    but not the empty ones of a thought.
    """
    in_example = False
    before = ""
    for line in lines:
        log.write(line)
        if line.startswith("error: "):
            fail(line.removeprefix("error: ").strip())
        begins = line.startswith(("inputs:", "labels:"))
        ends = re.match(r"label_ids:|\[" if before.endswith("think>") else r"label_ids:|\[|$", line)
        before = line.rstrip()
        in_example = begins or (in_example and not ends)
        if in_example or re.match(TELLING, line):
            text = re.sub(r"^.*>> ", "", line.rstrip())
            print(f"  {text[:150]}", flush=True)


def run(name: str, command: list[str], training: Path | None = None) -> None:
    """Run the command to its end as a job; its whole output goes to runs/.../NAME.log.

    Exit code 2 with the engine's own reason where it fails. Ctrl+C and SIGTERM leave no process.
    `training` is the folder that a training writes to: what is left there is said too.
    """
    log = FOLDER / f"{name}.log"
    job = [sys.executable, "-m", "lab.launch", f"lf-{name}", *command]
    process = subprocess.Popen(job, text=True, stderr=subprocess.PIPE, errors="replace")
    code = 0
    try:
        with log.open("w", encoding="utf-8") as file:
            show(watched(process.stderr, training), file)
        code = process.wait()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        if end.code != 143:  # a refusal, which has been said
            raise
        code = 143
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is ending already
        process.terminate()  # lab.launch then ends every process of the job
        process.wait()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = f"(whole log: {shown(log)})"
    left = unfinished.way_on(training) if training and code else ""
    if code in (130, 143):
        print(f"ended from outside, by Ctrl+C or make stop{left} {whole}", file=sys.stderr)
        raise SystemExit(code)
    if code:
        fail(f"{reason(code, log.read_text(errors='replace'))}{left} {whole}")


@contextlib.contextmanager
def child(command: list[str], **options):
    """The process of a command, which ends with us; an exit code of it that is not 0 is ours."""
    process = subprocess.Popen(command, **options)
    children.add(process)
    try:
        yield process
        code = process.wait()
    finally:
        process.terminate()
        process.wait()
        children.discard(process)
    if code:
        raise SystemExit(code)


def peak_gib() -> float:
    """The most memory that one process of the finished jobs has held, of the host (GiB)."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def watched(lines, training: Path | None):
    """The same lines; at each, the checkpoints are dated by their steps."""
    for line in lines:
        if training:
            checkpoints.date_by_step(training)
        yield line


def reason(code: int, log: str) -> str:
    """Why the engine ended with this exit code, in a reader's words or in its own."""
    if code == 137 or re.search(r"Signal 9 \(SIGKILL\)", log):  # torchrun's, of a process
        return (
            "LLaMA-Factory was killed, most likely because the memory was full: "
            "take a smaller batch or model"
        )
    if re.search(r"No space left on device|PytorchStreamWriter failed|unexpected pos", log):
        return "LLaMA-Factory stopped: no room was left on the disk, make some"
    return f"LLaMA-Factory stopped: {last_exception(log)}"


def last_exception(log: str) -> str:
    """The message of the last exception in the engine's log, else its last line."""
    text = log.strip() or "it wrote nothing"
    messages = re.findall(r"(?m)^(?:\[rank\d+\]: )?[\w.]*(?:Error|Exception): (.+)$", text)
    # torchrun repeats that a process failed, after the process has said why.
    own = [message for message in messages if "returned non-zero exit status" not in message]
    return (own or messages or text.splitlines())[-1].strip()[:300]


# -----------------------------------------------------------------------------
# What later scripts take from the training


def add_adapter_flag(parser) -> None:
    """--adapter, as `adapter_folder` takes it."""
    trained = "folder that training wrote (default: %(default)s)"
    parser.add_argument("--adapter", default=shown(FOLDER / "lora"), help=trained)


def adapter_folder(path: str) -> Path:
    """The folder, if training has finished in it."""
    folder = ROOT / path
    if not all((folder / name).is_file() for name in ("adapter_config.json", "config.yaml")):
        begun = ", RESUME=1 goes on with what has begun" * unfinished.inside(folder).is_dir()
        fail(f"there is no adapter in {shown(folder)}: run 'make lf-train' first{begun}")
    return folder


class Trained(NamedTuple):
    folder: Path  # with the adapter, or with a whole model
    base: Path | None  # the model before the training; None: it is not said which
    is_adapter: bool
    switches: dict  # of the chat template, where training set one: {"enable_thinking": False}


def trained(path: str, model: str | None = None) -> Trained:
    """What a finished training, or a merging, has left in the folder.

    A merged model says nothing of its base. `model` is the base where it lies elsewhere now; exit
    code 2 where it is another one.
    """
    from omegaconf import OmegaConf

    folder = ROOT / path
    is_adapter = (folder / "adapter_config.json").is_file()
    is_model = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if is_adapter or not is_model:
        folder = adapter_folder(path)
    file = folder / "config.yaml"
    settings = OmegaConf.load(file) if file.is_file() else {}
    named = settings.get("model_name_or_path")
    if is_adapter:
        try:
            described = json.loads((folder / "adapter_config.json").read_text())
            named = described["base_model_name_or_path"]
        except (ValueError, KeyError):
            fail(f"{shown(folder)}/adapter_config.json is broken: train again")
    base = models.model_folder(model) if model else base_model(named) if named else None
    if model and named and (ROOT / named).is_dir() and (ROOT / named).resolve() != base.resolve():
        fail(f"{shown(folder)} was trained on {named}, and --model names {model}")
    problem = checkpoints.misfit(folder, base) if is_adapter else ""
    if problem:
        fail(problem)
    return Trained(folder, base, is_adapter, template_switches(settings))


def template_switches(settings) -> dict:
    """What the model's own chat template must be told for the prompts that training had.

    LLaMA-Factory puts an empty thought into the prompt for `null` as for `false`.
    """
    thinks = settings.get("enable_thinking", True)
    return {} if thinks else {"enable_thinking": False}


def train_first(script: Path) -> None:
    """Run 01_train.py to its end, or go on with it; end with its exit code where it fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends with us
    with child([sys.executable, str(script), "--resume-or-begin"]):
        pass


def size_gb(folder: Path) -> float:
    """The weights in the folder, in GB."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9


def base_model(path: str) -> Path:
    """The folder of the model that an adapter was trained on."""
    folder = ROOT / path
    if not folder.is_dir():
        fail(f"the base model {path} of this adapter is gone: run 'make lf-train' again")
    return folder


def settings_for(source: Path, done: Trained, dtype: str):
    """The settings in `source` with model, template and system message as in the training."""
    from omegaconf import OmegaConf

    training = OmegaConf.load(done.folder / "config.yaml")
    names = ("model_name_or_path", *OF_TEMPLATE)
    same = {name: training[name] for name in names if name in training}
    here = {"infer_dtype": dtype}
    settings = OmegaConf.load(source)
    if done.is_adapter:
        here["adapter_name_or_path"] = shown(done.folder)
    else:
        here |= {"model_name_or_path": shown(done.folder), "finetuning_type": "full"}
        del settings.adapter_name_or_path
    return OmegaConf.merge(settings, same, here)


# -----------------------------------------------------------------------------
# The template


def own_system_message(folder: Path) -> str | None:
    """What the model's own chat template says before a user who gave no system message.

    "" where it says nothing, None where the template is not of the ChatML kind.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = folder / "chat_template.jinja"
    older = folder / "tokenizer_config.json"
    source = None
    if file.is_file():
        source = file.read_text()
    elif older.is_file():
        source = json.loads(older.read_text()).get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    text = template.render(messages=[{"role": "user", "content": "?"}], add_generation_prompt=True)
    system = r"(?:<\|im_start\|>system\n(.*?)<\|im_end\|>\n)?"
    chatml = re.fullmatch(system + r"<\|im_start\|>user\n.*", text, re.S)
    return (chatml[1] or "") if chatml else None
