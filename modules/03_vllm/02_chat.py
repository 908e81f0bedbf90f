"""Talk to the running server as a program would: the openai package, the answer token by token.

    make vllm-serve                                          # first, if it is not running
    python modules/03_vllm/02_chat.py
    python modules/03_vllm/02_chat.py --prompt "Explain paging in one sentence." --max-tokens 100

Look at: the time to the first token (TTFT: the prompt is read in one pass, prefill), then the time
between tokens (ITL: one pass over the weights each, decode).
"""

import argparse
import os
import time

from lab import fail, results
from lab.profile import load_profile


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url",
        default=f"http://127.0.0.1:{profile.serve.port}/v1",
        help="the server (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        default="What is the capital of France, and what is it known for?",
        help="what to ask (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=60,
        help="most tokens of the answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time (default: %(default)s)",
    )
    args = parser.parse_args()
    if not args.prompt.strip():
        fail("the prompt is empty: say something with --prompt")

    import openai

    client = openai.OpenAI(
        base_url=args.base_url, api_key=os.environ.get("VLLM_API_KEY", "unused"), max_retries=0
    )

    # -----------------------------------------------------------------------------
    # 1. Ask, and print each piece as it arrives

    try:
        model = client.models.list().data[0].id
        usage = None
        stamps = []  # when each piece of the answer arrived
        began = time.perf_counter()
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": args.prompt}],
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            stream=True,
            stream_options={"include_usage": True},  # the last piece counts the tokens
        )
        print(f"{model} > {args.prompt}\n< ", end="", flush=True)
        for piece in stream:
            usage = piece.usage or usage
            if piece.choices and piece.choices[0].delta.content:
                stamps.append(time.perf_counter())
                print(piece.choices[0].delta.content, end="", flush=True)
    except openai.APIConnectionError:
        fail(f"no server answers at {args.base_url}: start one with 'make vllm-serve'")
    except openai.APIStatusError as e:
        reason = e.body.get("message", e) if isinstance(e.body, dict) else e
        fail(f"the server refused the request: {reason}")

    # -----------------------------------------------------------------------------
    # 2. What the reader felt

    first_s = stamps[0] - began
    between_s = (stamps[-1] - stamps[0]) / max(usage.completion_tokens - 1, 1)
    latencies = f"TTFT {first_s * 1000:.0f} ms   ITL {between_s * 1000:.1f} ms"
    print(f"\n\n{usage.prompt_tokens} tokens in, {usage.completion_tokens} out   {latencies}")
    metrics = {
        "ttft_ms": round(first_s * 1000, 1),
        "itl_ms": round(between_s * 1000, 2),
        "prompt_tokens_count": usage.prompt_tokens,
        "completion_tokens_count": usage.completion_tokens,
    }
    results.finish(__file__, metrics, vars(args) | {"model": model})


if __name__ == "__main__":
    main()
