"""How 02_score.py reads what is asked, compares what is answered, and says how sure a share is."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import entries
import views

from lab import ROOT, fail, shown

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SURE = 1.96  # standard deviations to either side that hold 95 % of a normal distribution


class Question(NamedTuple):
    request: str  # what is shown of it: the last turn before the answer
    messages: list[dict]  # all turns before the answer, of OpenAI's form
    tools: list[dict] | None
    prompt: str  # all of it, by the model's own chat template
    wanted: str  # the answer that is right
    target: str  # what the model must write for it, with the end of its turn
    is_call: bool  # a call of tools: compared as JSON, not by its characters


# -----------------------------------------------------------------------------
# What is asked


def converted_rows(test: str, info: str | None, limit: int) -> list[dict]:
    """Rows as LLaMA-Factory's converter gives them, of any format that it reads.

    `test` is a name of dataset_info.json or a file. Exit code 2 with one sentence where a row is
    wrong, or has no one answer to compare with.
    """
    named = entries.find(test, Path(info) if info else None, DATA)
    name, entry, folder = named
    problem = entries.wrong_in_entry(entry)
    if problem:
        fail(f"the entry {name}{problem}")
    stage = entries.usual_stage(entry)
    if stage != "sft":
        without = {"pt": "texts without an answer", "kto": "answers that may be wrong ones"}
        what = without.get(stage, "pairs of answers")
        fail(f"{name} has {what}: scoring compares with one answer of each row")
    checked = entries.check(*named, "sft")
    if not checked:
        fail(f"the rows of {name} are in no file here: download it, and give the file")
    rows, attr = checked
    if attr.images or attr.videos or attr.audios:
        fail(f"{name} has pictures or sound: scoring gives the model texts only")
    from types import SimpleNamespace

    from llamafactory.data.converter import get_dataset_converter

    convert = get_dataset_converter(attr.formatting, attr, SimpleNamespace(media_dir=str(folder)))
    return [convert(row) for row in list(rows)[: limit or None]]


def questions(converted: list[dict], tokenizer, switches: dict) -> list[Question]:
    """The last answer of each row as a question, all before it as its prompt.

    `switches` go to the chat template: {"enable_thinking": False}. Exit code 2 where the template
    cannot say what a row has: a server, which goes by it, could not either.
    """
    from jinja2.exceptions import TemplateError

    def text(messages: list[dict], tools, ask: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=ask, **switches
        )

    asked = []
    for number, row in enumerate(converted, 1):
        answer = row["_response"][0]
        if switches.get("enable_thinking") is False:  # the training has left them out too
            answer = answer | {"content": without_thoughts(answer["content"])}
        messages = views.as_chat(row, answer)
        tools = json.loads(row["_tools"]) if row["_tools"] else None
        is_call = answer["role"] == "function"
        try:
            prompt = text(messages[:-1], tools, True)
            if tools and prompt == text(messages[:-1], None, True):
                fail(
                    f"row {number} has tools, and the model's own chat template leaves them out, "
                    "as every server then would: take a model whose template has them (Qwen2.5)"
                )
            whole = text(messages, tools, False)
        except (TemplateError, TypeError) as e:
            fail(f"row {number}: the model's own chat template refuses it: {e}")
        end = tokenizer.eos_token
        target = whole.removeprefix(prompt)  # a thinking model's may begin with <think></think>
        if target == whole:
            target = f"{answer['content']}{end}"
        elif end in target:
            target = target[: target.rindex(end) + len(end)]
        wanted = target.removesuffix(end) if is_call else without_thoughts(answer["content"])
        if is_call and not calls_in(wanted):  # the template has no place for it
            fail(f"row {number} is a call of a tool, which the model's chat template leaves out")
        before = messages[:-1]
        asked.append(
            Question(before[-1]["content"], before, tools, prompt, wanted, target, is_call)
        )
    return asked


# -----------------------------------------------------------------------------
# What is answered


def without_thoughts(answer: str) -> str:
    """As a server gives it: what a model thinks first is not its answer."""
    return re.sub(r"^\s*<think>.*?</think>\s*", "", answer, flags=re.S)


def calls_in(text: str) -> list[dict]:
    """The objects {"name": ..., "arguments": {...}} in the text, whatever stands around them."""
    decoder = json.JSONDecoder()
    calls = []
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError:
            end = place + 1
        else:
            arguments = value.get("arguments", value.get("parameters"))
            if "name" in value and arguments is not None:
                calls.append({"name": value["name"], "arguments": arguments})
        place = text.find("{", end)
    return calls


def is_right(question: Question, answer: str) -> bool:
    """The same characters; of calls, the same calls."""
    if question.is_call:
        return calls_in(answer) == calls_in(question.wanted)
    return answer == question.wanted


def fields_of(text: str, is_call: bool) -> dict:
    """The fields of the JSON object that the text is; {} where it is none."""
    if is_call:
        calls = calls_in(text)
        if not calls or not isinstance(calls[0]["arguments"], dict):
            return {}
        return {"name": calls[0]["name"], **calls[0]["arguments"]}
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def share_of_fields(question: Question, answer: str) -> float | None:
    """Of the wanted object's fields, how many are in the answer with their value: 0 to 1.

    None where the wanted answer is no JSON object.
    """
    wanted = fields_of(question.wanted, question.is_call)
    return share_of_equal(wanted, fields_of(answer, question.is_call)) if wanted else None


def share_of_equal(wanted: dict, given: dict) -> float:
    """Of the wanted fields, how many are given with their value: 0 to 1."""
    return sum(name in given and given[name] == wanted[name] for name in wanted) / len(wanted)


# -----------------------------------------------------------------------------
# How sure: 95 % intervals, as (low, high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Of a share over `count` rows. Source: Wilson, JASA 22 (1927), 209-212.

    Unlike share +- 1.96 standard deviations it has a width at 0 and at 1 too. A mean of numbers
    between 0 and 1 varies no more than a share does: for it the interval is at most too wide.
    """
    spread = SURE**2 / count
    middle = (share + spread / 2) / (1 + spread)
    reach = SURE / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / count / 4)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def mean_loss(losses: list[tuple[float, int]]) -> tuple[float, float, float]:
    """(mean over all tokens, low, high) of (summed loss, tokens) of each row.

    The tokens of one row hang together, and so rows are what is counted (a ratio estimator).
    """
    tokens = sum(count for _, count in losses)
    mean = sum(loss for loss, _ in losses) / tokens
    apart = sum((loss - mean * count) ** 2 for loss, count in losses)
    rows = len(losses)
    error = math.sqrt(apart * rows / (rows - 1)) / tokens if rows > 1 else mean
    return mean, max(0.0, mean - SURE * error), mean + SURE * error


def measures(name: str, questions: list[Question], answers: list[str]) -> dict[str, float]:
    """Metrics NAME_exact_pct and NAME_field_pct, each with _low and _high.

    Without fields where no wanted answer is a JSON object.
    """
    pairs = list(zip(questions, answers, strict=True))
    shares = {"exact": [float(is_right(*pair)) for pair in pairs]}
    shares["field"] = [s for s in (share_of_fields(*pair) for pair in pairs) if s is not None]
    metrics = {}
    for measure, each in shares.items():
        if each:
            metrics |= share_metrics(f"{name}_{measure}", each)
    return metrics


def share_metrics(name: str, each: list[float]) -> dict[str, float]:
    """NAME_pct, the mean of numbers between 0 and 1, with NAME_low_pct and NAME_high_pct."""
    share = sum(each) / len(each)
    low, high = wilson(share, len(each))
    ends = {"": share, "_low": low, "_high": high}
    return {f"{name}{end}_pct": round(100 * value, 1) for end, value in ends.items()}


def exact_shown(metrics: dict[str, float], name: str) -> str:
    """NAME_exact_pct of `measures` and its interval, for a table: 95.3 (87.1 to 98.4)."""
    ends = ("_pct", "_low_pct", "_high_pct")
    return "{} ({} to {})".format(*(metrics[f"{name}_exact{end}"] for end in ends))


# -----------------------------------------------------------------------------
# The model, the adapter on it, and what is kept


def loader(profile):
    """load(folder, **options): its model, ready to answer; `options` are transformers'.

    Exit code 2 where it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, profile.finetune.dtype)

    def load(folder: Path, **options):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        except (OSError, ValueError, RuntimeError) as e:
            fail(f"the model in {shown(folder)} cannot be loaded: {str(e).splitlines()[0]}")
        return loaded.to(profile.device).eval()

    return load


def put_on(base, folder: Path):
    """PEFT's model of base and adapter. Exit code 2 where the adapter is of another model."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    wrong = f"the adapter in {shown(folder)} does not fit its model"
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [repr(e)]
        fail(f"{wrong}: {' '.join(lines[:2])[:250]}")
    unused = names - set(get_peft_model_state_dict(model))
    if unused:  # PEFT says nothing of these
        fail(f"{wrong}: the model has no place for {sorted(unused)[0]}")
    return model.eval()


def save(file: Path, answers: list[dict]) -> None:
    """One row a line, beside the file and then in its place. Exit code 2 where there is no room."""
    lines = ",\n ".join(json.dumps(answer, ensure_ascii=False) for answer in answers)
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"[\n {lines}\n]\n", encoding="utf-8")
        partial.replace(file)
    except OSError as e:
        fail(f"cannot write {shown(ROOT / file)}: {e.strerror}; the answers before are kept")
