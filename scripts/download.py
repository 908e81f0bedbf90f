"""Fetch every model that the profile's stages use, before they ask for it: `make download`.

    make download ARGS=--list      only say what there is to fetch, and how large it is
    make download                  fetch it; an interrupted download goes on where it stopped

HF_ENDPOINT names a Hugging Face mirror; USE_MODELSCOPE_HUB=1 downloads from ModelScope.
"""

import argparse

from lab import models
from lab.profile import load_profile

# Sections of a profile that name a model, and what it is for.
USES = {"smoke": "01 smoke test", "image_edit": "02 image editing", "serve": "03 serving", "throughput": "03 throughput", "train": "04/05 training"}
USES |= {"zero": "05 ZeRO-1/2/3", "finetune": "06 LoRA"}


def wanted(profile) -> dict[str, list[str]]:
    """{model: what it is for} of the profile; a stage that builds its own model names none."""
    found: dict[str, list[str]] = {}
    for section, use in USES.items():
        if section in profile and profile[section].model:
            found.setdefault(profile[section].model, []).append(use)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only print the list")
    args = parser.parse_args()
    profile = load_profile(check=False)  # a machine without GPUs may fetch for one that has them
    needed = wanted(profile)
    print(f"profile {profile.name}, {'ModelScope' if models.from_modelscope() else 'Hugging Face'}:")
    for name, uses in needed.items():
        model = models.entry(name)[1]
        size = f"{model['download_gb']:6.1f} GB" if model["download_gb"] else " in a package"
        print(f"  {name:24} {size:13}  {model['modelscope'] if models.from_modelscope() else model['hub']:36} {', '.join(uses)}")
    print(f"  in all {sum(models.entry(name)[1]['download_gb'] for name in needed):.1f} GB; what is in the cache already is not fetched again")
    for name in [] if args.list else needed:
        print(f"{name}: {models.model_folder(name)}", flush=True)


if __name__ == "__main__":
    main()
