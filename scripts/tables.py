"""Write the measured tables of every readme from the records in results/: `make tables` (`--check`: only say what differs).

A table stands between two comments. The first names a record and, a row each, which of its metrics to show under which words:

    <!-- table 03_vllm/03_throughput
    vllm_tok_per_s = vLLM (tokens/s)
    -->
    (generated: one column for each machine under results/ that has the record)
    <!-- /table -->
"""

import argparse
import json
import re

from lab import ROOT, fail, shown

BLOCK = re.compile(r"(<!-- table (\S+)\n(.*?)-->\n)(.*?)(<!-- /table -->)", re.S)


def readmes() -> list:
    return sorted([*ROOT.glob("README*.md"), *ROOT.glob("modules/*/readme.md")])


def number(value) -> str:
    """Three significant digits, as a person would write them."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(record: str, rows: str) -> str:
    """The Markdown table of `record` over all machines. Raises SystemExit(2) when no machine has it or a metric is missing."""
    found = {f.relative_to(ROOT / "results").parts[0]: json.loads(f.read_text()) for f in sorted(ROOT.glob(f"results/*/{record}.json"))}
    if not found:
        fail(f"no machine under results/ has a record of {record}: run 'make evidence'")
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---:|" * len(found)]
    for row in rows.strip().splitlines():
        metric, words = (part.strip() for part in row.split("=", 1))
        if not any(metric in r["metrics"] for r in found.values()):
            fail(f"no record of {record} has the metric {metric}")
        cells = [number(r["metrics"][metric]) if metric in r["metrics"] else "–" for r in found.values()]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"`{m}`: {r['machine']['gpus'][0]['name'] if r['machine']['gpus'] else r['machine']['cpu']}, {r['date'][:10]}, `{r['command']}`  " for m, r in found.items()]
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """`text` with every table in it generated anew."""
    return BLOCK.sub(lambda m: m[1] + "\n" + table(m[2], m[3]) + "\n" + m[5], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a table differs from its record")
    args = parser.parse_args()
    drifted = []
    for file in readmes():
        text = file.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            drifted.append(shown(file))
            if not args.check:
                file.write_text(new, encoding="utf-8")
    print(f"{'differ from their records' if args.check else 'written'}: {', '.join(drifted) or 'none'}")
    raise SystemExit(1 if args.check and drifted else 0)


if __name__ == "__main__":
    main()
