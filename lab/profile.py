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
NO_VLLM = "the gpu lock's vLLM computes on GPUs only"


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; one sentence and exit code 2 where it is none."""
    import yaml

    try:
        # The loader in C, where PyYAML has it, is nine times as fast.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = f" near line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or e
        fail(f"{shown(path)} is not valid YAML{place}: {problem}")
    if not isinstance(content, dict):
        fail(f"{shown(path)} holds no settings: it must be a mapping of names to values")
    return content


def fitting(requires: dict) -> list[dict]:
    """The visible cards that `requires` {gpus, gpu_memory_gib} takes: large, alike if it can."""
    count = requires.get("gpus", 0)
    least = requires.get("gpu_memory_gib", 0)
    large = [gpu for gpu in machine.gpus() if gpu["memory_gib"] >= least]
    for name in dict.fromkeys(gpu["name"] for gpu in large):
        alike = [gpu for gpu in large if gpu["name"] == name]
        if len(alike) >= count:
            return alike[:count]
    return large[:count]


def missing(requires: dict) -> str:
    """What this machine lacks of `requires` {gpus, gpu_memory_gib}; "" when it has all."""
    count = requires.get("gpus", 0)
    have = len(fitting(requires))
    if have == count:
        return ""
    cards = "1 NVIDIA GPU" if count == 1 else f"{count} NVIDIA GPUs"
    return f"{cards} of at least {requires['gpu_memory_gib']} GiB, {have} found"


def note(sentence: str) -> None:
    print(f"note: {sentence}", file=sys.stderr)


def detect() -> str:
    """Name of the most demanding profile that this machine and its lock can run; see `remark`."""
    possible = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        requires = read_yaml(file).get("requires", {})
        if not missing(requires) and not (machine.lock() == "cpu" and requires.get("gpus")):
            possible[file.stem] = requires
    name = max(possible, key=lambda name: possible[name].get("gpus", 0))
    sentence = remark(name, fitting(possible[name]))
    if sentence:
        note(sentence)
    return name


def remark(name: str, taken: list[dict]) -> str:
    """What a reader should know of the profile that was detected; "" where all is as expected."""
    if taken:
        return remark_on_taken(name, taken)
    if machine.gpus():
        return remark_on_left(name)
    return remark_on_none(name) if machine.lock() == "gpu" else ""


def remark_on_taken(name: str, taken: list[dict]) -> str:
    names = [machine.short(gpu["name"]) for gpu in taken]
    if len(set(names)) > 1:
        unlike = " and ".join(
            f"{model} ({gpu['memory_gib']:g} GiB)" for model, gpu in zip(names, taken, strict=True)
        )
        least = "the smaller memory and the slower card count"
        return f"profile {name} takes unlike cards, {unlike}: {least}"
    if names[0] == "RTX 4090":
        return ""
    own = "memory, FP8 and speeds are the card's own"
    return f"{len(taken)} x {names[0]} under profile {name}: {own}"


def remark_on_left(name: str) -> str:
    """There are cards, and the profile takes none."""
    gpus = machine.gpus()
    models = Counter(machine.short(gpu["name"]) for gpu in gpus)
    here = ", ".join(f"{count} x {model}" for model, count in models.items())
    if machine.lock() == "cpu":
        change = "to compute on the card: make setup LOCK=gpu"
        return f"{here} here, but this environment is the cpu lock's: profile {name}; {change}"
    sizes = " and ".join(f"{size:g} GiB" for size in sorted({gpu["memory_gib"] for gpu in gpus}))
    own = "for these cards add a YAML file to configs/profiles/"
    return f"no profile fits the {here} ({sizes}) here, {without_cards(name)}; {own}"


def remark_on_none(name: str) -> str:
    """The gpu lock's environment sees no card."""
    count = len(machine.cards())
    if not count:
        why = "'make doctor ARGS=\"--only driver\"' says why"
        return f"no GPU answers here: {why}; {without_cards(name)}"
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"CUDA_VISIBLE_DEVICES={chosen} shows none of {count} cards, profile {name}: "
        f"unset it, or name cards of 0 to {count - 1}"
    )


def without_cards(name: str) -> str:
    """What the profile without cards cannot do under this lock."""
    if machine.lock() != "gpu":
        return f"profile {name}"
    return f"profile {name}, but {NO_VLLM}: 'make setup LOCK=cpu' brings one for the CPU"


ON_CPU = "run it on the CPU with PROFILE=cpu"


def need_cards(what: str, count: int, otherwise: str = ON_CPU) -> None:
    """Exit code 2 where `what` wants more cards than the profile has; `otherwise`: the way out."""
    profile = load_profile(check=False)
    have = len(machine.gpus())
    if profile.device != "cuda" or have >= count:
        return
    there = len(machine.cards())
    if have < there:  # it is the profile, or CUDA_VISIBLE_DEVICES, that leaves them out
        leave = "leave PROFILE and CUDA_VISIBLE_DEVICES out, or say PROCESSES=2"
        way_out = f"this machine has {there}: {leave}"
    else:
        way_out = f"{otherwise}, or take a machine with {count}"
    has = f"profile {profile.name} has {have or 'none'} here"
    fail(f"{what} needs {count} cards, and {has}: {way_out}")


def need_vllm() -> None:
    """Exit code 2 where the profile computes on the CPU, and the gpu lock's vLLM does not."""
    if load_profile().device == "cpu" and machine.lock() == "gpu":
        way_out = "exchange it with 'make setup LOCK=cpu', or leave PROFILE=cpu out where a card is"
        fail(f"{NO_VLLM}, and profile cpu on the CPU: {way_out}")


# Where every library keeps what it downloads and writes, and where what it compiles: variables, and
# folders in a cache of ours.
CACHES = {
    "XDG_CACHE_HOME": "",
    "XDG_CONFIG_HOME": "config",
    "HF_HOME": "huggingface",
    "MODELSCOPE_CACHE": "modelscope",
    "VLLM_CONFIG_ROOT": "vllm",
    "MPLCONFIGDIR": "matplotlib",
}
COMPILED = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


def compilable(folder: Path) -> bool:
    """Whether compilers cope with this path: the rule of scripts/setup.sh."""
    return re.fullmatch(r"[\w./@+~=-]+", str(folder)) is not None


def writable_home() -> dict[str, str]:
    """Cache folders under runs/cache for libraries that would write to HOME; {} where they can.

    What is compiled there is handed to compilers, which cannot cope with a blank in a path: it then
    lies in the system's temporary folder.
    """
    probe = Path.home() / ".cache"
    try:
        probe.mkdir(parents=True, exist_ok=True)
        writable = os.access(probe, os.W_OK)
    except OSError:
        writable = False
    if writable and compilable(probe):
        return {}
    own = RUNS / "cache"
    compiled = own
    if not compilable(own):
        mark = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
        compiled = Path(tempfile.gettempdir(), f"videofen-cache-{os.getuid()}-{mark}")
    places = {variable: str(compiled / folder) for variable, folder in COMPILED.items()}
    if not writable:
        places |= {variable: str(own / folder) for variable, folder in CACHES.items()}
    return places


def without_openssl() -> dict[str, str]:
    """No precompiled headers in torch.compile: torch 2.13 names them with the program openssl."""
    return {} if shutil.which("openssl") else {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}


def capped(environment: dict) -> dict:
    """`environment` with PyTorch's allocator held to MEMORY_CAP_GIB of each card, if it is set."""
    cap = machine.memory_cap_gib()
    if not cap or not machine.gpus():
        return environment
    fraction = min(1, cap / machine.gpus()[0]["memory_gib"])
    before = environment.get("PYTORCH_ALLOC_CONF")
    settings = [before] if before else []
    settings.append(f"per_process_memory_fraction:{fraction:.4f}")
    return environment | {"PYTORCH_ALLOC_CONF": ",".join(settings)}


def take_cards(name: str, requires: dict) -> None:
    """Let CUDA see the cards that the profile requires, and no more; say which are left out."""
    gpus = machine.gpus()
    taken = fitting(requires)
    if not taken or len(gpus) == len(taken):
        return  # all of them, perhaps in an order or under UUIDs that the user gave
    left = [gpu for gpu in gpus if gpu not in taken]
    os.environ["CUDA_VISIBLE_DEVICES"] = numbers(taken)
    cards = "card" if len(taken) == 1 else "cards"
    note(
        f"profile {name} takes {cards} {described(taken)} of {len(gpus)} and leaves out "
        f"{described(left)}; CUDA_VISIBLE_DEVICES chooses others"
    )


def numbers(cards: list[dict]) -> str:
    return ",".join(str(card["index"]) for card in cards)


def described(cards: list[dict]) -> str:
    """0,2 (RTX 3060, RTX 3090)."""
    names = dict.fromkeys(machine.short(card["name"]) for card in cards)
    return f"{numbers(cards)} ({', '.join(names)})"


def in_float32(values):
    """`values` of a profile with float32 wherever bfloat16 stands, at any depth."""
    if isinstance(values, dict):
        return {name: in_float32(value) for name, value in values.items()}
    return "float32" if values == "bfloat16" else values


def programs_first() -> None:
    """Put this environment's programs (torchrun, ninja ...) first on PATH, activated or not."""
    programs = str(Path(sys.prefix, "bin"))
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != programs:
        os.environ["PATH"] = programs + os.pathsep + path


def refuse_what_cannot_run(name: str, requires: dict) -> None:
    """Exit code 2 where this machine, or its lock, lacks what the profile requires."""
    lacks = missing(requires)
    if lacks:
        fail(f"profile {name} needs {lacks}: leave PROFILE out to take what fits this machine")
    if requires.get("gpus") and machine.lock() == "cpu":
        fail(
            f"profile {name} needs the gpu lock, and this environment is the cpu lock's: "
            "make setup LOCK=gpu, or leave PROFILE out"
        )


def variables(env: dict) -> dict:
    """All variables that are set for engines and compilers, the profile's `env` among them."""
    return capped(env) | writable_home() | without_openssl()


@cache
def load_profile(name: str | None = None, check: bool = True):
    """The profile as an OmegaConf mapping (profile.serve.model ...).

    Its `env` is set in os.environ where the user set nothing. `name` defaults to the variable
    PROFILE, then to detection. A profile that asks for GPUs this machine lacks, or for another
    lock, is refused, except where nothing runs (--help, --dry-run, or `check` False).
    """
    from omegaconf import OmegaConf

    known = sorted(f.stem for f in FOLDER.glob("*.yaml"))
    name = name or os.environ.get("PROFILE") or detect()
    if name not in known:
        choice = f"choose one of {', '.join(known)} (configs/profiles/)"
        fail(f"unknown PROFILE={name}: {choice}, or leave it out to detect")
    values = read_yaml(FOLDER / f"{name}.yaml")
    if values["device"] == "cpu" and not machine.fast_bfloat16():
        values = in_float32(values)
    requires = values.get("requires", {})
    if check and not {"-h", "--help", "--dry-run"} & set(sys.argv):
        refuse_what_cannot_run(name, requires)
    os.environ["PROFILE"] = name  # child processes run under the same one
    take_cards(name, requires)
    programs_first()
    for variable, value in variables(values.get("env", {})).items():
        os.environ.setdefault(variable, str(value))
    results.began(values)
    return OmegaConf.create({"name": name, **values})


def main() -> None:
    profile = load_profile()
    if len(sys.argv) == 1:
        names = ["PROFILE", "PATH", *LOCAL_VARIABLES, "CUDA_VISIBLE_DEVICES"]
        names += variables(dict(profile.env))
        for variable in dict.fromkeys(name for name in names if name in os.environ):
            print(f"export {variable}={shlex.quote(os.environ[variable])}")
        return
    command = sys.argv[1:]
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        activate = "source .venv/bin/activate, or conda activate videofen"
        fail(f"no command {command[0]}: activate the environment first ({activate})")


if __name__ == "__main__":
    main()
