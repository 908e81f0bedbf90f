"""The profile: which values the same scripts take on this machine (configs/profiles/*.yaml).

PROFILE=NAME picks one; without it, the most demanding profile whose `requires` this machine meets
and that the environment's lock can compute. A GPU profile takes as many cards as it requires:
CUDA_VISIBLE_DEVICES says which. Command line, for launchers that are not Python:
    eval "$(python -m lab.profile)"            export the profile's environment into a shell
    python -m lab.profile COMMAND [ARG ...]    run a command in it
"""

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from lab import LOCAL_VARIABLES, ROOT, RUNS, fail, machine, results, shown

FOLDER = ROOT / "configs" / "profiles"
AWAY = (
    ", but the gpu lock's vLLM computes on GPUs only: 'make setup LOCK=cpu' brings one for the CPU"
)


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; one sentence and exit code 2 where it is none."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        fail(
            f"{shown(path)} is not valid YAML{f' near line {mark.line + 1}' if mark else ''}: {getattr(e, 'problem', None) or e}"
        )
    if not isinstance(content, dict):
        fail(f"{shown(path)} holds no settings: it must be a mapping of names to values")
    return content


def fitting(requires: dict) -> list[dict]:
    """The visible cards that `requires` {gpus, gpu_memory_gib} takes: large enough, and alike if it
    can.
    """
    count, least = requires.get("gpus", 0), requires.get("gpu_memory_gib", 0)
    large = [gpu for gpu in machine.gpus() if gpu["memory_gib"] >= least]
    for name in dict.fromkeys(gpu["name"] for gpu in large):
        alike = [gpu for gpu in large if gpu["name"] == name]
        if len(alike) >= count:
            return alike[:count]
    return large[:count]


def missing(requires: dict) -> str:
    """What this machine lacks of `requires` {gpus, gpu_memory_gib}; "" when it has all."""
    count, found = requires.get("gpus", 0), len(fitting(requires))
    if found == count:
        return ""
    cards = "1 NVIDIA GPU" if count == 1 else f"{count} NVIDIA GPUs"
    return f"{cards} of at least {requires['gpu_memory_gib']} GiB, {found} found"


def note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr)


def detect() -> str:
    """Name of the most demanding profile that this machine and its lock can run; see `remark`."""
    possible = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        requires = read_yaml(file).get("requires", {})
        if not missing(requires) and not (machine.lock() == "cpu" and requires.get("gpus")):
            possible[file.stem] = requires
    name = max(possible, key=lambda name: possible[name].get("gpus", 0))
    if words := remark(name, fitting(possible[name])):
        note(words)
    return name


def remark(name: str, taken: list[dict]) -> str:
    """What a reader should know of the profile that was detected, and of the cards that it takes."""
    gpus, lock = machine.gpus(), machine.lock()
    models = Counter(machine.short(gpu["name"]) for gpu in gpus)
    here = ", ".join(f"{count} x {model}" for model, count in models.items())
    sizes = " and ".join(f"{size:g} GiB" for size in sorted({gpu["memory_gib"] for gpu in gpus}))
    away = f"profile {name}" + (AWAY if lock == "gpu" else "")
    names = [machine.short(gpu["name"]) for gpu in taken]
    if len(set(names)) > 1:
        unlike = " and ".join(
            f"{machine.short(g['name'])} ({g['memory_gib']:g} GiB)" for g in taken
        )
        return f"profile {name} takes unlike cards, {unlike}: the smaller memory and the slower card count"
    if taken and names[0] == "RTX 4090":
        return ""
    if taken:
        own = "memory, FP8 and speeds are the card's own"
        return f"{len(taken)} x {names[0]} under profile {name}: {own}"
    if gpus and lock == "cpu":
        change = "to compute on the card: make setup LOCK=gpu"
        return f"{here} here, but this environment is the cpu lock's: profile {name}; {change}"
    if gpus:
        own = "for these cards add a YAML file to configs/profiles/"
        return f"no profile fits the {here} ({sizes}) here, {away}; {own}"
    if lock != "gpu":
        return ""
    if machine.cards():
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        last = len(machine.cards()) - 1
        return (
            f"CUDA_VISIBLE_DEVICES={chosen} shows none of {last + 1} cards, profile {name}: unset it, "
            f"or name cards of 0 to {last}"
        )
    return f"no GPU answers here: 'make doctor ARGS=\"--only driver\"' says why; {away}"


def need_cards(
    what: str, count: int, otherwise: str = "run it on the CPU with PROFILE=cpu"
) -> None:
    """Exit code 2 where `what` wants more cards than the profile has; `otherwise`: what to do then."""
    profile = load_profile(check=False)
    have = len(machine.gpus())
    if profile.device == "cuda" and have < count:
        there = len(machine.cards())
        if have < there:  # it is the profile, or CUDA_VISIBLE_DEVICES, that leaves them out
            otherwise = f"this machine has {there}: leave PROFILE and CUDA_VISIBLE_DEVICES out, or say PROCESSES=2"
        else:
            otherwise += f", or take a machine with {count}"
        fail(
            f"{what} needs {count} cards, and profile {profile.name} has {have or 'none'} here: {otherwise}"
        )


def need_vllm() -> None:
    """Exit code 2 where the profile computes on the CPU, and the gpu lock's vLLM does not."""
    if load_profile().device == "cpu" and machine.lock() == "gpu":
        fail(
            "the gpu lock's vLLM computes on GPUs only, and profile cpu on the CPU: exchange it with "
            "'make setup LOCK=cpu', or leave PROFILE=cpu out where a card is"
        )


def writable_home() -> dict[str, str]:
    """Cache folders under runs/cache for every library that would write to HOME; {} where HOME can
    be written.

    What is compiled there is handed to compilers, which cannot cope with a blank in a path: it then
    lies in the system's temporary folder.
    """
    probe = Path.home() / ".cache"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        writable = os.access(probe, os.W_OK)
    except OSError:
        writable = False
    compilable = re.compile(r"[\w./@+~=-]+").fullmatch  # the rule of scripts/setup.sh
    if writable and compilable(str(probe)):
        return {}
    cache_ = RUNS / "cache"
    compiled = cache_
    if not compilable(str(cache_)):
        mark = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
        compiled = Path(tempfile.gettempdir(), f"videofen-cache-{os.getuid()}-{mark}")
    names = {
        "XDG_CACHE_HOME": "",
        "XDG_CONFIG_HOME": "config",
        "HF_HOME": "huggingface",
        "MODELSCOPE_CACHE": "modelscope",
    }
    names |= {"VLLM_CONFIG_ROOT": "vllm", "MPLCONFIGDIR": "matplotlib"}
    compilers = {
        "VLLM_CACHE_ROOT": "vllm",
        "TRITON_CACHE_DIR": "triton",
        "FLASHINFER_WORKSPACE_BASE": "",
    }
    compilers |= {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    places = (
        {} if writable else {variable: str(cache_ / folder) for variable, folder in names.items()}
    )
    return places | {variable: str(compiled / folder) for variable, folder in compilers.items()}


def without_openssl() -> dict[str, str]:
    """torch.compile (C++, torch 2.13) names its precompiled headers with the program openssl:
    without it, none are made.
    """
    return {} if shutil.which("openssl") else {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}


def capped(environment: dict) -> dict:
    """`environment` with PyTorch's allocator held to MEMORY_CAP_GIB of each card, where that stands
    in for a smaller one.
    """
    if not (machine.memory_cap_gib() and machine.gpus()):
        return environment
    fraction = machine.memory_cap_gib() / machine.gpus()[0]["memory_gib"]
    settings = [
        environment.get("PYTORCH_ALLOC_CONF", ""),
        f"per_process_memory_fraction:{min(fraction, 1):.4f}",
    ]
    return environment | {"PYTORCH_ALLOC_CONF": ",".join(filter(None, settings))}


def take_cards(name: str, requires: dict) -> None:
    """Let CUDA see the cards that the profile requires, and no more; say which are left out."""
    taken, gpus = fitting(requires), machine.gpus()
    if not taken or len(gpus) == len(taken):
        return  # all of them, perhaps in an order or under UUIDs that the user gave

    def words(cards: list[dict]) -> tuple[str, str]:
        names = dict.fromkeys(machine.short(card["name"]) for card in cards)
        return ",".join(str(card["index"]) for card in cards), ", ".join(names)

    numbers, names = words(taken)
    left_numbers, left_names = words([gpu for gpu in gpus if gpu not in taken])
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers
    note(
        f"profile {name} takes card{'s' * (len(taken) > 1)} {numbers} ({names}) of {len(gpus)} and "
        f"leaves out {left_numbers} ({left_names}); CUDA_VISIBLE_DEVICES chooses others"
    )


def in_float32(values):
    """`values` of a profile with float32 wherever bfloat16 stands, at any depth."""
    if isinstance(values, dict):
        return {name: in_float32(value) for name, value in values.items()}
    return "float32" if values == "bfloat16" else values


def programs_first() -> None:
    """Put this environment's programs (torchrun, ninja ...) first on PATH: nobody need activate it."""
    programs = str(Path(sys.prefix, "bin"))
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = programs + os.pathsep + path


@cache
def load_profile(name: str | None = None, check: bool = True):
    """The profile as an OmegaConf mapping (profile.serve.model ...), its `env` set in os.environ
    where the user set nothing.

    `name` defaults to the variable PROFILE, then to detection. A profile that asks for GPUs this
    machine lacks, or for another lock, is refused, except where nothing runs (--help, --dry-run, or
    `check` False).
    """
    from omegaconf import OmegaConf

    known = sorted(f.stem for f in FOLDER.glob("*.yaml"))
    name = name or os.environ.get("PROFILE") or detect()
    if name not in known:
        fail(
            f"unknown PROFILE={name}: choose one of {', '.join(known)} (configs/profiles/), or leave it out to detect"
        )
    values = read_yaml(FOLDER / f"{name}.yaml")
    if values["device"] == "cpu" and not machine.fast_bfloat16():
        values = in_float32(values)
    requires = values.get("requires", {})
    if check and not {"-h", "--help", "--dry-run"} & set(sys.argv):
        if lacks := missing(requires):
            fail(f"profile {name} needs {lacks}: leave PROFILE out to take what fits this machine")
        if requires.get("gpus") and machine.lock() == "cpu":
            fail(
                f"profile {name} needs the gpu lock, and this environment is the cpu lock's: "
                "make setup LOCK=gpu, or leave PROFILE out"
            )
    os.environ["PROFILE"] = name  # child processes run under the same one
    take_cards(name, requires)
    programs_first()
    for variable, value in (
        capped(values.get("env", {})) | writable_home() | without_openssl()
    ).items():
        os.environ.setdefault(variable, str(value))
    results.began(values)
    return OmegaConf.create({"name": name, **values})


def main() -> None:
    profile = load_profile()
    if len(sys.argv) == 1:
        names = ["PROFILE", "PATH", *LOCAL_VARIABLES, "CUDA_VISIBLE_DEVICES"]
        names += [*capped(dict(profile.env)), *writable_home(), *without_openssl()]
        for variable in dict.fromkeys(name for name in names if name in os.environ):
            print(f"export {variable}={shlex.quote(os.environ[variable])}")
        return
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except FileNotFoundError:
        fail(
            f"no command {sys.argv[1]}: activate the environment first (source .venv/bin/activate, or conda activate videofen)"
        )


if __name__ == "__main__":
    main()
