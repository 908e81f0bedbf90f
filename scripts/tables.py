"""Write the measured tables of every page from the records in results/: `make tables`.

    make tables                     # write them
    make tables ARGS=--check        # only say what differs; exit code 1 where something does

A table stands between two comments. The first names a record and, a row each, which of its metrics
to show under which words:

    <!-- table 03_vllm/05_throughput
    vllm_tok_per_s = vLLM (tokens/s)
    -->
    (generated: one column for each machine under results/ that has the record)
    <!-- /table -->

Between `<!-- calibration test -->` (fit, states) and `<!-- /calibration -->` stands what the
planner predicts of every record of `make calibrate` (states: of module 05's trainings) beside what
was measured.

Between `<!-- expected -->` and `<!-- /expected -->` stands what `make speeds` predicts for two RTX
4090s; between `<!-- published -->` and `<!-- /published -->` what others measured on one; between
`<!-- speeds test -->` (fit) and `<!-- /speeds -->` the predicted times of records beside the
measured ones.

Between `<!-- costs -->` and `<!-- /costs -->` stands a table for each machine, with a row for each
of its records of modules 04's and 05's trainings (scripts/trainings.py): memory, speed, traffic.

Between `<!-- faults -->` and `<!-- /faults -->` stands what `make train-faults` broke and what came
of it, a table for each machine.

Between `<!-- methods -->` and `<!-- /methods -->` stands a table for each machine, with a row for
each method of module 06 (configs/methods/) that has a record there, and its score where one was
made; `<!-- methods two -->` is the same of several processes.

Between `<!-- claims zh -->` (or en) and `<!-- /claims -->` stands the table of configs/claims.yaml,
its measured column from records.

What differs from a record's ordinary life (versions that are not the lock's, code that was not
committed, its `notes`) stands under every table that uses it, in the language of the page; a claim
whose record has such a line is marked.
"""

import argparse
import dataclasses
import json
import re
from typing import NamedTuple

import yaml
from trainings import MADE, command_of, model_of, sent_bytes, training_of

from lab import ROOT, fail, shown
from lab.planner import speed, training

BLOCK = re.compile(r"(<!-- table (\S+)\n(.*?)-->\n)(.*?)(<!-- /table -->)", re.S)
ABSENT = "–"  # where a machine's record lacks the metric
MARK = " †"  # after what a record with differences says of a claim

CLAIM_HEADS = {
    "zh": (
        *("说法", "实测", "来源", "准确地说", "状态"),
        {"measured": "实测", "cited": "引用", "not yet": "待测"},
    ),
    "en": (
        *("claim", "measured", "source", "precisely", "status"),
        {"measured": "measured", "cited": "cited", "not yet": "not yet"},
    ),
}
WORDS = {
    "zh": {
        "versions": "版本（括号里是锁定的）：",
        "version": "{} {}（{}）",
        "uncommitted": "代码或设置有没提交的改动",
        "all": "表中全部",
        "marks": ("、", "：", "；", "。"),
        "claims": "† 这条记录的版本、提交或设置有出入，写在它所在模块的表下面。",
    },
    "en": {
        "versions": "versions (those of the lock): ",
        "version": "{} {} ({})",
        "uncommitted": "code or settings were changed and not committed",
        "all": "all of this table",
        "marks": (", ", ": ", "; ", "."),
        "claims": "† Versions, commit or settings of this record differ: "
        "the line under its table in the module says how.",
    },
}


def readmes() -> list:
    return sorted([*ROOT.glob("README*.md"), *ROOT.glob("modules/*/*.md")])


def number(value) -> str:
    """Three significant digits, as a person would write them."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def records(name: str) -> dict[str, dict]:
    """{machine: its stored record of `name`}."""
    return {
        f.relative_to(ROOT / "results").parts[0]: json.loads(f.read_text())
        for f in sorted(ROOT.glob(f"results/*/{name}.json"))
    }


def differences(record: dict, language: str) -> list[str]:
    """Versions other than the lock's, code not committed, the record's notes."""
    phrases = WORDS[language]
    lines = []
    if differ := record.get("versions_differ"):
        packages = [phrases["version"].format(name, *pair) for name, pair in differ.items()]
        lines.append(phrases["versions"] + phrases["marks"][0].join(packages))
    # Records without `environment` are older: to them results/ and readmes were code too.
    if record["commit"].endswith("-dirty") and "environment" in record:
        lines.append(phrases["uncommitted"])
    return lines + [note[language] for note in record.get("notes", [])]


def remarks(used: dict[str, dict], language: str) -> list[str]:
    """What differs in the records {name: record} of a table, each thing once.

    Names that share something share a line.
    """
    comma, colon, semicolon, stop = WORDS[language]["marks"]
    names: dict[str, list[str]] = {}  # a difference: whose it is
    for name, record in used.items():
        for difference in differences(record, language):
            names.setdefault(difference, []).append(f"`{name}`")
    lines: dict[str, list[str]] = {}  # whose: the differences that these share
    for difference, owners in names.items():
        whose = WORDS[language]["all"] if len(owners) == len(used) > 3 else comma.join(owners)
        lines.setdefault(whose, []).append(difference)
    return [f"{whose}{colon}{semicolon.join(shared)}{stop}  " for whose, shared in lines.items()]


def claims(language: str) -> str:
    """The claims of configs/claims.yaml, a row each, with what the records say of them."""
    *heads, statuses = CLAIM_HEADS[language]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in yaml.safe_load((ROOT / "configs/claims.yaml").read_text(encoding="utf-8")):
        measured = measurements(entry, language)
        status = "measured" if measured else "cited" if "source" in entry else "not yet"
        cells = [
            f'<a id="claim-{entry["id"]}"></a>{entry["claim"][language]}',
            "<br>".join(measured),
            entry.get("source", ""),
            entry["precisely"][language],
            statuses[status],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if any(MARK in line for line in lines):
        lines += ["", WORDS[language]["claims"]]
    return "\n".join(lines) + "\n"


def measurements(claim: dict, language: str) -> list[str]:
    """What each machine measured of a claim; marked, where its record differs in something."""
    numbers: dict[str, list[str]] = {}
    marks: dict[str, str] = {}
    for measure in claim.get("measured", []):
        for machine, record in records(measure["record"]).items():
            metrics = record["metrics"]
            if measure["metric"] not in metrics:
                continue
            sentence = measure["print"].format(metrics[measure["metric"]], **metrics)
            numbers.setdefault(machine, []).append(sentence)
            if differences(record, language):
                marks[machine] = MARK
    return [
        f"`{machine}`: {', '.join(sentences)}{marks.get(machine, '')}"
        for machine, sentences in numbers.items()
    ]


def table(name: str, rows: str, language: str) -> str:
    """The Markdown table of the record `name` over all machines.

    Raises SystemExit(2) when no machine has it, or no record a metric.
    """
    stored = records(name)
    if not stored:
        fail(f"no machine under results/ has a record of {name}: run 'make evidence'")
    lines = ["| | " + " | ".join(stored) + " |", "|---|" + "---:|" * len(stored)]
    for row in rows.strip().splitlines():
        metric, label = (part.strip() for part in row.split("=", 1))
        cells = []
        for record in stored.values():
            metrics = record["metrics"]
            cells.append(number(metrics[metric]) if metric in metrics else ABSENT)
        if not any(metric in record["metrics"] for record in stored.values()):
            fail(f"no record of {name} has the metric {metric}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("")
    for machine, record in stored.items():
        gpus = record["machine"]["gpus"]
        device = gpus[0]["name"] if gpus else record["machine"]["cpu"]
        lines.append(f"`{machine}`: {device}, {record['date'][:10]}, `{record['command']}`  ")
    return "\n".join(lines + remarks(stored, language)) + "\n"


class Compared(NamedTuple):
    """A quantity of a record: predicted by the planner, and measured."""

    machine: str
    name: str  # of the record
    quantity: str
    predicted: float
    measured: float


def errors(use: str) -> list[Compared]:
    """Predicted and measured: `make calibrate` with that use (fit, test), or module 05's states."""
    if use == "states":
        files = sorted(ROOT.glob("results/*/05_DeepSpeed/train-z*.json"))
        files = [file for file in files if not file.stem.endswith(("-lora", "-nvme"))]
        return [states(file.stem, json.loads(file.read_text())) for file in files]
    rows = []
    cases = yaml.safe_load((ROOT / "configs/calibration.yaml").read_text(encoding="utf-8"))
    for name, case in cases.items():
        if case["use"] == use:
            for machine, record in records(f"scripts/calibrate-{name}").items():
                rows += calibrated(machine, name, case["plan"], record["metrics"])
    return rows


def states(name: str, record: dict) -> Compared:
    """GiB of states of a training of module 05."""
    predicted = training.train(model_of(record), training_of(record)).states_gib["total"]
    machine = record["machine"]["name"]
    return Compared(machine, name, "states (GiB)", predicted, record["metrics"]["state_gib"])


def calibrated(machine: str, name: str, line: str, metrics: dict) -> list[Compared]:
    """The quantities of a record of `make calibrate`, which ran a command line of the planner."""
    import plan
    from plan_parts.arguments import read_line

    request = read_line(line)
    answer = plan.plan(request)
    parts = answer["per_gpu_gib"]
    if request.task == "serve":
        tokens = int(metrics["kv_tok_count"])
        return [
            Compared(machine, name, "weights (GiB)", parts["weights"], metrics["weights_gib"]),
            Compared(machine, name, "KV tokens", answer["kv_tokens"], tokens),
        ]
    peak = parts["total"] - parts["cuda_context"]
    rows = [Compared(machine, name, "peak (GiB)", peak, metrics["peak_gib"])]
    if request.setup.offloads:
        predicted = answer["host_gib"]
        if request.setup.engine == "fsdp":  # no process of `make calibrate` deals out a model
            predicted -= answer["host_parts_gib"]["start"]
        rows.append(Compared(machine, name, "host (GiB)", predicted, metrics["host_gib"]))
    return rows


def calibration(use: str, language: str) -> str:
    folder = "05_DeepSpeed/" if use == "states" else "scripts/calibrate-"
    used = {}
    lines = ["| | | predicted | measured | error | machine |", "|---|---|---:|---:|---:|---|"]
    for row in errors(use):
        digits = "{:,}" if isinstance(row.predicted, int) else "{:,.2f}"
        numbers = f"{digits.format(row.predicted)} | {digits.format(row.measured)}"
        error = f"{row.predicted / row.measured - 1:+.1%}"
        lines.append(f"| `{row.name}` | {row.quantity} | {numbers} | {error} | {row.machine} |")
        used[f"{row.machine}/{row.name}"] = records(folder + row.name)[row.machine]
    remarked = remarks(used, language)
    if remarked:
        lines += ["", *remarked]
    return "\n".join(lines) + "\n"


COST_HEADS = {
    "zh": (
        *("怎么跑", "模型", "micro-batch", "参数", "梯度", "优化器", "合计", "理论"),
        *("其中在主机", "峰值", "tokens/s", "占乘法的峰值", "一步发送，GB（算式）"),
    ),
    "en": (
        *("how to run it", "model", "micro-batch", "parameters", "gradients", "optimizer", "sum"),
        *("theory", "of it on the host", "peak", "tokens/s", "of the product's peak"),
        "sent a step, GB (by formula)",
    ),
}


FAULT_HEADS = {
    "zh": (
        "弄坏了什么",
        "退出码",
        "多久之后结束",
        "留下的进程",
        "完好的一步",
        "重算的步数",
        "丢了什么",
    ),
    "en": ("broken", "exit code", "ended after", "left", "whole step", "computed again", "lost"),
}


def faults(language: str) -> str:
    """What was broken in a training, and what came of it; lost: what the losses at the end say."""
    nothing = {"zh": "没有", "en": "nothing"}[language]
    lines = []
    for machine, record in sorted(records("04_Accelerate/11_faults").items()):
        metrics = record["metrics"]
        lost = nothing if metrics["largest_difference"] == 0 else "?"
        lines += [f"`{machine}`:", "", "| " + " | ".join(FAULT_HEADS[language]) + " |"]
        lines.append("|---|" + "---:|" * 5 + "---|")
        for row in metrics["faults"]:
            code = ABSENT if row["code"] is None else row["code"]
            cells = [row["broken"], code, f"{row['seconds']:.1f} s"]
            cells += [row["left"], row["whole"], row["again"], lost]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", *remarks({machine: record}, language)]
    return "\n".join(lines) + "\n"


METHOD_HEADS = {
    "zh": (
        "方法",
        "训练的参数",
        "峰值（GiB）",
        "tokens/s",
        "进程",
        "完全正确（%）",
        "无关文本的损失",
    ),
    "en": ("method", "trained", "peak (GiB)", "tokens/s", "processes", "exact (%)", "neutral loss"),
}
ONE_PROCESS = (
    *("lora", "rslora", "loraplus", "dora", "pissa", "qlora", "freeze", "full"),
    *("packing", "neat_packing", "train_on_prompt", "liger"),
)
SEVERAL_PROCESSES = (
    *("lora", "ddp", "zero2"),  # lora: one process, to compare with
    *("zero3", "zero3-reentrant", "zero3-14b", "fsdp"),
)


def methods(word: str, language: str) -> str:
    """Module 06's trainings by method: what is trained, memory, speed, and the score."""
    lines = []
    several = word == "two"
    for machine in records("06_LLaMA-Factory/01_train" + "-ddp" * several):
        used = {}
        rows = []
        for method in SEVERAL_PROCESSES if several else ONE_PROCESS:
            variant = "" if method == "lora" else f"-{method}"
            stored = records(f"06_LLaMA-Factory/01_train{variant}")
            record = stored.get(machine) or stored.get(machine.replace("x2", ""))
            if not record or "trained_count" not in record["metrics"]:
                continue
            score = records(f"06_LLaMA-Factory/02_score{variant}").get(machine)
            names = ("trained_count", "peak_gib", "tokens_per_s", "world_size")
            cells = [number(record["metrics"][name]) for name in names]
            for name in ("tuned_exact_pct", "tuned_neutral_loss"):
                value = score["metrics"].get(name) if score else None
                cells.append(ABSENT if value is None else number(value))
            rows.append("| " + " | ".join([f"`{method}`", *cells]) + " |")
            used[f"01_train{variant}"] = record
        if len(rows) < 2:
            continue
        lines += [f"`{machine}`:", "", "| " + " | ".join(METHOD_HEADS[language]) + " |"]
        lines += ["|---|" + "---:|" * 6, *rows, "", *remarks(used, language), ""]
    return "\n".join(lines) + "\n"


def costs(language: str) -> str:
    """What every training of modules 04 and 05 costs a process, a table for each machine.

    States and peak in GiB; where a script does not measure its states, a dash, and the theory.
    """
    machines: dict[str, dict[str, dict]] = {}  # {machine: {name of a record: it}}
    for name in MADE:
        for machine, record in records(name).items():
            machines.setdefault(machine, {})[name] = record
    heads = COST_HEADS[language]
    lines = []
    for machine, stored in sorted(machines.items()):
        gpus = next(iter(stored.values()))["machine"]["gpus"]
        device = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "CPU"
        lines += [f"`{machine}` ({device}):", ""]
        lines += ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
        for record in stored.values():
            lines.append("| " + " | ".join(cost_cells(record)) + " |")
        remarked = remarks(stored, language)
        lines += ["", *remarked, ""] if remarked else [""]
    return "\n".join(lines)


def cost_cells(record: dict) -> list[str]:
    """The row of a training, as COST_HEADS has it."""
    metrics = record["metrics"]
    model = model_of(record)
    setup = training_of(record)
    planned = training.train(model, setup).states_gib["total"]
    on_host = None
    if "state_on_device_gib" in metrics:
        on_host = round(metrics["state_gib"] - metrics["state_on_device_gib"], 3)
    names = ("parameter_state_gib", "gradient_state_gib", "optimizer_state_gib", "state_gib")
    values = [metrics.get(name) for name in names]
    values += [metrics.get("state_theory_gib", planned), on_host, metrics["peak_memory_gib"]]
    values += [metrics["throughput_tok_per_s"], of_peak(record), sent_bytes(record) / 1e9]
    batch = f"{setup.micro_batch} x {setup.seq_len}"
    cells = [ABSENT if value is None else number(value) for value in values]
    return [f"`{command_of(record)}`", model.name, batch, *cells]


def of_peak(record: dict) -> float | None:
    """Share of what one large product reaches on this machine's cards, if that was measured.

    Counted is what the model needs (speed.train_flop), not what checkpointing computes again.
    """
    roofline = records("scripts/calibrate-roofline").get(record["machine"]["name"])
    if not roofline:
        return None
    setup = dataclasses.replace(training_of(record), checkpointing=False)
    tokens = setup.accumulate * setup.tokens
    a_token = speed.train_flop(model_of(record), setup) / tokens
    peak = setup.gpus * roofline["metrics"]["matmul_tflop_per_s"] * 1e12
    return a_token * record["metrics"]["throughput_tok_per_s"] / peak


# What speeds.py says of a line, in the language of the page.
SPEED_WORDS = {
    "zh": {
        "heads": "| 命令 | 看什么 | 预测 | 范围 |",
        "published": "| 模型 | 同时的请求 x 提示 + 回答 | 预测（tokens/s） | 公布 | 公布 / 预测 |",
        "one request": "一个请求，tokens/s",
        "first token after 1,024": "1,024 个 token 的提示，首 token，ms",
        "16 requests in flight": "16 个请求同时，tokens/s",
        "64 requests in flight": "64 个请求同时，tokens/s",
        "trained": "训练，tokens/s",
        "to": "{} 到 {}",
    },
    "en": {
        "heads": "| command | look at | predicted | range |",
        "published": "| model | requests in flight x prompt + answer | predicted (tokens/s) "
        "| published | published / predicted |",
        "one request": "one request, tokens/s",
        "first token after 1,024": "first token of a prompt of 1,024, ms",
        "16 requests in flight": "16 requests in flight, tokens/s",
        "64 requests in flight": "64 requests in flight, tokens/s",
        "trained": "trained, tokens/s",
        "to": "{} to {}",
    },
}


def expected(language: str) -> str:
    """What two RTX 4090s should show: predictions with their ranges."""
    import speeds
    from plan_parts import TWO_4090S

    phrases = SPEED_WORDS[language]
    lines = [phrases["heads"], "|---|---|---:|---:|"]
    for row in speeds.expected(TWO_4090S):
        ends = map(speeds.three_digits, (row.low, row.high))
        cells = [phrases[row.what], speeds.three_digits(row.predicted), phrases["to"].format(*ends)]
        lines.append(f"| `{row.command}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def published(language: str) -> str:
    """What others measured on one RTX 4090, beside what is predicted of it."""
    import speeds

    phrases = SPEED_WORDS[language]
    lines = [phrases["published"], "|---|---|---:|---:|---:|"]
    for row in speeds.published():
        predicted, measured, ratio = row.numbers
        cells = [row.model, row.load, predicted, f"[{measured}]({row.source})", ratio]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def predicted_times(use: str) -> str:
    """Times of records with that use, beside what their machine's own roofline predicts."""
    import speeds

    lines = ["| | | | predicted (ms) | measured (ms) | error | machine |"]
    lines.append("|---|---|---|---:|---:|---:|---|")
    for row in speeds.compared():
        if row.use == use:
            cells = [row.kind, f"`{row.name}`", row.what, *row.numbers, row.machine]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# {what a marker is called: the text below it, made of its word ("" where it has none) and the
# language of the page}; `<!-- speeds test -->` has the word test.
MARKERS = {
    "calibration": calibration,
    "claims": lambda word, _: claims(word),
    "costs": lambda _, language: costs(language),
    "faults": lambda _, language: faults(language),
    "methods": methods,
    "expected": lambda _, language: expected(language),
    "published": lambda _, language: published(language),
    "speeds": lambda word, _: predicted_times(word),
}
MARKER = re.compile(rf"(<!-- ({'|'.join(MARKERS)})(?: (\w+))? -->\n)(.*?)(<!-- /\2 -->)", re.S)


def filled(text: str, language: str) -> str:
    """`text`, a page in `language` (zh, en), with every table in it generated anew."""

    def again(match: re.Match) -> str:
        made = MARKERS[match[2]](match[3] or "", language)
        return f"{match[1]}\n{made}\n{match[5]}"

    def table_again(match: re.Match) -> str:
        return f"{match[1]}\n{table(match[2], match[3], language)}\n{match[5]}"

    return BLOCK.sub(table_again, MARKER.sub(again, text))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 when a table differs from its record",
    )
    args = parser.parse_args()
    drifted = []
    for file in readmes():
        text = file.read_text(encoding="utf-8")
        language = "en" if file.name.endswith(".en.md") else "zh"
        new_text = filled(text, language)
        if new_text != text:
            drifted.append(shown(file))
            if not args.check:
                file.write_text(new_text, encoding="utf-8")
    verdict = "differ from their records" if args.check else "written"
    print(f"{verdict}: {', '.join(drifted) or 'none'}")
    raise SystemExit(1 if args.check and drifted else 0)


if __name__ == "__main__":
    main()
