"""Lines are read, not counted: what ruff cannot measure about the Python files, `make lint`.

    make lint                       # ruff, ruff format, then this
    python scripts/lint.py FOLDER   # another tree of the same shape

Look at: the table, a row for each part of the repository. Each place that breaks a limit is one
line on stderr, and the exit code is then 1. Docstrings, comments and blank lines are not code.
"""

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

from lab import ROOT
from lab.table import table

# -----------------------------------------------------------------------------
# The limits, all of them

SCRIPT_LINES = 300  # a module script, and each helper file beside it
SCRIPT_MEDIAN = 160  # of all Python files in modules/
LESSON_BEFORE = 110  # the line that uses the engine for what the script is about
TWINS = ("mini_vllm", "mini_accelerate", "mini_zero", "mini_parallel")  # packages from scratch:
TWIN_LINES = 850  # one in all ...
TWIN_FILE_LINES = 160  # ... and each of its files
TOKENS_PER_LINE = dict.fromkeys(("modules", *TWINS, "lab"), 9.5)
TOKENS_PER_LINE |= {"scripts": 10, "tests": 10}
PAIRS_PER_1000_LINES = 12  # `a, b = x, y`: only for what belongs together
TAUGHT = ("modules", *TWINS, "lab")  # no walrus in arguments here, and no name of:
VAGUE_NAMES = {"found", "said", "words", "p"}

# The line that each module script is about, as a regular expression.
LESSON = {
    "01_single_gpu_smoke/01_smoke.py": r"torch\.mm\(",
    "01_single_gpu_smoke/02_plan_examples.py": r"\btrain\(model",
    "01_single_gpu_smoke/03_roofline.py": r"seconds\(\"a @ b\"",
    "01_single_gpu_smoke/04_where_memory_goes.py": r"loss\.backward\(",
    "01_single_gpu_smoke/05_gauges.py": r"torch\.mm\(",
    "02_qwen_image_edit/01_edit.py": r"pipe\(",
    "02_qwen_image_edit/02_what_fits.py": r"recipes\.needs\(",
    "03_vllm/01_serve.py": r"vllm\.entrypoints\.openai\.api_server",
    "03_vllm/02_chat.py": r"chat\.completions\.create\(",
    "03_vllm/03_structured.py": r"chat\.completions\.create\(",
    "03_vllm/04_watch.py": r"scrape\(",
    "03_vllm/05_throughput.py": r"\bLLM\(",
    "03_vllm/06_paging.py": r"drive\(",
    "03_vllm/07_prefix_caching.py": r"drive\(",
    "03_vllm/08_batch_one.py": r"drive\(",
    "03_vllm/09_speculative.py": r"drive\(",
    "03_vllm/10_tensor_parallel_speed.py": r"drive\(",
    "03_vllm/11_monitor.py": r"jobs\.start\(",
    "03_vllm/12_load.py": r"AsyncOpenAI\(",
    "03_vllm/13_bench.py": r"serve\.main\(",
    "03_vllm/14_two_nodes.py": r"pipeline-parallel-size",
    "03_vllm/15_mini_vllm.py": r"llm\.generate\(",
    "03_vllm/16_tensor_parallel.py": r"dist\.all_reduce\(",
    "03_vllm/17_embed.py": r"embeddings\.create\(",
    "03_vllm/18_picture.py": r"chat\.completions\.create\(",
    "04_Accelerate/01_train_ddp.py": r"DistributedDataParallel\(",
    "04_Accelerate/02_train_accelerate.py": r"accelerator\.prepare\(",
    "04_Accelerate/03_mixed_precision.py": r"accelerator\.prepare\(",
    "04_Accelerate/04_mini_accelerate.py": r"accelerator\.prepare\(",
    "04_Accelerate/05_real_loop.py": r"accelerator\.backward\(",
    "04_Accelerate/06_trainer.py": r"trainer\.train\(",
    "04_Accelerate/07_step_speed.py": r"layer\.compile\(",
    "04_Accelerate/08_loss_weights.py": r"accelerator\.backward\(",
    "04_Accelerate/09_sixteen_bits.py": r"scaler\.scale\(",
    "04_Accelerate/10_accelerate_overhead.py": r"overhead_loops\.LOOPS\[",
    "04_Accelerate/11_faults.py": r"workers\(\)\[1\]\.kill\(",
    "05_DeepSpeed/01_state_bytes.py": r"of_paper\(",
    "05_DeepSpeed/02_compare.py": r"difference = max\(",
    "05_DeepSpeed/03_mini_zero.py": r"engine\.backward\(",
    "05_DeepSpeed/04_mini_parallel.py": r"engine\.forward_backward\(",
    "05_DeepSpeed/05_costs.py": r"dist\.all_reduce\(whole",
    "05_DeepSpeed/06_buckets.py": r"subprocess\.run\(",
    "05_DeepSpeed/07_which_way.py": r"\btrain\(model",
    "05_DeepSpeed/08_compression.py": r"model\.register_comm_hook\(",
    "05_DeepSpeed/09_two_machines.py": r"--node-rank",
    "05_DeepSpeed/train.py": r"deepspeed\.initialize\(",
    "06_LLaMA-Factory/00_check_data.py": r"= get_template_and_fix_tokenizer\(",
    "06_LLaMA-Factory/01_train.py": r"factory\.prepare\(",
    "06_LLaMA-Factory/02_score.py": r"greedy_answers\(model",
    "06_LLaMA-Factory/03_merge.py": r"factory\.prepare\(",
    "06_LLaMA-Factory/04_chat.py": r"factory\.prepare\(",
    "06_LLaMA-Factory/05_serve.py": r"factory\.prepare\(",
    "06_LLaMA-Factory/06_mini_lora.py": r"get_peft_model\(",
    "06_LLaMA-Factory/07_loop.py": r"chat\.completions\.create\(",
    "06_LLaMA-Factory/08_methods.py": r"trials\.train_and_score\(",
    "06_LLaMA-Factory/09_sweep.py": r"trials\.run_all\(",
    "06_LLaMA-Factory/10_mini_dpo.py": r"preference\.dpo_loss\(",
    "06_LLaMA-Factory/11_mini_grpo.py": r"grpo\.group_advantages\(",
    "06_LLaMA-Factory/12_grpo.py": r"GRPOConfig\(",
    "06_LLaMA-Factory/13_evaluate.py": r"likelihood\.option_logps\(",
    "06_LLaMA-Factory/14_quantise.py": r"oneshot\(",
    "06_LLaMA-Factory/15_export.py": r"gguf_file\.write\(",
    "06_LLaMA-Factory/16_weekly.py": r"request_log\.collect\(",
    "06_LLaMA-Factory/17_distill.py": r"if passes\(",
    "06_LLaMA-Factory/18_quantised.py": r"engine\.start\(",
}

# -----------------------------------------------------------------------------
# Measuring one file

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = {
    *(tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}
FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # Python 3.12 looks into f-strings;
FSTRING_END = getattr(tokenize, "FSTRING_END", None)  # one counts as one token, as it does in 3.11


@dataclass
class File:
    path: str  # from the repository root
    lines: list[str]
    code: list[int]  # numbers of the lines that hold code
    tokens: int
    pairs: int  # assignments of a tuple to a tuple
    walruses: list[int]  # lines of those inside a call's arguments
    vague: list[tuple[int, str]]  # line and name

    @property
    def part(self) -> str:
        folders = self.path.split("/")
        return next((twin for twin in TWINS if twin in folders), folders[0])

    @property
    def is_script(self) -> bool:
        return re.fullmatch(r"modules/[^/]+/(\d\d_\w+|train)\.py", self.path) is not None


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def code_tokens(source: str, docstrings: set[int]) -> tuple[int, list[int]]:
    """How many tokens the code has, and the numbers of its lines."""
    count = depth = 0
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in LAYOUT or token.start[0] in docstrings:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        count += depth == 0
        depth += (token.type == FSTRING_START) - (token.type == FSTRING_END)
    return count, sorted(lines)


def is_pair(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def walruses_in(call: ast.Call) -> list[int]:
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    inside = [node for argument in arguments for node in ast.walk(argument)]
    return [node.lineno for node in inside if isinstance(node, ast.NamedExpr)]


def bound_name(node: ast.AST) -> str:
    """The name that this node binds; "" where it binds none."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.ExceptHandler):
        return node.name or ""
    return node.asname or "" if isinstance(node, ast.alias) else ""


def measure(root: Path, path: Path) -> File:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    tokens, code = code_tokens(source, docstring_lines(tree))
    walruses = [line for node in nodes if isinstance(node, ast.Call) for line in walruses_in(node)]
    return File(
        path=path.relative_to(root).as_posix(),
        lines=source.splitlines(),
        code=code,
        tokens=tokens,
        pairs=sum(map(is_pair, nodes)),
        walruses=sorted(set(walruses)),
        vague=[(n.lineno, bound_name(n)) for n in nodes if bound_name(n) in VAGUE_NAMES],
    )


# -----------------------------------------------------------------------------
# The rules: each gives its problems, a line for each place


def too_long(files: list[File]) -> list[str]:
    problems = []
    for file in files:
        limit = TWIN_FILE_LINES if file.part in TWINS else SCRIPT_LINES
        if file.path.startswith("modules/") and len(file.lines) > limit:
            problems.append(f"{file.path}: {len(file.lines)} lines, at most {limit}")

    for twin in TWINS:
        package = sum(len(file.lines) for file in files if file.part == twin)
        if package > TWIN_LINES:
            problems.append(f"{twin}: {package} lines in all, at most {TWIN_LINES}")
    median = median_length(files)
    if median > SCRIPT_MEDIAN:
        problems.append(f"modules: a median file of {median:g} lines, at most {SCRIPT_MEDIAN}")
    return problems


def median_length(files: list[File]) -> float:
    return statistics.median(
        [len(file.lines) for file in files if file.path.startswith("modules/")] or [0]
    )


def lesson_line(file: File, pattern: str) -> int | None:
    """The first line of code, neither an import nor a comment, with the pattern."""
    for number in file.code:
        text = file.lines[number - 1].split("  # ")[0]
        is_import = text.lstrip().startswith(("import ", "from "))
        if re.search(pattern, text) and not is_import:
            return number
    return None


def late_lessons(files: list[File]) -> list[str]:
    problems = []
    for file in files:
        if not file.is_script:
            continue
        pattern = LESSON.get(file.path.removeprefix("modules/"))
        if pattern is None:
            problems.append(f"{file.path}: say in LESSON of scripts/lint.py what it is about")
            continue
        line = lesson_line(file, pattern)
        if line is None:
            problems.append(f"{file.path}: no code has {pattern}, which LESSON says it is about")
        elif line >= LESSON_BEFORE:
            problems.append(f"{file.path}:{line}: the lesson, due before line {LESSON_BEFORE}")
    scripts = {file.path.removeprefix("modules/") for file in files if file.is_script}
    return problems + [
        f"modules/{path}: in LESSON, but not here" for path in LESSON.keys() - scripts
    ]


def dense(files: list[File]) -> list[str]:
    problems = []
    for part, limit in TOKENS_PER_LINE.items():
        average = tokens_per_line([file for file in files if file.part == part])
        if average > limit:
            problems.append(
                f"{part}: {average:.2f} tokens in an average code line, at most {limit}"
            )
    if pairs_per_1000_lines(files) > PAIRS_PER_1000_LINES:
        worst = max(files, key=lambda file: file.pairs)
        problems.append(
            f"{pairs_per_1000_lines(files):.1f} assignments of a tuple to a tuple in 1,000 lines, "
            f"at most {PAIRS_PER_1000_LINES}: {worst.path} has {worst.pairs}"
        )
    return problems


def tokens_per_line(files: list[File]) -> float:
    return sum(file.tokens for file in files) / max(1, sum(len(file.code) for file in files))


def pairs_per_1000_lines(files: list[File]) -> float:
    return 1000 * sum(file.pairs for file in files) / max(1, sum(len(file.lines) for file in files))


def hidden_or_vague(files: list[File]) -> list[str]:
    problems = []
    for file in files:
        if file.part not in TAUGHT:
            continue
        problems += [f"{file.path}:{line}: a walrus in arguments" for line in file.walruses]
        problems += [f"{file.path}:{line}: {name} says nothing" for line, name in file.vague]
    return problems


RULES = (too_long, late_lessons, dense, hidden_or_vague)


def show(files: list[File]) -> None:
    rows = []
    for part in [*TOKENS_PER_LINE, "all"]:
        chosen = [file for file in files if part in (file.part, "all")]
        if not chosen:
            continue
        longest = max(len(file.lines) for file in chosen)
        row = [part, len(chosen), sum(len(file.lines) for file in chosen), longest]
        row += [f"{tokens_per_line(chosen):.2f}", f"{pairs_per_1000_lines(chosen):.1f}"]
        row += [sum(len(file.walruses) for file in chosen), sum(len(f.vague) for f in chosen)]
        rows.append(row)
    columns = ["", "files", "lines", "longest", "tokens/line", "pairs/1,000 lines"]
    table([*columns, "walruses in arguments", "vague names"], rows)
    print(f"  median file of modules/: {median_length(files):g} lines")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="the tree to measure")
    parser.add_argument("--show", action="store_true", help="print the table, judge nothing")
    args = parser.parse_args()
    root = args.folder

    folders = [root / part for part in TOKENS_PER_LINE if part not in TWINS]
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    files = [measure(root, path) for path in paths]
    show(files)
    if args.show:
        return
    problems = [problem for rule in RULES for problem in rule(files)]
    print("\n".join(problems), file=sys.stderr)
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
