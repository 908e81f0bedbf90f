"""What fits on which cards, before anything is downloaded: memory by arithmetic (lab/planner).

    python scripts/plan.py                  # this repository's own recipes on 2 x 24 GB: make plan
    python scripts/plan.py serve --model qwen2.5-14b-instruct --gpus 2 --tp 2 --max-model-len 8192
    python scripts/plan.py train --model qwen2.5-7b-instruct --gpus 2 --method qlora --checkpointing
    python scripts/plan.py image-edit --model qwen-image-edit --gpus 2 --recipe fp8 --json

Look at: the verdict, what is left over, and, where it does not fit, the cheapest change that does.
No GPU is needed, no engine is imported, and nothing is downloaded when --model is a folder, a
config.json or a name of configs/models.yaml. Arguments, recipes and changes: scripts/plan_parts/.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace

from plan_parts import Request, cards_here, images, read_model
from plan_parts.arguments import asked, parser
from plan_parts.changes import fits, suggestion
from plan_parts.recipes import recipes

from lab import results
from lab.planner import serving, speed, states, training, weights
from lab.planner.config import Model
from lab.planner.serving import Serving
from lab.planner.training import Training

GPT_OSS = "GptOssForCausalLM"

# -----------------------------------------------------------------------------
# A question, answered


def plan(request: Request) -> dict:
    """What it needs and whether that fits; what would, how fast it is, and notes."""
    if request.task == "image-edit":
        return images.plan(request.model, request.setup)
    model = read_model(request.model)
    setup = request.setup
    plan_of = serving.serve if request.task == "serve" else training.train
    answer = asdict(plan_of(model, setup))
    if answer.get("nvme_gib") is None:
        answer.pop("nvme_gib", None)
    answer["suggestion"] = "" if answer["fits"] else suggestion(model, request, answer)
    if answer["fits"] and request.task == "train":
        answer |= largest(model, setup)
    answer["parameters"] = weights.parameters(model)
    answer["predicted_speed"] = predicted_speed(model, request)
    answer["notes"] = fp8_notes(model, request, answer["suggestion"])
    if request.task == "serve":
        answer["notes"] += start_notes(model, setup, answer)
    if request.task == "train":
        answer["notes"] += states.notes(model, setup)
    return answer


def largest(model: Model, setup: Training) -> dict[str, int]:
    """The largest micro-batch and the longest sequences that still fit, each alone.

    Sequences are no longer than the model was made for.
    """

    def batch_fits(sequences: int) -> bool:
        return fits(model, replace(setup, micro_batch=sequences))

    def length_fits(tokens: int) -> bool:
        return fits(model, replace(setup, seq_len=tokens))

    return {
        "max_micro_batch": most(batch_fits, setup.micro_batch, 1_000_000),
        "max_seq_len": most(length_fits, setup.seq_len, model.max_len),
    }


def most(number_fits: Callable[[int], bool], number: int, limit: int) -> int:
    """The largest that fits, within 1 %, from `number`, which does, to `limit`."""
    if number >= limit or number_fits(limit):
        return max(number, limit)
    low = number
    high = limit
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        if number_fits(middle):
            low = middle
        else:
            high = middle
    return low


def predicted_speed(model: Model, request: Request) -> dict:
    """How fast it is (lab/planner/speed.py); {} for cards and for kinds that nobody measured."""
    setup = request.setup
    cards = speed.nominal(setup.gpus, request.cards.names)
    if cards is None or speed.unmeasured(model, setup):
        return {}
    cluster = replace(speed.reached(cards), fp8=request.cards.fp8)
    if isinstance(setup, Serving):
        predicted = serving_speed(model, setup, cluster)
    else:
        predicted = speed.train(model, setup, cluster)._asdict()
    return {name: rounded(name, value) for name, value in predicted.items()}


def serving_speed(model: Model, setup: Serving, cluster: speed.Machine) -> dict:
    tokens = min(1024, setup.max_model_len)
    division = {"tp": setup.tp, "dtype": setup.dtype}
    batch = min(setup.concurrency, setup.max_num_seqs)
    cache = {"kv_dtype": setup.kv_dtype, "batch": batch, "context": tokens}
    decode = speed.decode(model, cluster, **division, **cache)
    step_tokens = setup.max_num_batched_tokens
    prefill = speed.prefill(model, cluster, **division, tokens=tokens, step_tokens=step_tokens)
    return decode._asdict() | prefill._asdict()


def rounded(name: str, value: float | str) -> float | str:
    if isinstance(value, float):
        return round(value, 4 if name.endswith("ratio") else 2)
    return value


def fp8_notes(model: Model, request: Request, suggestion: str) -> list[str]:
    """What FP8 means on these cards, where the plan or the suggestion has some.

    Source: vllm/platforms/cuda.py, the backends' supports_kv_cache_dtype.
    """
    setup = request.setup
    cards = request.cards
    notes = []
    fp8_weights = "fp8" in (setup.dtype, model.stored) or "dtype fp8" in suggestion
    if fp8_weights and not cards.fp8:
        notes.append(
            f"{' + '.join(cards.names)} multiplies no FP8: "
            "weights of 8 bits save memory, and are computed with in 16"
        )
    fp8_cache = isinstance(setup, Serving) and setup.kv_dtype == "fp8"
    if fp8_cache or "kv-dtype fp8" in suggestion:
        by_triton = cards.fp8 and not model.latent_head and model.architecture != GPT_OSS
        way = "add --attention-backend TRITON_ATTN" if by_triton else "leave --kv-cache-dtype out"
        notes.append(
            "except on Hopper, vLLM reads an FP8 cache by FlashInfer, which nvcc compiles: "
            f"without a CUDA toolkit, {way}"
        )
    return notes


def start_notes(model: Model, setup: Serving, answer: dict) -> list[str]:
    """What vLLM says at its start where others have the memory that it wants; checkpoints to find.

    Source: vllm/v1/worker/utils.py, request_memory.
    """
    notes = []
    free = setup.free_memory_gib
    if free is not None and answer["budget_gib"] > free:
        notes.append(
            f"vLLM would not start: Free memory on device cuda:0 ({free:g}/"
            f"{setup.gpu_memory_gib:g} GiB) on startup is less than desired GPU memory "
            f"utilization ({answer['gpu_memory_utilization']:g}, {answer['budget_gib']:g} GiB)"
        )
    unused = setup.gpus // setup.pp
    reason = serving.obstacle(model, unused) if unused > answer["tp"] else ""
    if reason:
        notes.append(f"tensor parallelism over {unused} cards does not divide the model: {reason}")
    if "dtype int4" in answer["suggestion"] or setup.dtype == "int4":
        notes.append(
            "vLLM has no flag that makes int4: it is another checkpoint (AWQ or GPTQ) of the "
            "model, given as --model"
        )
    return notes


# -----------------------------------------------------------------------------
# An answer, for people


def show(request: Request, answer: dict) -> None:
    setup = request.setup
    names = " + ".join(request.cards.names)

    # What was asked.
    sizes = getattr(setup, "memories_gib", ()) or (setup.gpu_memory_gib,) * setup.gpus
    cards = f"{setup.gpus} x {sizes[0]:g}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
    heading = f"{request.task} {request.model} on {cards} GiB"
    if "parameters" in answer:
        heading += f", {answer['parameters'] / 1e9:.2f} B parameters"
    print(heading)

    # A card, the host, a disk.
    card = "the fullest card" if setup.gpus > 1 else "the card"
    moment = f", {answer['moment']}" if "moment" in answer else ""
    print(f"\n  GiB on {card}{moment}")
    for name, gib in answer["per_gpu_gib"].items():
        print(f"    {spelt(name):22}{gib:8.2f}")
    if "kv_tokens" in answer:
        utilization = f"--gpu-memory-utilization {answer['gpu_memory_utilization']:g}"
        division = f"--tp {answer['tp']} --pp {answer['pp']}"
        taken = f"vLLM takes {answer['budget_gib']} ({utilization} {division})"
        print(f"  {taken}; its cache holds {left_over(answer)} tokens")
        print(f"  {cache_of_request(answer)}")
    print(f"  host memory             {answer['host_gib']:8.1f}{host_parts(answer)}")
    if "nvme_gib" in answer:
        print(f"  files (NVMe)            {answer['nvme_gib']:8.1f}")

    # What is left, and what to know.
    if "max_micro_batch" in answer:
        print(f"  left over: {left_over(answer).split(';')[0]} a sequence")
    for note in answer.get("notes", []):
        print(f"  {note}")
    if "predicted_speed" in answer:
        why = speed.unmeasured(read_model(request.model), setup)
        print(f"  {speed_line(answer['predicted_speed'], names, why)}")

    # The verdict.
    if answer["fits"]:
        print("\nfits")
    else:
        print(f"\ndoes not fit; the cheapest change that does: {answer['suggestion']}")


def spelt(name: str) -> str:
    return name.replace("_", " ")


def left_over(answer: dict) -> str:
    """What a plan leaves, in the task's own terms."""
    host = f"host {answer['host_gib']:g} GiB"
    if "kv_tokens" in answer:
        requests = f"{answer['max_concurrency']:g} requests of {answer['max_model_len']:,}"
        return f"{answer['kv_tokens']:,} KV tokens = {requests}"
    if "max_micro_batch" in answer:
        batch = f"micro-batch up to {answer['max_micro_batch']:,}"
        return f"{batch}, or {answer['max_seq_len']:,} tokens; {host}"
    return host


def cache_of_request(answer: dict) -> str:
    """What a token and a request take of a card's cache."""
    token_kib = answer["kv_bytes_per_token"] / 2**10
    request_gib = answer["kv_bytes_per_request"] / 2**30
    request = f"a request of {answer['max_model_len']:,} tokens {request_gib:,.2f} GiB"
    return f"there a token takes {token_kib:,.1f} KiB, {request}"


def host_parts(answer: dict) -> str:
    """What the host's memory is made of; "" where it is one thing."""
    parts = []
    for name, gib in answer.get("host_parts_gib", {}).items():
        if name != "total" and gib:
            parts.append(f"{spelt(name)} {gib:.1f}")
    return f" = {' + '.join(parts)}" if len(parts) > 1 else ""


def speed_line(predicted: dict, names: str, unmeasured: str) -> str:
    if not predicted:
        return f"no predicted speed: {unmeasured or f'configs/cards.yaml has no {names}'}"
    shown = []
    for name, value in predicted.items():
        shown.append(f"{name} {value:,}" if isinstance(value, float) else f"{name} {value}")
    return f"predicted speed on {names}s: {', '.join(shown)}"


def show_repository() -> None:
    """What of this repository fits the cards here, and why: a line for each recipe."""
    cards = cards_here()
    title = f"this repository on {cards.count} x {' + '.join(cards.names)}"
    print(f"{title:44} {'GiB on a card':>13}  {'most of it':42} left over")
    for command, _, request in recipes(cards):
        if request.setup.gpus > cards.count:
            print(f"{command:44} {'-':>13}  needs {request.setup.gpus} cards")
            continue
        answer = plan(request)
        total = answer["per_gpu_gib"]["total"]
        does_not = f"DOES NOT FIT: {answer['suggestion']}"
        verdict = left_over(answer) if answer["fits"] else does_not
        print(f"{command:44} {total:13.1f}  {two_largest(answer):42} {verdict}")
    print(
        f"\nCUDA sees {cards.memory_gib:g} GiB of a card here. Predictions; "
        "held against measurement in modules/01_single_gpu_smoke/planner.md."
    )


def two_largest(answer: dict) -> str:
    """The two largest parts of the fullest card."""
    parts = {name: gib for name, gib in answer["per_gpu_gib"].items() if name != "total"}
    names = sorted(parts, key=parts.get, reverse=True)[:2]
    return ", ".join(f"{spelt(name)} {parts[name]:.1f}" for name in names)


def main() -> None:
    cards = cards_here()
    args = parser(cards, __doc__).parse_args()
    if args.task is None:
        show_repository()
        results.note("scripts/plan")
        return
    request = asked(args, cards)
    answer = plan(request)
    results.note("scripts/plan")
    if args.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        show(request, answer)


if __name__ == "__main__":
    main()
