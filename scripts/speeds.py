"""How fast you should see this repository's commands run, on your cards or on two RTX 4090s.

    make speeds
    make speeds ARGS=--check      # the same formulas against the records of other machines

Each line is a prediction (lab/planner/speed.py) with a range. Its slow end: as far off as the same
formulas are, at the worst, from what was measured on other cards, on lines that fixed none of their
constants. Its fast end: the same the other way, on cards that reach their nominal rates in full,
with a host that launches, and a link that carries, twice as much as supposed. After
`make calibrate ARGS="--only roofline"` your own machine's rates are taken instead.

Look at: a line of yours outside its range. Then something is wrong: another program on the card, a
slot with fewer lanes, a card that throttles; `make doctor` and `make gauges` say which.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from plan_parts import Cards, Request, cards_here, read_model
from plan_parts.arguments import read_line
from plan_parts.recipes import recipes
from tables import records
from trainings import model_of, training_of

from lab import ROOT, fail, results
from lab import machine as this_machine
from lab.planner import speed
from lab.profile import read_yaml
from lab.table import table

PROMPT = 256  # tokens, of a request to a busy server, as in `make vllm-bench`
ANSWER = 128
TRAININGS = (  # of the records of trainings.py those that are predicted
    *("04_Accelerate/01_train_ddp", "04_Accelerate/02_train_accelerate-fsdp"),
    *("05_DeepSpeed/train-z1", "05_DeepSpeed/train-z2", "05_DeepSpeed/train-z3"),
)
SHOWN = (  # of the recipes those whose kind of model and of engine was measured
    *("make vllm-serve RECIPE=7b-one-card", "make vllm-serve RECIPE=7b-fp8", "make vllm-serve"),
    *("make train-ddp", "make train-accelerate CONFIG=fsdp"),
    *("make train-z1", "make train-z2", "make train-z3"),
)
TUNINGS = ("lora-7b-ckpt", "qlora-7b-ckpt")  # lines of configs/calibration.yaml

# -----------------------------------------------------------------------------
# The formulas against the records


class Compared(NamedTuple):
    """A time of a record: predicted from its machine's own roofline, and measured."""

    kind: str  # decode, prefill, training or busy
    machine: str
    name: str  # of the record
    use: str  # fit, where it fixed constants, else test
    what: str
    predicted_ms: float
    measured_ms: float

    @property
    def faster(self) -> float:
        """How much faster than predicted it was: 0.9 where it was slower."""
        return self.predicted_ms / self.measured_ms

    @property
    def numbers(self) -> tuple[str, str, str]:
        """Predicted and measured in ms, and the error, as they are shown."""
        times = (f"{self.predicted_ms:,.2f}", f"{self.measured_ms:,.2f}")
        return *times, f"{self.faster - 1:+.1%}"


def with_roofline(name: str) -> Iterator[tuple[str, dict, dict]]:
    """(machine, record of this name, what the machine reaches itself), where that was measured.

    A cap of the memory changes no speed.
    """
    reached = {
        machine.removesuffix("-cap24"): record["metrics"]
        for machine, record in records("scripts/calibrate-roofline").items()
    }
    for machine, record in records(name).items():
        roofline = reached.get(machine.removesuffix("-cap24"))
        if roofline:
            yield machine, record, roofline


def compared() -> Iterator[Compared]:
    """Every time in the records of machines whose roofline was measured."""
    for name, case in read_yaml(ROOT / "configs/calibration.yaml").items():
        request = read_line(case["plan"])
        if speed.unmeasured(read_model(request.model), request.setup):
            continue
        use = case.get("speed", "test")
        for machine, record, roofline in with_roofline(f"scripts/calibrate-{name}"):
            cluster = speed.measured(roofline, request.setup.gpus)
            for kind, *time in times(request, cluster, record["metrics"]):
                yield Compared(kind, machine, name, use, *time)
    yield from compared_trainings()
    yield from compared_busy()


def times(request: Request, cluster: speed.Machine, metrics: dict) -> Iterator[tuple]:
    """(kind, what, predicted ms, measured ms) of each time in a record of `make calibrate`."""
    model = read_model(request.model)
    setup = request.setup
    if request.task == "train":
        if "step_ms" in metrics:
            step_ms = 1e3 * speed.train(model, setup, cluster).step_s
            what = f"a step of {setup.tokens:,} tokens a card"
            yield "training", what, step_ms, metrics["step_ms"]
        return
    division = {"tp": setup.tp, "dtype": setup.dtype}
    for name, measured in metrics.items():
        if name.startswith("batch_"):
            batch = int(name.split("_")[1])
            # scripts/calibrate_serving.py: 16 tokens of prompt, 128 of answer.
            predicted = speed.decode(model, cluster, **division, batch=batch, context=80).step_ms
            yield "decode", f"a step of {batch} requests", predicted, measured
        if name.startswith("prefill_"):
            prompts, tokens = map(int, name.split("_")[1].split("x"))
            predicted = speed.prefill(model, cluster, **division, tokens=tokens, prompts=prompts)
            yield "prefill", f"{prompts} x {tokens} tokens", predicted.ttft_ms, measured


def compared_busy() -> Iterator[Compared]:
    """`make vllm-bench` of the 14B on two cards, with as many requests in flight as it says."""
    model = read_model("qwen2.5-14b-instruct")
    for machine, record, roofline in with_roofline("03_vllm/13_bench"):
        config = record["config"]
        if "14b" not in config["model"]:
            continue
        cluster = speed.measured(roofline, 2)
        load = {"prompt": config["input_tokens"], "answer": config["output_tokens"]}
        for requests in config["concurrencies"]:
            rate = record["metrics"][f"concurrency_{requests}_tok_per_s"]
            predicted = speed.busy(model, cluster, tp=2, requests=requests, **load)
            what = f"a token, {requests} requests in flight"
            ms = (1e3 / predicted, 1e3 / rate)
            yield Compared("busy", machine, "13_bench", "test", what, *ms)


def compared_trainings() -> Iterator[Compared]:
    """The records of modules 04 and 05, each with its own batch."""
    for name in TRAININGS:
        for machine, record, roofline in with_roofline(name):
            metrics = record["metrics"]
            setup = training_of(record)
            cluster = speed.measured(roofline, setup.gpus)
            step_s = speed.train(model_of(record), setup, cluster).step_s
            measured_s = metrics["step_tok_count"] / metrics["throughput_tok_per_s"]
            what = f"a step of {setup.tokens:,} tokens a card"
            ms = (1e3 * step_s, 1e3 * measured_s)
            yield Compared("training", machine, name.split("/")[1], "test", what, *ms)


@cache
def ranges() -> dict[str, tuple[float, float]]:
    """{kind: (slowest, fastest)} of measured over predicted speed.

    On lines that fixed nothing, and on other machines than this one, which is to be judged.
    """
    seen: dict[str, list[float]] = {}
    for row in compared():
        if row.use == "test" and row.machine != this_machine.name():
            seen.setdefault(row.kind, [1.0]).append(row.faster)
    return {kind: (min(ratios), max(ratios)) for kind, ratios in seen.items()}


# -----------------------------------------------------------------------------
# What to expect


class Expected(NamedTuple):
    """A command of this repository, and one of the speeds that it shows."""

    command: str
    what: str
    unit: str  # tokens/s, or ms
    predicted: float
    low: float
    high: float


def expected(cards: Cards) -> Iterator[Expected]:
    """Every speed of the commands in SHOWN, and of TUNINGS, that these cards can run.

    Raises SystemExit(2) where configs/cards.yaml does not know the cards.
    """
    off = ranges()
    nothing_measured = (1.0, 1.0)
    for command, request in shown_requests(cards):
        likely, at_best = clusters(cards, request.setup.gpus)
        both = zip(speeds(request, likely), speeds(request, at_best), strict=True)
        for (kind, what, unit, predicted), (*_, best) in both:
            slow, fast = off.get(kind, nothing_measured)
            ends = (best / fast, predicted / slow)
            if unit == "tokens/s":
                ends = (predicted * slow, best * fast)
            yield Expected(command, what, unit, predicted, *ends)


def shown_requests(cards: Cards) -> Iterator[tuple[str, Request]]:
    """(command, what it asks for) of everything that is shown."""
    requests = {recipe.command: recipe.request for recipe in recipes(cards)}
    requests = {command: requests[command] for command in SHOWN if command in requests}
    lines = read_yaml(ROOT / "configs/calibration.yaml")
    for name in TUNINGS:
        requests[f'make calibrate ARGS="--only {name}"'] = read_line(lines[name]["plan"])
    for command, request in requests.items():
        if request.setup.gpus <= cards.count:
            yield command, request


def clusters(cards: Cards, gpus: int) -> tuple[speed.Machine, speed.Machine]:
    """`gpus` of these cards as they likely are, and at best; both the same once measured."""
    file = results.FOLDER / "scripts/calibrate-roofline.json"
    if this_machine.gpus() and file.exists():
        here = speed.measured(json.loads(file.read_text(encoding="utf-8"))["metrics"], gpus)
        return here, here
    nominal = speed.nominal(gpus, cards.names)
    if nominal is None:
        fail(f"configs/cards.yaml has no {' + '.join(cards.names)}: add its nominal rates")
    nominal = replace(nominal, fp8=cards.fp8)
    at_best = replace(nominal, launch=nominal.launch / 2, link=2 * nominal.link)
    return speed.reached(nominal), at_best


def speeds(request: Request, cluster: speed.Machine) -> Iterator[tuple]:
    """(kind, what, unit, predicted) of each speed that a command shows."""
    model = read_model(request.model)
    setup = request.setup
    if request.task == "train":
        trained = speed.train(model, setup, cluster)
        yield "training", "trained", "tokens/s", trained.train_tok_per_s
        return
    division = {"tp": setup.tp, "dtype": setup.dtype}
    alone = speed.decode(model, cluster, **division, context=1024)
    yield "decode", "one request", "tokens/s", alone.decode_tok_per_s
    prefill = speed.prefill(model, cluster, **division, tokens=1024)
    yield "prefill", "first token after 1,024", "ms", prefill.ttft_ms
    for requests in (16, 64):
        load = {"requests": requests, "prompt": PROMPT, "answer": ANSWER}
        rate = speed.busy(model, cluster, **division, **load)
        yield "busy", f"{requests} requests in flight", "tokens/s", rate


class Published(NamedTuple):
    """What somebody measured on one RTX 4090, and what is predicted of it."""

    model: str
    load: str
    predicted: float  # tokens/s, as is `measured`
    measured: float
    source: str

    @property
    def numbers(self) -> tuple[str, str, str]:
        """Predicted, published and their ratio, as they are shown."""
        rates = (three_digits(self.predicted), three_digits(self.measured))
        return *rates, f"{self.measured / self.predicted:.2f}"


def published() -> Iterator[Published]:
    """Of configs/published.yaml."""
    cluster = replace(speed.reached(speed.nominal(1)), gpus=1)
    for entry in read_yaml(ROOT / "configs/published.yaml").values():
        model = read_model(entry["model"])
        load = {"prompt": entry["prompt"], "answer": entry["answer"]}
        for requests, measured in entry["tok_per_s"].items():
            predicted = speed.busy(model, cluster, requests=requests, **load)
            words = f"{requests} x {entry['prompt']} + {entry['answer']} tokens"
            yield Published(entry["model"], words, predicted, measured, entry["source"])


# -----------------------------------------------------------------------------
# On the screen


def show_expected(cards: Cards) -> None:
    print(f"on {cards.count} x {' + '.join(cards.names)}, predicted")
    rows = []
    for row in expected(cards):
        between = f"{three_digits(row.low)} to {three_digits(row.high)}"
        rows.append([row.command, row.what, three_digits(row.predicted), between, row.unit])
    table(["", "", "predicted", "range", "unit"], rows)
    print("\nothers have measured on one RTX 4090 (configs/published.yaml)")
    rows = []
    for row in published():
        rows.append([row.model, row.load, *row.numbers])
    table(["", "", "predicted", "published", "published / predicted"], rows)


def show_compared() -> None:
    rows = []
    for row in compared():
        rows.append([row.kind, row.name, row.what, *row.numbers, row.machine, row.use])
    table(["", "", "", "predicted, ms", "measured, ms", "error", "", ""], rows)


def three_digits(value: float) -> str:
    """As a person would write it: 1234.5 as 1,230.

    >>> three_digits(1234.5), three_digits(62.35), three_digits(8.1234)
    ('1,230', '62.4', '8.12')
    """
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{round(value, 2 - math.floor(math.log10(value))):,.{digits}f}"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--check", action="store_true", help="predicted beside measured instead")
    args = parser.parse_args()
    if args.check:
        show_compared()
    else:
        show_expected(cards_here())
    results.note("scripts/speeds")


if __name__ == "__main__":
    main()
