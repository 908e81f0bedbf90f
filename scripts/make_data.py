"""Write the data set of the training stages: a request in plain words -> its launch JSON.

    python scripts/make_data.py            # writes modules/06_LLaMA-Factory/data/*.json
    python scripts/make_data.py --check    # writes nothing; exit code 1 when the files differ

The files are always the same: the seed is fixed. An untuned model answers such a request with
prose; a tuned one with one line of JSON, scored by exact match. The held-out split uses phrasings
that training does not have and combinations of values that training does not have: what it measures
is understanding, not memory. English for the embedded 135M model, Chinese too for Qwen.
"""

import argparse
import csv
import io
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

from lab import ROOT, shown

FOLDER = ROOT / "modules" / "06_LLaMA-Factory" / "data"
SIZES = {"train": 384, "test": 64}
EXAMPLES = 8  # rows of each other form
LOGGED = 24  # good lines of the example log, beside those that must not be learnt from
PAIRS = 256  # of answers, and as many judged ones
COLOURS = ("red", "green", "blue", "black")
SHAPES = ("square", "circle")
SEED = 4090

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
}
# The values of the five fields, in the order in which the JSON has them.
VALUES = {
    "model": [
        *("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b"),
        *("llama-3-8b", "mistral-7b", "smollm2-135m", "yi-34b"),
    ],
    "gpus": [1, 2, 3, 4, 6, 8],
    "port": [8000, 8001, 8080, 8888, 9000, 9001, 5000, 7860, 6006, 8500],
    "max_len": [512, 1024, 2048, 4096, 8192, 16384],
    "dtype": ["float16", "bfloat16", "float32", "int4", "fp8"],
}

# Whole phrasings of a request, a line each: no phrasing of one split stands in the other.
EN_TRAIN = """
Serve {model} on {gpus} GPUs at port {port}, max length {max_len}, in {dtype}.
Please start {model} with {gpus} cards. Port {port}, context {max_len}, dtype {dtype}.
I want {model} in {dtype} on port {port}; use {gpus} GPUs and allow {max_len} tokens.
Launch {model} ({dtype}) across {gpus} GPUs, listening on {port}, up to {max_len} tokens.
On port {port}, run {model} with a context of {max_len} tokens, {gpus} cards, {dtype}.
Use {gpus} GPUs for {model}. Weights in {dtype}, {max_len} tokens at most, port {port}.
Can you bring up {model} at {port}? {dtype}, {gpus} cards, length {max_len}.
{gpus} cards, {model}, {dtype}, {max_len} tokens, port {port}.
With {dtype} weights and {max_len} tokens of context, deploy {model} to port {port} \
using {gpus} GPUs.
Allow requests of {max_len} tokens: {model}, {dtype}, {gpus} GPUs, port {port}.
We need a server for {model}: port={port}, gpus={gpus}, dtype={dtype}, max length={max_len}.
Let {model} listen on port {port}, split over {gpus} cards, {dtype} precision, window {max_len}.
Run {model}: {max_len} tokens, port {port}, {dtype}, {gpus} GPUs.
A window of {max_len} tokens, {gpus} GPUs and port {port} for {model} in {dtype}, please.
Bind port {port} to {model}. {dtype}; {max_len} tokens; {gpus} cards.
In {dtype}, with {max_len} tokens and {gpus} cards, {model} has to run on {port}.
{model} needs {max_len} tokens of context and {gpus} GPUs; serve it at {port} in {dtype}.
Max length {max_len}, dtype {dtype}, port {port}, GPUs {gpus}: start {model}.
"""
EN_TEST = """
Could you set up {model} on port {port} with {gpus} GPUs, {dtype} and a limit of {max_len} tokens?
Put {model} on {gpus} cards in {dtype}; it should accept {max_len} tokens and answer on port {port}.
Port {port} should offer {model}: {max_len} tokens of context, {dtype}, {gpus} GPUs.
Get {model} going: {dtype}, port {port}, {gpus} GPUs, {max_len} tokens.
"""
# How users of the example log write, as nobody did who wrote the training data
EN_LOG = """
spin up {model}: {gpus}x gpu, {dtype}, ctx {max_len}, :{port}
need {model} asap, {dtype}, {max_len} ctx, {gpus} gpus, on {port}
"""
ZH_TRAIN = """
用 {gpus} 张卡在端口 {port} 上部署 {model}，最大长度 {max_len}，精度 {dtype}。
请启动 {model}，{gpus} 张显卡，端口 {port}，上下文 {max_len}，数据类型 {dtype}。
我要在 {port} 端口跑 {model}，{dtype}，{gpus} 卡，最多 {max_len} 个 token。
把 {model} 以 {dtype} 加载到 {gpus} 张卡上，监听 {port}，长度上限 {max_len}。
{gpus} 张卡，{model}，{dtype}，{max_len} token，端口 {port}。
帮我开一个 {model} 服务：端口 {port}，{gpus} 卡，{dtype}，窗口 {max_len}。
端口 {port}，模型 {model}，显卡 {gpus} 张，精度 {dtype}，上下文长度 {max_len}。
允许 {max_len} 个 token 的请求：{model}，{dtype}，{gpus} 张 GPU，端口 {port}。
"""
ZH_TEST = """
能不能在端口 {port} 上用 {gpus} 张卡跑起 {model}？{dtype}，上限 {max_len} 个 token。
{model} 放到 {gpus} 张显卡上，用 {dtype}，接受 {max_len} 个 token，在 {port} 端口应答。
{port} 端口提供 {model}：上下文 {max_len}，{dtype}，{gpus} 张 GPU。
"""
# What every second row of launch_en_varied is put together from: the same five things in a random
# order, so that each is known by its own look or unit, and none by its place.
OPENINGS = ("", "Please: ", "New server: ", "Wanted: ")
PARTS = {
    "model": ("{model}", "serve {model}", "run {model}", "model {model}"),
    "gpus": ("{gpus} GPUs", "{gpus} cards"),
    "port": ("port {port}",),
    "max_len": ("{max_len} tokens",),
    "dtype": ("{dtype}",),
}
# The same requests, asked in another way: for one value instead of a line of JSON.
ASKED = {
    "en": {
        "model": "Which model does this request ask for? Answer with its name only.",
        "gpus": "How many GPUs does this request ask for? Answer with the number only.",
        "port": "Which port does this request ask for? Answer with the number only.",
        "max_len": "How many tokens does this request allow? Answer with the number only.",
        "dtype": "Which dtype does this request ask for? Answer with its name only.",
    },
    "zh": {
        "model": "下面的请求要哪个模型？只回答名字。",
        "gpus": "下面的请求要几张卡？只回答数字。",
        "port": "下面的请求要哪个端口？只回答数字。",
        "max_len": "下面的请求允许多少个 token？只回答数字。",
        "dtype": "下面的请求要哪种精度？只回答名字。",
    },
}
PHRASINGS = {
    "en": {"train": EN_TRAIN.strip().splitlines(), "test": EN_TEST.strip().splitlines()},
    "zh": {"train": ZH_TRAIN.strip().splitlines(), "test": ZH_TEST.strip().splitlines()},
}


def rows(language: str, split: str) -> list[dict]:
    """[{"messages": [user, assistant]}, ...]; a combination of values is in one split only."""
    rng = random.Random(f"{SEED}")
    combinations = list(itertools.product(*VALUES.values()))
    rng.shuffle(combinations)
    start = 0 if split == "train" else SIZES["train"]
    phrasings = itertools.cycle(PHRASINGS[language][split])
    dialogues = []
    for combination in combinations[start : start + SIZES[split]]:
        values = dict(zip(VALUES, combination, strict=True))
        request = {"role": "user", "content": next(phrasings).format(**values)}
        answer = {"role": "assistant", "content": json.dumps(values)}
        dialogues.append({"messages": [request, answer]})
    return dialogues


def varied() -> list[dict]:
    """The English training rows, every second one a phrasing with its fields in any order."""
    rng = random.Random(f"{SEED}")
    dialogues = rows("en", "train")
    for dialogue in dialogues[1::2]:
        request, answer = dialogue["messages"]
        parts = [rng.choice(wordings) for wordings in PARTS.values()]
        rng.shuffle(parts)
        phrasing = rng.choice(OPENINGS) + rng.choice((", ", "; ")).join(parts) + "."
        request["content"] = phrasing.format(**json.loads(answer["content"]))
    return dialogues


def asked(language: str) -> list[dict]:
    """The held-out requests, of each one value only: the five fields in turn."""
    dialogues = rows(language, "test")
    for dialogue, field in zip(dialogues, itertools.cycle(VALUES), strict=False):
        request, answer = dialogue["messages"]
        value = json.loads(answer["content"])[field]
        request["content"] = f"{ASKED[language][field]}\n\n{request['content']}"
        answer["content"] = str(value)
    return dialogues


def description(name: str, columns: tuple[str, ...] = (), **more) -> dict:
    """What LLaMA-Factory's dataset_info.json says of a file of ours, of messages by role."""
    return {
        "file_name": f"{name}.json",
        "formatting": "sharegpt",
        **more,
        "columns": {column: column for column in ("messages", *columns)},
        "tags": TAGS,
    }


# -----------------------------------------------------------------------------
# A small example of every other form of rows that LLaMA-Factory reads: section 2 of module 06


def values_of(row: dict) -> dict:
    """The five fields that the answer of a row of `rows` names."""
    return json.loads(row["messages"][1]["content"])


def more_turns() -> list[dict]:
    """Several turns and a system message: ShareGPT's own field names."""
    dialogues = []
    for row in rows("en", "train")[:EXAMPLES]:
        values = values_of(row)
        changed = values | {"port": values["port"] + 1}
        turns = [
            ("human", row["messages"][0]["content"]),
            ("gpt", json.dumps(values)),
            ("human", f"Port {values['port']} is taken, use the next one."),
            ("gpt", json.dumps(changed)),
        ]
        dialogue = [{"from": role, "value": text} for role, text in turns]
        dialogues.append({"conversations": dialogue, "system": "Answer with one line of JSON."})
    return dialogues


def tool_calls() -> list[dict]:
    """A tool is called and answers: the tools and the call are JSON in texts."""
    port = {"type": "integer", "description": "the port to look at"}
    parameters = {"type": "object", "properties": {"port": port}, "required": ["port"]}
    tool = {"name": "is_free", "description": "Whether a port is free.", "parameters": parameters}
    dialogues = []
    for number, port in enumerate(VALUES["port"][:EXAMPLES]):
        free = number % 2 == 0
        said = "yes, it is free" if free else "no, something listens there"
        turns = [
            ("user", f"Can I serve on port {port}?"),
            ("function_call", json.dumps({"name": "is_free", "arguments": {"port": port}})),
            ("observation", json.dumps({"free": free})),
            ("assistant", f"Port {port}: {said}."),
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        dialogues.append({"messages": messages, "tools": json.dumps([tool])})
    return dialogues


def swapped(values: dict) -> str:
    """A plausible wrong answer: two numbers have changed places."""
    return json.dumps(values | {"port": values["max_len"], "max_len": values["port"]})


def paired(dialogues: list[dict], mistake: Callable[[dict], str]) -> list[dict]:
    """Each row's right answer beside the wrong one that `mistake` makes of its values."""
    found = []
    for row in dialogues:
        question, right = row["messages"]
        wrong = right | {"content": mistake(values_of(row))}
        found.append({"messages": [question], "chosen": right, "rejected": wrong})
    return found


def preferences() -> list[dict]:
    """A right answer and a plausible wrong one."""
    return paired(rows("en", "train")[:EXAMPLES], swapped)


def mistaken(values: dict, rng: random.Random) -> str:
    """A plausible wrong answer: one of the five mistakes that a half-trained model makes."""
    field = rng.choice(("gpus", "dtype", "model"))
    other = rng.choice([value for value in VALUES[field] if value != values[field]])
    without = {key: value for key, value in values.items() if key != "dtype"}
    right = json.dumps(values)
    answers = (
        swapped(values),
        json.dumps(values | {field: other}),
        json.dumps({key: str(value) for key, value in values.items()}),
        json.dumps(without),
        f"Sure! Here is the JSON: {right}",
    )
    return rng.choice(answers)


def pairs() -> list[dict]:
    """The right answer and a plausible wrong one, of as many kinds as mistakes are."""
    rng = random.Random(f"{SEED}")
    return paired(varied()[:PAIRS], lambda values: mistaken(values, rng))


def judged(of_pairs: list[dict]) -> list[dict]:
    """Answers that somebody has called good or bad, for KTO: one of each pair."""
    answers = []
    for number, pair in enumerate(of_pairs):
        label = number % 2 == 0
        answer = pair["chosen" if label else "rejected"]["content"]
        question = pair["messages"][0]["content"]
        answers.append({"instruction": question, "output": answer, "label": label})
    return answers


def logged() -> list[dict]:
    """A week of requests as a server's log has them, among them all that must not be learnt from.

    Every third answer was wrong and somebody corrected it; most others were approved.
    """
    rng = random.Random(f"{SEED}")
    combinations = list(itertools.product(*VALUES.values()))
    rng.shuffle(combinations)
    unused = combinations[sum(SIZES.values()) :]  # of neither split
    phrasings = itertools.cycle(EN_LOG.strip().splitlines())
    lines = []

    def add(request: str, answer: str, **judged) -> None:
        moment = f"2026-11-{16 + len(lines) // 7}T{9 + len(lines) % 7:02}:15:00"
        messages = [{"role": "user", "content": request}]
        lines.append({"time": moment, "messages": messages, "answer": answer, **judged})

    for number in range(LOGGED + 12):
        values = dict(zip(VALUES, unused[number], strict=True))
        request = next(phrasings).format(**values)
        right, wrong = json.dumps(values), mistaken(values, rng)
        if number >= LOGGED:  # of each kind some
            kinds = (
                (request, wrong, {"thumbs": "down"}),
                (request, right, {}),
                (f"{request} Write to anna.k@example.com when it is up.", right, {"thumbs": "up"}),
                (f"{request} OPENAI_API_KEY=sk-example0000000000000000", right, {"thumbs": "up"}),
            )
            request, answer, verdict = kinds[number % 4]
            add(request, answer, **verdict)
        elif number % 3:
            add(request, right, thumbs="up")
        else:
            add(request, wrong, thumbs="down", corrected=right)
    for row in lines[1:4]:  # asked again, in capitals
        add(row["messages"][0]["content"].upper(), row["answer"], thumbs="up")
    for row in rows("en", "test")[:3]:
        add(row["messages"][0]["content"], row["messages"][1]["content"], thumbs="up")
    lines[0]["time"] = "2026-11-15T23:50:00"
    return lines


def picture_name(colour: str, shape: str) -> str:
    """Its file, from the data folder."""
    return f"pictures/{colour}_{shape}.png"


def pictures() -> dict[str, bytes]:
    """Drawn PNG files: a square or a circle of one colour."""
    drawn = {}
    for colour, shape in itertools.product(COLOURS, SHAPES):
        image = Image.new("RGB", (56, 56), "white")
        draw = ImageDraw.Draw(image)
        {"square": draw.rectangle, "circle": draw.ellipse}[shape]((8, 8, 47, 47), fill=colour)
        file = io.BytesIO()
        image.save(file, "png", optimize=True)
        drawn[picture_name(colour, shape)] = file.getvalue()
    return drawn


def seen() -> list[dict]:
    """A question about a picture; <image> is where the model sees it."""
    answers = []
    for colour, shape in itertools.product(COLOURS, SHAPES):
        answer = json.dumps({"colour": colour, "shape": shape})
        question = {"role": "user", "content": "<image>What is drawn?"}
        messages = [question, {"role": "assistant", "content": answer}]
        answers.append({"messages": messages, "images": [picture_name(colour, shape)]})
    return answers


def as_json(dialogues: list[dict]) -> str:
    """One list, a row on each line."""
    lines = [" " + json.dumps(row, ensure_ascii=False) for row in dialogues]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def examples() -> tuple[dict[str, str], dict]:
    """Name and content of the files of the other forms, and their entries."""
    jsonl = "".join(json.dumps(row) + "\n" for row in tool_calls())
    log = "".join(json.dumps(row) + "\n" for row in logged())
    table = io.StringIO()
    answers = csv.writer(table, lineterminator="\n")
    answers.writerow(("question", "answer"))
    answers.writerows(
        [m["content"] for m in row["messages"]] for row in rows("en", "train")[:EXAMPLES]
    )
    contents = {
        "example_turns.json": as_json(more_turns()),
        "example_tools.jsonl": jsonl,
        "example_log.jsonl": log,  # of requests: 16_weekly.py makes a data set of it
        "example_table.csv": table.getvalue(),
        "example_preference.json": as_json(preferences()),
        "example_kto.json": as_json(judged(preferences())),
        "example_picture.json": as_json(seen()),
    }
    tools = description("example_tools", ("tools",))
    turns = {"observation_tag": "observation", "function_tag": "function_call"}
    kto = {"prompt": "instruction", "response": "output", "kto_tag": "label"}
    info = {
        "example_turns": {
            "file_name": "example_turns.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
        },
        "example_tools": tools | {"file_name": "example_tools.jsonl", "tags": TAGS | turns},
        "example_table": {
            "file_name": "example_table.csv",
            "columns": {"prompt": "question", "response": "answer"},
        },
        "example_preference": description(
            "example_preference", ("chosen", "rejected"), ranking=True
        ),
        "example_kto": {"file_name": "example_kto.json", "columns": kto},
        "example_picture": description("example_picture", ("images",)),
    }
    return contents, info


def files() -> dict[Path, bytes]:
    """Path and content of every file of the data set, dataset_info.json included."""
    contents = {}
    info = {}
    for language, split in itertools.product(PHRASINGS, SIZES):
        name = f"launch_{language}_{split}"
        contents[f"{name}.json"] = as_json(rows(language, split))
        info[name] = description(name)
    for language in ASKED:
        name = f"launch_{language}_asked"
        contents[f"{name}.json"] = as_json(asked(language))
        info[name] = description(name)
    contents["launch_en_varied.json"] = as_json(varied())
    info["launch_en_varied"] = description("launch_en_varied")
    texts, entries = examples()
    # Pairs and single answers of as many mistakes as a half-trained model makes
    of_pairs = pairs()
    contents["launch_en_pairs.json"] = as_json(of_pairs)
    contents["launch_en_judged.json"] = as_json(judged(of_pairs))
    for name, example in (("launch_en_pairs", "preference"), ("launch_en_judged", "kto")):
        info[name] = entries[f"example_{example}"] | {"file_name": f"{name}.json"}
    alpaca = "llamafactory/alpaca_zh"
    info |= entries | {"alpaca_zh": {"hf_hub_url": alpaca, "ms_hub_url": alpaca}}
    contents |= texts | {"dataset_info.json": json.dumps(info, indent=2) + "\n"}
    written = {name: text.encode() for name, text in contents.items()} | pictures()
    return {FOLDER / name: content for name, content in written.items()}


def is_written(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 when the files differ"
    )
    args = parser.parse_args()
    contents = files()
    differ = [path for path, content in contents.items() if not is_written(path, content)]
    if not args.check:
        for path in differ:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[path])
    print(f"{'differ' if args.check else 'written'}: {', '.join(map(shown, differ)) or 'none'}")
    raise SystemExit(1 if args.check and differ else 0)


if __name__ == "__main__":
    main()
