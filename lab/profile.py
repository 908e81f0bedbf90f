"""The profile: which values the same scripts take on this machine (configs/profiles/*.yaml).

PROFILE=NAME picks one; without it, the most demanding profile whose `requires` this machine meets.
Command line, for launchers that are not Python:
    eval "$(python -m lab.profile)"            export the profile's environment into a shell
    python -m lab.profile COMMAND [ARG ...]    run a command in it
"""

import os
import shlex
import sys
from functools import cache
from pathlib import Path

from lab import ROOT, RUNS, fail, machine, results, shown

FOLDER = ROOT / "configs" / "profiles"


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; one sentence and exit code 2 where it is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        fail(f"{shown(path)} is not valid YAML{f' near line {mark.line + 1}' if mark else ''}: {getattr(e, 'problem', None) or e}")
    if not isinstance(content, dict):
        fail(f"{shown(path)} holds no settings: it must be a mapping of names to values")
    return content


def missing(requires: dict) -> str:
    """What this machine lacks of `requires` {gpus, gpu_memory_gib}; "" when it has all."""
    fitting = [g for g in machine.gpus() if g["memory_gib"] >= requires.get("gpu_memory_gib", 0)]
    if len(fitting) >= requires.get("gpus", 0):
        return ""
    return f"{requires['gpus']} NVIDIA GPUs of at least {requires['gpu_memory_gib']} GiB, {len(fitting)} found"


def detect() -> str:
    """Name of the most demanding profile that this machine can run; GPUs that fit none are not passed over in silence."""
    fitting = [(p.get("requires", {}).get("gpus", 0), f.stem) for f in FOLDER.glob("*.yaml") if not missing((p := read_yaml(f)).get("requires", {}))]
    gpus, name = max(fitting)
    if machine.gpus() and gpus == 0:
        print(f"note: no profile fits the {len(machine.gpus())} x {machine.gpus()[0]['name']} here, computing on the CPU (LOCK=cpu); "
              "for these GPUs add a YAML file to configs/profiles/", file=sys.stderr)  # fmt: skip
    return name


def writable_home() -> dict[str, str]:
    """Cache folders under runs/cache for every library that would write to HOME; {} where HOME can be written."""
    probe = Path.home() / ".cache"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        if os.access(probe, os.W_OK):
            return {}
    except OSError:
        pass
    cache_ = RUNS / "cache"
    names = {"XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "config", "HF_HOME": "huggingface", "MODELSCOPE_CACHE": "modelscope"}
    names |= {"VLLM_CACHE_ROOT": "vllm", "VLLM_CONFIG_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
    names |= {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {variable: str(cache_ / folder) for variable, folder in names.items()}


def capped(environment: dict) -> dict:
    """`environment` with PyTorch's allocator held to MEMORY_CAP_GIB of each card, where that stands in for a smaller one."""
    if not (machine.memory_cap_gib() and machine.gpus()):
        return environment
    fraction = machine.memory_cap_gib() / machine.gpus()[0]["memory_gib"]
    settings = [environment.get("PYTORCH_ALLOC_CONF", ""), f"per_process_memory_fraction:{min(fraction, 1):.4f}"]
    return environment | {"PYTORCH_ALLOC_CONF": ",".join(filter(None, settings))}


@cache
def load_profile(name: str | None = None, check: bool = True):
    """The profile as an OmegaConf mapping (profile.serve.model ...), its `env` set in os.environ where the user set nothing.

    `name` defaults to the variable PROFILE, then to detection. A profile that asks for GPUs this machine lacks is
    refused, except where nothing runs (--help, --dry-run, or `check` False).
    """
    from omegaconf import OmegaConf

    known = sorted(f.stem for f in FOLDER.glob("*.yaml"))
    name = name or os.environ.get("PROFILE") or detect()
    if name not in known:
        fail(f"unknown PROFILE={name}: choose one of {', '.join(known)} (configs/profiles/), or leave it out to detect")
    values = read_yaml(FOLDER / f"{name}.yaml")
    lacks = missing(values.get("requires", {}))
    if lacks and check and not {"-h", "--help", "--dry-run"} & set(sys.argv):
        fail(f"profile {name} needs {lacks}: run with PROFILE=cpu, or on a machine that has them")
    os.environ["PROFILE"] = name  # child processes run under the same one
    for variable, value in (capped(values.get("env", {})) | writable_home()).items():
        os.environ.setdefault(variable, str(value))
    results.began(values)
    return OmegaConf.create({"name": name, **values})


def main() -> None:
    profile = load_profile()
    if len(sys.argv) == 1:
        for variable in ["PROFILE", *profile.env, *writable_home()]:
            print(f"export {variable}={shlex.quote(os.environ[variable])}")
        return
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except FileNotFoundError:
        fail(f"no command {sys.argv[1]}: activate the environment first (source .venv/bin/activate, or conda activate videofen)")


if __name__ == "__main__":
    main()
