"""Distillation: answers of a larger model as training data, those that a checker lets pass.

    make vllm-serve                                  # the teacher; MODEL=qwen2.5-32b-instruct-awq
    make lf-distill ARGS="--limit 32"
    make lf-distill ARGS="--tries 4 --temperature 0.8"
    make lf-distill ARGS="--shots 0"                 # without examples in the prompt

The teacher is asked the requests of a data set, whose own answers it does not see. It is shown a
few examples; its student will learn the answers without them. An answer that breaks a rule is
thrown away and asked for again, up to --tries times (rejection sampling). The rules know nothing of
the right answer: they are what you would write for your own task, `passes` below.
Look at: how many answers pass, and how many of those that do are right.
"""

import argparse
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import factory
import publishing

from lab import data, fail, results, shown
from lab.profile import load_profile

AT_ONCE = 16  # requests that are under way; vLLM batches them
FIELDS = ("model", "gpus", "port", "max_len", "dtype")


def passes(request: str, answer: str) -> bool:
    """Whether an answer keeps the rules: one line of JSON, these fields, values from the request.

    >>> passes("Serve a on 2 GPUs ...", '{"model": "a", "gpus": 2}')  # a field is missing
    False
    """
    try:
        values = json.loads(answer)
    except ValueError:
        return False
    if not isinstance(values, dict) or tuple(values) != FIELDS or "\n" in answer:
        return False
    request_words = re.findall(r"[\w.-]*\w", request)  # without the comma after a word
    return all(str(value) in request_words for value in values.values())


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    server = f"http://127.0.0.1:{profile.serve.port}/v1"
    parser.add_argument("--base-url", default=server, help="the teacher (default: %(default)s)")
    asked = "data set whose requests are asked (default: %(default)s)"
    parser.add_argument("--dataset", default="launch_en_varied", help=asked)
    parser.add_argument("--limit", type=int, default=0, help="first rows of it (default: all)")
    parser.add_argument("--shots", type=int, default=3, help="examples shown (default: 3)")
    parser.add_argument("--tries", type=int, default=1, help="answers to a request (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="(default: 0)")
    args = parser.parse_args()
    if args.tries > 1 and not args.temperature:
        fail("at temperature 0 every try gives the same answer: --temperature 0.8")
    if args.tries < 1 or args.shots < 0:
        fail("--tries must be at least 1, --shots at least 0")
    rows = data.rows(args.dataset)
    shots = [message for row in rows[: args.shots] for message in row["messages"]]
    rows = rows[args.shots :][: args.limit or None]

    import openai

    key = os.environ.get("VLLM_API_KEY", "unused")
    client = openai.OpenAI(base_url=args.base_url, api_key=key, max_retries=0)

    # -----------------------------------------------------------------------------
    # 1. Ask, check, ask again

    def ask(request: str) -> str | None:
        """The teacher's first answer that keeps the rules."""
        for _ in range(args.tries):
            reply = client.chat.completions.create(
                model=teacher,
                messages=[*shots, {"role": "user", "content": request}],
                temperature=args.temperature,
                max_tokens=200,
            )
            answer = (reply.choices[0].message.content or "").strip()
            if passes(request, answer):
                return answer
        return None

    try:
        teacher = client.models.list().data[0].id
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(ask, [row["messages"][0]["content"] for row in rows]))
    except openai.APIConnectionError:
        fail(f"no server answers at {args.base_url}: start one with 'make vllm-serve'")
    except openai.APIStatusError as e:
        fail(f"the server refused the request: {e.message}")

    # -----------------------------------------------------------------------------
    # 2. The answers that pass are a data set

    kept = []
    right = 0
    for row, answer in zip(rows, answers, strict=True):
        request, known = row["messages"]
        if answer:
            kept.append({"messages": [request, known | {"content": answer}]})
            right += answer == known["content"]
    print(
        f"{teacher}: {len(kept)} of {len(rows)} answers keep the rules, {right} of them are right"
    )
    folder = factory.FOLDER / "distilled"
    info = json.loads((data.FOLDER / "dataset_info.json").read_text())
    entry = info["launch_en_train"] | {"file_name": "distilled.json"}
    if not kept:
        fail("nothing is kept: more --shots, --tries, or a larger teacher")
    publishing.write(folder / "distilled.json", kept)
    publishing.write(folder / "dataset_info.json", {"distilled": entry})
    print(f"make lf-check-data FILE={shown(folder)}/distilled.json")
    print(f'make lf-train ARGS="dataset=distilled dataset_dir={shown(folder)}"')
    results.note(results.name_of(__file__))


if __name__ == "__main__":
    main()
