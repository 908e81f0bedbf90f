"""What 13_bench.py makes of vLLM's results: a point, the knee, and what is refused."""

from dataclasses import dataclass

import numpy as np

from lab import fail

GOOD = 0.9  # the share of requests that must meet the objectives


@dataclass
class Answer:
    """One request that was answered; times in seconds."""

    start: float  # when it was sent
    ttft: float
    gaps: list[float]  # between its pieces; a piece may hold several tokens
    tokens: int

    @property
    def e2e(self) -> float:
        return self.ttft + sum(self.gaps)

    @property
    def tpot(self) -> float:
        """Time per output token: the mean after the first."""
        return sum(self.gaps) / max(self.tokens - 1, 1)


@dataclass
class Objectives:
    """What a request must meet to be good."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, answer: Answer) -> bool:
        return 1000 * answer.ttft <= self.ttft_ms and 1000 * answer.tpot <= self.tpot_ms


def answers(result: dict) -> list[Answer]:
    """Those of a result of `vllm bench serve --save-detailed` that did not fail, as sent."""
    columns = ("start_times", "ttfts", "itls", "output_lens", "errors")
    rows = zip(*(result[name] for name in columns), strict=True)
    answered = [Answer(*row) for *row, error in rows if not error]
    return sorted(answered, key=lambda answer: answer.start)


def objectives(alone: list[Answer], args) -> Objectives:
    """The ones that were asked for, else `args.slack` times what a lone client sees (median)."""
    ttft_ms = 1000 * np.median([answer.ttft for answer in alone])
    tpot_ms = 1000 * np.median([answer.tpot for answer in alone])
    return Objectives(
        args.slo_ttft_ms or round(args.slack * float(ttft_ms), 1),
        args.slo_tpot_ms or round(args.slack * float(tpot_ms), 1),
    )


def steady(result: dict, lead: int, wanted: Objectives) -> dict | None:
    """A point's metrics without its first `lead` requests, until the last one is sent.

    `result` is that of `vllm bench serve --save-detailed`. None where too few were answered.
    """
    answered = answers(result)
    if len(answered) < lead + 2:
        return None
    sent = answered[lead:]
    begin, end = sent[0].start, sent[-1].start
    window_s = end - begin

    # What the server did within the window, also for requests that were sent before it.
    served, tokens = 0, 0.0
    for answer in answered:
        arrivals = answer.start + answer.ttft + np.cumsum([0, *answer.gaps])
        inside = (arrivals > begin) & (arrivals <= end)
        served += bool(inside[-1])
        tokens += answer.tokens * inside.mean()

    # What the requests that were sent within it saw.
    good = np.mean([wanted.met_by(answer) for answer in sent])
    latencies = {
        "ttft": [answer.ttft for answer in sent],
        "itl": [gap for answer in sent for gap in answer.gaps],
        "e2e": [answer.e2e for answer in sent],
    }
    metrics = {
        "window_s": window_s,
        "req_per_s": served / window_s,
        "goodput_req_per_s": good * served / window_s,
        "good_ratio": good,
        "tok_per_s": tokens / window_s,
    }
    for name, seconds in latencies.items():
        for q in (50, 99):
            metrics[f"{name}_p{q}_ms"] = 1000 * np.percentile(seconds or [0], q)
    rounded = {name: round(float(value), 3) for name, value in metrics.items()}
    return {"sent_count": len(result["errors"])} | rounded


def knee(shares: list[float]) -> int | None:
    """Index of the last of rising loads with at least GOOD good requests.

    A lighter load that has fewer was disturbed, not overloaded.
    """
    return max((i for i, share in enumerate(shares) if share >= GOOD), default=None)


def check(args) -> None:
    """Exit code 2 where the flags ask for loads or objectives that there are not."""
    if min(args.concurrencies) < 1 or min(args.prompts, args.input_tokens, args.output_tokens) < 2:
        least = "--prompts, --input-tokens and --output-tokens at least 2"
        fail(f"--concurrencies must be at least 1, {least}")
    slos = [slo for slo in (args.slo_ttft_ms, args.slo_tpot_ms) if slo is not None]
    if not 0 < min([*args.rates, args.answers, args.slack, *slos]):
        fail("--rates, --answers, --slack, --slo-ttft-ms and --slo-tpot-ms must be positive")
    if max(args.rates) == float("inf"):
        fail("--rates must be finite")
