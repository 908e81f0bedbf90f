"""trl 0.24 beside transformers 5, for which it was not written: what must be put right first."""

import trl.import_utils as asked


def make_ready() -> None:
    """So that `from trl import ...` of a trainer works: call this before it.

    transformers 5 answers with a pair whether a package is there, which trl takes for a yes: it
    would import packages that are not. And vLLM no longer has what trl 0.24 imports of it.
    """
    for name, answer in list(vars(asked).items()):
        if name.endswith("_available") and isinstance(answer, tuple):
            setattr(asked, name, answer[0])
    asked._vllm_available = False
