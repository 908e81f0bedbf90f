"""What 02_score.py prints: examples, measures with their intervals, what has been forgotten."""

from lab.table import table


def on_one_line(text: str) -> str:
    return text.replace("\n", "\\n")[:110]


def examples(questions, answers: dict[str, list[str]], right: list[bool]) -> None:
    """The first requests as each model answers them, then those that are still wrong.

    `right`: whether the tuned model's answer is, of each question.
    """
    for number, question in enumerate(questions[:3]):
        print(f"request   {on_one_line(question.request)}")
        for name, texts in answers.items():
            print(f"  {name:<6}  {on_one_line(texts[number])}")
        print(f"  wanted  {question.wanted}\n")
    wrong = [number for number, is_right in enumerate(right) if not is_right]
    for number in wrong[:10]:
        print(f"wrong     {on_one_line(questions[number].request)}")
        print(f"  tuned   {on_one_line(answers['tuned'][number])}")
        print(f"  wanted  {questions[number].wanted}")


def measures(metrics: dict, names: list[str]) -> None:
    """A line of each measure: base and tuned with their 95 % intervals."""
    labels = {"exact": "exact match, %", "field": "fields, %", "loss": "loss of the answers"}
    units = {"exact": "_pct", "field": "_pct", "loss": "_loss"}
    count = metrics["row_count"]
    lines = []
    for measure, label in labels.items():
        unit = units[measure]
        digits = 1 if unit == "_pct" else 4
        cells = []
        for name in names:
            stem = name if measure == "loss" else f"{name}_{measure}"
            if f"{stem}{unit}" not in metrics:
                continue
            value, low, high = (metrics[f"{stem}{end}{unit}"] for end in ("", "_low", "_high"))
            cells.append(f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        if cells:
            lines.append((label, *cells))
    print(f"\n{count} held-out requests, with the 95 % interval of a new draw of rows")
    table(["", *names], lines)
    if count < 200:
        print(f"  few rows: each of them is {100 / count:.1f} points of exact match")


def forgetting(metrics: dict, general: dict[str, list[str]], asked: tuple[str, ...]) -> None:
    """A text that has nothing to do with the task, and an answer to a question that has not.

    `general`: the answers of each model to `asked`.
    """
    losses = [f"{name} {metrics[f'{name}_neutral_loss']:.3f}" for name in general]
    print(f"forgetting: loss of a text that has nothing to do with it: {', '.join(losses)}")
    if "base" in general:
        kept = metrics["kept_count"]
        print(f"  {kept} of {len(asked)} general questions are answered as before; for example")
        print(f"  {asked[0]}")
        for name, answers in general.items():
            print(f"    {name:<6}{on_one_line(answers[0])}")
