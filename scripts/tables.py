"""Write the measured tables of every readme and page from the records in results/: `make tables`
(`--check`: only say what differs).

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

Between `<!-- claims zh -->` (or en) and `<!-- /claims -->` stands the table of configs/claims.yaml,
its measured column from records.

What differs from a record's ordinary life (versions that are not the lock's, code that was not
committed, its `notes`) stands under every table that uses it, in the language of the page; a claim
whose record has such a line is marked.
"""

import argparse
import json
import re

import yaml

from lab import ROOT, fail, models, shown
from lab.planner import training, weights
from lab.planner.config import read

CALIBRATION = re.compile(
    r"(<!-- calibration (fit|test|states) -->\n)(.*?)(<!-- /calibration -->)", re.S
)
CLAIMS = re.compile(r"(<!-- claims (zh|en) -->\n)(.*?)(<!-- /claims -->)", re.S)
CLAIM_WORDS = {
    "zh": (
        "说法",
        "实测",
        "来源",
        "准确地说",
        "状态",
        {"measured": "实测", "cited": "引用", "not yet": "待测"},
    ),
    "en": (
        "claim",
        "measured",
        "source",
        "precisely",
        "status",
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
        "claims": "† Versions, commit or settings of this record differ: the line under its table in the module says how.",
    },
}
BLOCK = re.compile(r"(<!-- table (\S+)\n(.*?)-->\n)(.*?)(<!-- /table -->)", re.S)


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
    """What to know of a record before believing it: versions that are not the lock's, code not
    committed, its notes.
    """
    words = WORDS[language]
    lines = []
    if differ := record.get("versions_differ"):
        packages = [words["version"].format(name, *pair) for name, pair in differ.items()]
        lines.append(words["versions"] + words["marks"][0].join(packages))
    # Records without `environment` are older: to them results/ and readmes were code too.
    if record["commit"].endswith("-dirty") and "environment" in record:
        lines.append(words["uncommitted"])
    return lines + [note[language] for note in record.get("notes", [])]


def remarks(used: dict[str, dict], language: str) -> list[str]:
    """What differs in the records {name: record} of a table, each thing once: a line for the names
    that share it.
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
    *heads, statuses = CLAIM_WORDS[language]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in yaml.safe_load((ROOT / "configs/claims.yaml").read_text(encoding="utf-8")):
        measured: dict[str, list[str]] = {}
        marks: dict[str, str] = {}
        for measure in entry.get("measured", []):
            for machine, record in records(measure["record"]).items():
                if measure["metric"] in record["metrics"]:
                    said = measure["print"].format(
                        record["metrics"][measure["metric"]], **record["metrics"]
                    )
                    measured.setdefault(machine, []).append(said)
                    if differences(record, language):
                        marks[machine] = " †"
        status = "measured" if measured else "cited" if "source" in entry else "not yet"
        numbers = [
            f"`{machine}`: {', '.join(said)}{marks.get(machine, '')}"
            for machine, said in measured.items()
        ]
        cells = [
            f'<a id="claim-{entry["id"]}"></a>{entry["claim"][language]}',
            "<br>".join(numbers),
        ]
        lines.append(
            "| "
            + " | ".join(
                [*cells, entry.get("source", ""), entry["precisely"][language], statuses[status]]
            )
            + " |"
        )
    if any(" †" in line for line in lines):
        lines += ["", WORDS[language]["claims"]]
    return "\n".join(lines) + "\n"


def table(record: str, rows: str, language: str) -> str:
    """The Markdown table of `record` over all machines. Raises SystemExit(2) when no machine has it
    or a metric is missing.
    """
    found = records(record)
    if not found:
        fail(f"no machine under results/ has a record of {record}: run 'make evidence'")
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for row in rows.strip().splitlines():
        metric, words = (part.strip() for part in row.split("=", 1))
        if not any(metric in r["metrics"] for r in found.values()):
            fail(f"no record of {record} has the metric {metric}")
        cells = [
            number(r["metrics"][metric]) if metric in r["metrics"] else "–" for r in found.values()
        ]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"`{m}`: {r['machine']['gpus'][0]['name'] if r['machine']['gpus'] else r['machine']['cpu']}, {r['date'][:10]}, `{r['command']}`  "
        for m, r in found.items()
    ]
    return "\n".join(lines + remarks(found, language)) + "\n"


def errors(use: str) -> list[tuple[str, str, str, float, float]]:
    """(machine, line, quantity, predicted, measured) of the records of `make calibrate` with that
    use, or of module 05's states.
    """
    import plan

    rows = []
    if use == "states":
        for file in sorted(ROOT.glob("results/*/05_DeepSpeed/train-z*.json")):
            record = json.loads(file.read_text())
            c, m = record["config"], record["metrics"]
            model = next(
                entry["config"]
                for entry in models.catalogue().values()
                if "config" in entry
                and weights.parameters(read(entry["config"])) == m["parameters_count"]
            )
            setup = training.Training(
                gpus=m["world_size"],
                engine="deepspeed",
                zero=m["zero_stage"],
                dtype=m["dtype"],
                accumulate=c["accumulate"],
                offload="optimizer" if "offload" in file.stem else "none",
            )
            found = training.train(read(model), setup)
            rows.append(
                (
                    record["machine"]["name"],
                    file.stem,
                    "states (GiB)",
                    found.states_gib["total"],
                    m["state_gib"],
                )
            )
        return rows
    for name, case in yaml.safe_load(
        (ROOT / "configs/calibration.yaml").read_text(encoding="utf-8")
    ).items():
        for machine, record in (
            records(f"scripts/calibrate-{name}").items() if case["use"] == use else ()
        ):
            args, m = plan.parse(case["plan"].split()), record["metrics"]
            found = plan.plan(args)
            if args.task == "serve":
                rows.append(
                    (
                        machine,
                        name,
                        "weights (GiB)",
                        found["per_gpu_gib"]["weights"],
                        m["weights_gib"],
                    )
                )
                rows.append(
                    (machine, name, "KV tokens", found["kv_tokens"], int(m["kv_tok_count"]))
                )
            else:
                rows.append(
                    (
                        machine,
                        name,
                        "peak (GiB)",
                        found["per_gpu_gib"]["total"] - found["per_gpu_gib"]["cuda_context"],
                        m["peak_gib"],
                    )
                )
                if args.offload != "none":
                    rows.append((machine, name, "host (GiB)", found["host_gib"], m["host_gib"]))
    return rows


def calibration(use: str, language: str) -> str:
    folder = "05_DeepSpeed/" if use == "states" else "scripts/calibrate-"
    used = {}
    lines = ["| | | predicted | measured | error | machine |", "|---|---|---:|---:|---:|---|"]
    for machine, name, quantity, predicted, measured in errors(use):
        digits = "{:,}" if isinstance(predicted, int) else "{:,.2f}"
        lines.append(
            f"| `{name}` | {quantity} | {digits.format(predicted)} | {digits.format(measured)} | {predicted / measured - 1:+.1%} | {machine} |"
        )
        used[f"{machine}/{name}"] = records(folder + name)[machine]
    if said := remarks(used, language):
        lines += ["", *said]
    return "\n".join(lines) + "\n"


def filled(text: str, language: str) -> str:
    """`text`, a page in `language` (zh, en), with every table in it generated anew."""
    text = CALIBRATION.sub(lambda m: m[1] + "\n" + calibration(m[2], language) + "\n" + m[4], text)
    text = CLAIMS.sub(lambda m: m[1] + "\n" + claims(m[2]) + "\n" + m[4], text)
    return BLOCK.sub(lambda m: m[1] + "\n" + table(m[2], m[3], language) + "\n" + m[5], text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        if (new := filled(text, language)) != text:
            drifted.append(shown(file))
            if not args.check:
                file.write_text(new, encoding="utf-8")
    print(
        f"{'differ from their records' if args.check else 'written'}: {', '.join(drifted) or 'none'}"
    )
    raise SystemExit(1 if args.check and drifted else 0)


if __name__ == "__main__":
    main()
