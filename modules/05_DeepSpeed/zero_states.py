"""Bytes that the states of a training cost one process, by formula. Source: arXiv 1910.02054."""

# Bytes per parameter with AdamW, undivided (section 3.1; the optimizer's is the paper's K).
MIXED = {"parameters": 2, "gradients": 2, "optimizer": 12}  # fp32: master copy and two moments
FP32 = {"parameters": 4, "gradients": 4, "optimizer": 8}  # the parameters are the master copy
# Which of them each ZeRO stage divides over the processes.
DIVIDED = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer", "gradients"),
    3: ("optimizer", "gradients", "parameters"),
}


def of_paper(stage: int, processes: float, whole: dict[str, int]) -> dict[str, float]:
    """Bytes per parameter and kind in one process; stage 2 of MIXED on 2: 2 + 1 + 6 = 9."""
    return {
        kind: width / processes if kind in DIVIDED[stage] else width
        for kind, width in whole.items()
    }


def of_deepspeed(
    stage: int,
    processes: int,
    dtype: str,
    accumulate: int,
    offload: bool,
    fp32_sums: bool = False,
) -> dict[str, float]:
    """The same as DeepSpeed 0.19 holds it between backward and step.

    Stage 2 in fp32 on 2 processes: 4 + 2 + 6 = 12.

    It differs from the paper in three things. In fp32 the parameters could be their own master
    copy, but from stage 1 on DeepSpeed copies this process's part of them all the same. Stage 1
    keeps whole gradients only while they accumulate: after the last micro-step it too keeps its
    part. An offloaded optimizer gets its part of the gradients in fp32. Where they add up in fp32
    at stage 1 (`fp32_sums`), another class holds both kinds whole.
    """
    whole = dict(FP32 if dtype == "float32" else MIXED)
    if stage >= 1:
        whole["optimizer"] = MIXED["optimizer"]
    if offload:
        whole["gradients"] = FP32["gradients"]
    if fp32_sums:
        whole["gradients"] += FP32["gradients"]
    divides_gradients = stage == 1 and accumulate == 1 and not fp32_sums
    return of_paper(2 if divides_gradients else stage, processes, whole)
