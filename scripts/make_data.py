"""Write the data set of the training stages: a request in plain words -> the launch specification
as JSON.

    python scripts/make_data.py            # writes modules/06_LLaMA-Factory/data/*.json, always the same (fixed seed)
    python scripts/make_data.py --check    # writes nothing; exit code 1 when the files differ from what the script would write

An untuned model answers such a request with prose; a tuned one with one line of JSON, scored by
exact match. The held-out split uses phrasings that training does not have and combinations of
values that training does not have: what it measures is understanding, not memory. English for the
embedded 135M model, Chinese too for Qwen.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

from lab import ROOT, shown

FOLDER = ROOT / "modules" / "06_LLaMA-Factory" / "data"
SIZES = {"train": 384, "test": 64}
SEED = 4090

# The values of the five fields, in the order in which the JSON has them.
VALUES = {
    "model": [
        "qwen2.5-0.5b",
        "qwen2.5-7b",
        "qwen2.5-14b",
        "qwen2.5-32b",
        "llama-3-8b",
        "mistral-7b",
        "smollm2-135m",
        "yi-34b",
    ],
    "gpus": [1, 2, 3, 4, 6, 8],
    "port": [8000, 8001, 8080, 8888, 9000, 9001, 5000, 7860, 6006, 8500],
    "max_len": [512, 1024, 2048, 4096, 8192, 16384],
    "dtype": ["float16", "bfloat16", "float32", "int4", "fp8"],
}

# Whole phrasings of a request, by split: no phrasing of one stands in the other.
PHRASINGS = {
    "en": {
        "train": [
            "Serve {model} on {gpus} GPUs at port {port}, max length {max_len}, in {dtype}.",
            "Please start {model} with {gpus} cards. Port {port}, context {max_len}, dtype {dtype}.",
            "I want {model} in {dtype} on port {port}; use {gpus} GPUs and allow {max_len} tokens.",
            "Launch {model} ({dtype}) across {gpus} GPUs, listening on {port}, up to {max_len} tokens.",
            "On port {port}, run {model} with a context of {max_len} tokens, {gpus} cards, {dtype}.",
            "Use {gpus} GPUs for {model}. Weights in {dtype}, {max_len} tokens at most, port {port}.",
            "Can you bring up {model} at {port}? {dtype}, {gpus} cards, length {max_len}.",
            "{gpus} cards, {model}, {dtype}, {max_len} tokens, port {port}.",
            "With {dtype} weights and {max_len} tokens of context, deploy {model} to port {port} using {gpus} GPUs.",
            "Allow requests of {max_len} tokens: {model}, {dtype}, {gpus} GPUs, port {port}.",
            "We need a server for {model}: port={port}, gpus={gpus}, dtype={dtype}, max length={max_len}.",
            "Let {model} listen on port {port}, split over {gpus} cards, {dtype} precision, window {max_len}.",
            "Run {model}: {max_len} tokens, port {port}, {dtype}, {gpus} GPUs.",
            "A window of {max_len} tokens, {gpus} GPUs and port {port} for {model} in {dtype}, please.",
            "Bind port {port} to {model}. {dtype}; {max_len} tokens; {gpus} cards.",
            "In {dtype}, with {max_len} tokens and {gpus} cards, {model} has to run on {port}.",
            "{model} needs {max_len} tokens of context and {gpus} GPUs; serve it at {port} in {dtype}.",
            "Max length {max_len}, dtype {dtype}, port {port}, GPUs {gpus}: start {model}.",
        ],
        "test": [
            "Could you set up {model} on port {port} with {gpus} GPUs, {dtype} and a limit of {max_len} tokens?",
            "Put {model} on {gpus} cards in {dtype}; it should accept {max_len} tokens and answer on port {port}.",
            "Port {port} should offer {model}: {max_len} tokens of context, {dtype}, {gpus} GPUs.",
            "Get {model} going: {dtype}, port {port}, {gpus} GPUs, {max_len} tokens.",
        ],
    },
    "zh": {
        "train": [
            "用 {gpus} 张卡在端口 {port} 上部署 {model}，最大长度 {max_len}，精度 {dtype}。",
            "请启动 {model}，{gpus} 张显卡，端口 {port}，上下文 {max_len}，数据类型 {dtype}。",
            "我要在 {port} 端口跑 {model}，{dtype}，{gpus} 卡，最多 {max_len} 个 token。",
            "把 {model} 以 {dtype} 加载到 {gpus} 张卡上，监听 {port}，长度上限 {max_len}。",
            "{gpus} 张卡，{model}，{dtype}，{max_len} token，端口 {port}。",
            "帮我开一个 {model} 服务：端口 {port}，{gpus} 卡，{dtype}，窗口 {max_len}。",
            "端口 {port}，模型 {model}，显卡 {gpus} 张，精度 {dtype}，上下文长度 {max_len}。",
            "允许 {max_len} 个 token 的请求：{model}，{dtype}，{gpus} 张 GPU，端口 {port}。",
        ],
        "test": [
            "能不能在端口 {port} 上用 {gpus} 张卡跑起 {model}？{dtype}，上限 {max_len} 个 token。",
            "{model} 放到 {gpus} 张显卡上，用 {dtype}，接受 {max_len} 个 token，在 {port} 端口应答。",
            "{port} 端口提供 {model}：上下文 {max_len}，{dtype}，{gpus} 张 GPU。",
        ],
    },
}


def rows(language: str, split: str) -> list[dict]:
    """The split's rows, [{"messages": [user, assistant]}, ...]; combinations of values are dealt to
    one split each.
    """
    rng = random.Random(f"{SEED}")
    combinations = list(itertools.product(*VALUES.values()))
    rng.shuffle(combinations)
    start = 0 if split == "train" else SIZES["train"]
    found = []
    for number, combination in enumerate(combinations[start : start + SIZES[split]]):
        values = dict(zip(VALUES, combination, strict=True))
        phrasings = PHRASINGS[language][split]
        request = phrasings[number % len(phrasings)].format(**values)
        found.append(
            {
                "messages": [
                    {"role": "user", "content": request},
                    {"role": "assistant", "content": json.dumps(values)},
                ]
            }
        )
    return found


def files() -> dict[Path, str]:
    """Path and content of every file of the data set, LLaMA-Factory's dataset_info.json included."""
    found, info = {}, {}
    for language, split in itertools.product(PHRASINGS, SIZES):
        name = f"launch_{language}_{split}"
        lines = ",\n".join(
            " " + json.dumps(row, ensure_ascii=False) for row in rows(language, split)
        )
        found[FOLDER / f"{name}.json"] = f"[\n{lines}\n]\n"
        info[name] = {
            "file_name": f"{name}.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }
    info["alpaca_zh"] = {
        "hf_hub_url": "llamafactory/alpaca_zh",
        "ms_hub_url": "llamafactory/alpaca_zh",
    }
    found[FOLDER / "dataset_info.json"] = json.dumps(info, indent=2) + "\n"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 when the files differ"
    )
    args = parser.parse_args()
    differ = [
        path
        for path, text in files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in [] if args.check else differ:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files()[path], encoding="utf-8")
    print(f"{'differ' if args.check else 'written'}: {', '.join(map(shown, differ)) or 'none'}")
    raise SystemExit(1 if args.check and differ else 0)


if __name__ == "__main__":
    main()
