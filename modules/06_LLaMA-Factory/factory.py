"""What the scripts of this stage share: running LLaMA-Factory's command line as a job, and settings that agree with training."""

import os
import re
import subprocess
import sys
from pathlib import Path

from lab import ROOT, RUNS, fail, shown

FOLDER = RUNS / "06_LLaMA-Factory"
# Of the engine's output, what tells a reader something: losses, how much is trained, and the training example as text.
TELLING = r"\{'(loss|train_runtime)|.*trainable params:"


def cause(log: Path) -> str:
    """The message that says why the engine stopped: its last exception, else its last line."""
    text = log.read_text(errors="replace").strip() or "it wrote nothing"
    causes = re.findall(r"(?m)^(?:\[rank\d+\]: )?[\w.]*(?:Error|Exception): (.+)$", text)
    own = [c for c in causes if "returned non-zero exit status" not in c]  # torchrun's words about a process that said why itself
    return (own or causes or text.splitlines())[-1].strip()[:300]


def write(settings, name: str, comment: str) -> Path:
    """The settings as YAML under runs/, seen from the repository root: LLaMA-Factory's launcher cuts paths at spaces."""
    from omegaconf import OmegaConf

    path = FOLDER / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {comment}\n{OmegaConf.to_yaml(settings)}", encoding="utf-8")
    return path


def prepare(environment: dict[str, str], *words: str) -> list[str]:
    """Print the command as a reader would type it at the repository root; returns it. The environment is set for it."""
    os.environ.update(environment, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # it calls torchrun by name
    os.chdir(ROOT)
    print(" ".join([*(f"{k}={v}" for k, v in environment.items()), "llamafactory-cli", *words]), flush=True)
    return ["llamafactory-cli", *words]


def run(name: str, command: list[str]) -> Path:
    """Run it to its end as a job; its whole output goes to the log that is returned, what tells something to the screen.

    Exit code 2 with the engine's own reason where it fails. Ctrl+C and SIGTERM leave no process.
    """
    log = FOLDER / f"{name}.log"
    words = [sys.executable, "-m", "lab.launch", f"lf-{name}", *command]
    process = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, errors="replace")
    try:
        with log.open("w", encoding="utf-8") as out:
            example = False
            for line in process.stderr:
                out.write(line)
                if line.startswith("error: "):
                    fail(line[7:].strip())
                example = line.startswith(("inputs:", "labels:")) or (example and not re.match(r"label_ids:|\[|$", line))
                if example or re.match(TELLING, line):
                    print(f"  {re.sub(r'^.*>> ', '', line.rstrip())[:150]}", flush=True)
        code = process.wait()
    finally:
        process.terminate()  # lab.launch then ends every process of the job
        process.wait()
    if code in (130, 143):
        print(f"ended from outside (Ctrl+C or make stop); whole log: {shown(log)}", file=sys.stderr)
        raise SystemExit(code)
    if code == 137:
        fail(f"LLaMA-Factory was killed, most likely because the memory was full: take a smaller batch or model (whole log: {shown(log)})")
    if code:
        fail(f"LLaMA-Factory stopped: {cause(log)} (whole log: {shown(log)})")
    return log


def adapter_folder(path: str) -> Path:
    """The folder, if training has finished in it."""
    folder = ROOT / path
    if not (folder / "adapter_config.json").is_file() or not (folder / "config.yaml").is_file():
        fail(f"there is no adapter in {shown(folder)}: run 'make lf-train' first")
    return folder


def settings_for(source: Path, adapter: str, dtype: str):
    """The settings in `source` with the model, template and system message that the adapter was trained with."""
    from omegaconf import OmegaConf

    folder = adapter_folder(adapter)
    trained = OmegaConf.load(folder / "config.yaml")
    same = {key: trained[key] for key in ("model_name_or_path", "template", "default_system") if key in trained}
    if not (ROOT / same["model_name_or_path"]).is_dir():
        fail(f"the base model {same['model_name_or_path']} of this adapter is gone: run 'make lf-train' again")
    return OmegaConf.merge(OmegaConf.load(source), same, {"adapter_name_or_path": shown(folder), "infer_dtype": dtype})
