"""Speculative decoding without a second model: guess from the text so far, check all in one pass.

A step of decoding reads all weights for one token. With n-grams (arXiv 2304.04487) the engine looks
for the last few tokens earlier in the text and proposes what followed them there; the model
computes all proposals in one step and keeps those it would have chosen itself. The answer is the
same, up to rounding; only the steps are fewer, where the text repeats itself: quoting, editing,
code.

    make speculative
    python modules/03_vllm/09_speculative.py --guesses 8

Look at: tokens guessed and the share accepted, and tokens/s of an answer that copies against one
that tells a story. A small model that tells greedily soon repeats itself, which is easily guessed;
sampled, it does not, and there is hardly anything to guess from. Requests run one at a time: a full
batch has no idle arithmetic to guess with.
"""

import argparse
import json

from closed_loop import drive, warm_up  # the file beside this one

from lab import data, engine, fail, jobs, models, results
from lab.profile import load_profile
from lab.table import table

PARAGRAPH = (
    "The lighthouse keeper wrote down every ship that passed: its name, its flag, the hour, and the"
    " weather. On some nights there were none, and he wrote that down as well. After forty years"
    " the book was so heavy that two men had to carry it to the archive."
)
COPY = f"{PARAGRAPH}\n\nThe same text once more:\n\n"


def main() -> None:
    profile = load_profile()
    defaults = profile.throughput
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_model_flag(parser, defaults.model)
    parser.add_argument(
        "--guesses", type=int, default=4, help="tokens proposed a step (default: %(default)s)"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=48, help="of each answer (default: %(default)s)"
    )
    args, flags = parser.parse_known_args()
    if min(args.guesses, args.answer_tokens) < 1:
        fail("--guesses and --answer-tokens must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    from vllm import SamplingParams

    def params(temperature: float) -> SamplingParams:
        length = {"max_tokens": args.answer_tokens, "ignore_eos": True}
        return SamplingParams(temperature=temperature, seed=0, **length)

    stories = [prompt for prompt, _ in data.trace(3, 1, 4, 0, 0)]
    requests = {
        "copies": [(COPY + PARAGRAPH[:begun], params(0)) for begun in (0, 60, 120)],
        "tells, greedy": [(story, params(0)) for story in stories],
        "tells, sampled": [(story, params(1)) for story in stories],
    }
    ngram = {
        "method": "ngram",
        "num_speculative_tokens": args.guesses,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    ways = {"plain": [], "guessing": ["--speculative-config", json.dumps(ngram)]}

    # -----------------------------------------------------------------------------
    # 1. The same requests, one at a time, without guesses and with them

    rates: dict[tuple[str, str], float] = {}
    answers: dict[tuple[str, str], list] = {}
    guesses: dict[str, tuple[int, float]] = {}  # how many, and the share accepted
    for way, more in ways.items():
        vllm = engine.start(folder, profile.dtype, defaults.args, [*flags, *more])
        warm_up(vllm)
        for kind, asked in requests.items():
            before = engine.counters(vllm)
            run = drive(vllm, asked, window=1)
            after = engine.counters(vllm)

            answers[way, kind] = [timing.tokens for timing in run.timings]
            decoding = sum(timing.last - timing.first for timing in run.timings)
            rates[way, kind] = len(asked) * (args.answer_tokens - 1) / decoding
            if way == "guessing":
                new = {name: after[name] - before[name] for name in after}
                guessed = int(new["spec_decode_num_draft_tokens"])
                accepted = new["spec_decode_num_accepted_tokens"] / max(guessed, 1)
                guesses[kind] = guessed, accepted
        engine.stop(vllm)

    # -----------------------------------------------------------------------------
    # 2. Side by side

    rows = []
    metrics = {}
    for kind, asked in requests.items():
        plain = rates["plain", kind]
        guessing = rates["guessing", kind]
        guessed, accepted = guesses[kind]
        name = kind.replace(", ", "_")
        metrics |= {
            f"{name}_plain_tok_per_s": round(plain, 1),
            f"{name}_guessing_tok_per_s": round(guessing, 1),
            f"{name}_speedup_ratio": round(guessing / plain, 2),
            f"{name}_guessed_count": guessed,
            f"{name}_accepted_ratio": round(accepted, 3),
        }
        same = "-"  # two samples of one distribution need not be equal
        if not kind.endswith("sampled"):
            pairs = zip(answers["plain", kind], answers["guessing", kind], strict=True)
            metrics[f"{name}_same_count"] = sum(one == other for one, other in pairs)
            same = f"{metrics[f'{name}_same_count']} of {len(asked)}"
        speed = [f"{plain:.1f}", f"{guessing:.1f}", f"{guessing / plain:.2f}x"]
        rows.append([kind, *speed, guessed, f"{accepted:.0%}", same])
    print("\ntokens/s of the answer, without guesses and with them")
    columns = ["the answer", "plain", "guessing", "gain", "guessed", "accepted", "same answers"]
    table(columns, rows)
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
