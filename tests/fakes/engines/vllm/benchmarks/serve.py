"""Stand-in for `vllm bench serve`: one request to the server, then numbers that mean nothing."""

import json
import os
import urllib.request
from pathlib import Path
from types import SimpleNamespace

from vllm.utils import argparse_utils


class FlexibleArgumentParser(argparse_utils.FlexibleArgumentParser):
    command = "vllm bench serve"


def add_cli_args(_):
    pass


def get_tokenizer(folder):
    assert Path(folder, "config.json").is_file(), f"{folder} holds no model"


def get_samples(args, _):
    return [SimpleNamespace(expected_output_len=4)] * args.num_prompts


def main(args):
    body = json.dumps(
        {"model": args.served_model_name[0], "prompt": "Hello", "max_tokens": 4}
    ).encode()
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
    }
    with urllib.request.urlopen(
        urllib.request.Request(f"{args.base_url}/v1/completions", body, headers)
    ) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    n = args.num_prompts
    result = {
        "completed": n,
        "duration": 1.0,
        "request_throughput": n,
        "request_goodput": n,
        "output_throughput": 4.0 * n,
    }
    result |= {
        "errors": [""] * n,
        "output_lens": [4] * n,
        "ttfts": [0.01] * n,
        "itls": [[0.01] * 3] * n,
        "start_times": [float(i) for i in range(n)],
    }
    return result | {f"p{q}_{name}_ms": 10.0 for q in (50, 99) for name in ("ttft", "itl", "e2el")}
