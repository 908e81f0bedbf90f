"""Speculative decoding without a second model: guess the next tokens from the text so far, and let one pass check them all.

A step of decoding reads all weights for one token. With n-grams (arXiv 2304.04487) the engine looks for the last few tokens earlier in
the text and proposes what followed them there; the model computes all proposals in one step and keeps those it would have chosen itself.
The answer is the same, up to rounding; only the steps are fewer, where the text repeats itself: quoting, editing, code.

    make speculative
    python modules/03_vllm/09_speculative.py --guesses 8

Look at: tokens guessed and the share accepted, and tokens/s of an answer that copies against one that tells a story. A small model
that tells greedily soon repeats itself, which is easily guessed; sampled, it does not, and there is hardly anything to guess from.
Requests run one at a time: a full batch has no idle arithmetic to guess with.
"""

import argparse
import json

from lab import data, engine, fail, jobs, models, results
from lab.profile import load_profile

PARAGRAPH = (
    "The lighthouse keeper wrote down every ship that passed: its name, its flag, the hour, and the weather. On some nights there were"
    " none, and he wrote that down as well. After forty years the book was so heavy that two men had to carry it to the archive."
)


def main() -> None:
    profile = load_profile()
    p = profile.throughput
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=p.model, help="name in configs/models.yaml, hub id or folder (default: %(default)s)")
    parser.add_argument("--guesses", type=int, default=4, help="tokens proposed a step (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=48, help="of each answer (default: %(default)s)")
    args, flags = parser.parse_known_args()
    if min(args.guesses, args.answer_tokens) < 1:
        fail("--guesses and --answer-tokens must be at least 1")
    jobs.refuse_taken_cards()
    folder = models.model_folder(args.model)

    from vllm import SamplingParams

    def params(temperature: float) -> SamplingParams:
        return SamplingParams(temperature=temperature, seed=0, max_tokens=args.answer_tokens, ignore_eos=True)

    stories = [prompt for prompt, _ in data.trace(3, 1, 4, 0, 0)]
    requests = {
        "copies": [(f"{PARAGRAPH}\n\nThe same text once more:\n\n{PARAGRAPH[:start]}", params(0)) for start in (0, 60, 120)],
        "tells, greedy": [(story, params(0)) for story in stories],
        "tells, sampled": [(story, params(1)) for story in stories],
    }
    speculative = json.dumps({"method": "ngram", "num_speculative_tokens": args.guesses, "prompt_lookup_min": 2, "prompt_lookup_max": 4})

    # -----------------------------------------------------------------------------
    # 1. The same requests, one at a time, without guesses and with them

    rates: dict[tuple[str, str], float] = {}
    guesses: dict[str, tuple[int, float]] = {}
    answers: dict[tuple[str, str], list] = {}
    for way, more in (("plain", []), ("guessing", ["--speculative-config", speculative])):
        vllm = engine.start(folder, profile.dtype, p.args, [*flags, *more])
        engine.warm_up(vllm)
        for kind, asked in requests.items():
            before = engine.counters(vllm)
            _, timings, _ = engine.drive(vllm, asked, window=1)
            after = engine.counters(vllm)
            answers[way, kind] = [t.tokens for t in timings]
            decoding = sum(t.last - t.first for t in timings)
            rates[way, kind] = len(asked) * (args.answer_tokens - 1) / decoding
            if more:
                guessed, accepted = (after[f"spec_decode_num_{what}_tokens"] - before[f"spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
                guesses[kind] = int(guessed), accepted / max(guessed, 1)
        engine.stop(vllm)

    # -----------------------------------------------------------------------------
    # 2. Side by side

    print(f"\n{'the answer':16}{'plain':>8}{'guessing':>11}   tokens/s{'guessed':>13}{'accepted':>11}{'same answers':>15}")
    metrics = {}
    for kind, asked in requests.items():
        plain, guessing, (guessed, accepted) = rates["plain", kind], rates["guessing", kind], guesses[kind]
        same = sum(a == b for a, b in zip(answers["plain", kind], answers["guessing", kind], strict=True))
        said = "-" if kind.endswith("sampled") else f"{same} of {len(asked)}"  # two samples of one distribution need not be equal
        print(f"{kind:16}{plain:8.1f}{guessing:11.1f} = {guessing / plain:4.2f}x{guessed:15}{accepted:11.0%}{said:>15}")
        name = kind.replace(", ", "_")
        metrics |= {f"{name}_plain_tok_per_s": round(plain, 1), f"{name}_guessing_tok_per_s": round(guessing, 1)}
        metrics |= {f"{name}_speedup_ratio": round(guessing / plain, 2), f"{name}_guessed_count": guessed, f"{name}_accepted_ratio": round(accepted, 3)}
        metrics |= {} if said == "-" else {f"{name}_same_count": same}
    results.finish(__file__, metrics, vars(args))


if __name__ == "__main__":
    main()
