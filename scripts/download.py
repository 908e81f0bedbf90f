"""Fetch every model that the profile's stages use, before they ask for it: `make download`.

    make download ARGS=--list      only say what there is to fetch, and how large it is
    make download                  fetch it; an interrupted download goes on where it stopped

HF_ENDPOINT names a Hugging Face mirror; USE_MODELSCOPE_HUB=1 downloads from ModelScope.
"""

import argparse

from lab import models
from lab.profile import load_profile

# Sections of a profile that name a model, and what it is for.
USES = {
    "smoke": "01 smoke test",
    "image_edit": "02 image editing",
    "serve": "03 serving",
    "throughput": "03 throughput",
    "train": "04/05 training",
    "zero": "05 ZeRO-1/2/3",
    "finetune": "06 LoRA",
}


def wanted(profile, sections=tuple(USES)) -> dict[str, list[str]]:
    """{model: what it is for}; a stage that builds its own model names none."""
    uses: dict[str, list[str]] = {}
    for section in sections:
        if section in profile and profile[section].model:
            uses.setdefault(profile[section].model, []).append(USES[section])
    return uses


def listing(profile, sections=tuple(USES)) -> tuple[str, float]:
    """(what there is to fetch, a model a line, with its size and use; GB in all)."""
    hub = "ModelScope" if models.from_modelscope() else "Hugging Face"
    lines = [f"models of profile {profile.name}, from {hub}:"]
    total = 0.0
    for name, uses in wanted(profile, sections).items():
        model = models.entry(name)[1]
        address = model["modelscope"] if models.from_modelscope() else model["hub"]
        size = f"{model['download_gb']:6.1f} GB" if model["download_gb"] else " in a package"
        lines.append(f"  {name:24} {size:13}  {address:36} {', '.join(uses)}")
        total += model["download_gb"]
    lines.append(f"  in all {total:.1f} GB; what is in the cache already is not fetched again")
    return "\n".join(lines), total


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--list", action="store_true", help="only print the list")
    args = parser.parse_args()
    profile = load_profile(check=False)  # a machine without GPUs may fetch for one that has them
    print(listing(profile)[0])
    if args.list:
        return
    for name in wanted(profile):
        print(f"{name}: {models.model_folder(name)}", flush=True)


if __name__ == "__main__":
    main()
