"""One self-contained page about what has been run here, with plots: `make report`.

It reads the newest record of every script in runs/records/ and writes runs/report.html: no server,
no network, no other file. The end of `make quickstart` writes it too.
"""

import argparse
import base64
import html
import io
import json
import re

from lab import RUNS, fail, machine, results, shown

STYLE = """
body {
  font: 16px/1.7 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif;
  color: #1f2430; background: #faf8f4; max-width: 60rem; margin: 0 auto; padding: 2rem 1rem;
}
h1 { font-size: 1.9rem; margin: 0; }
h2 {
  margin: 2.6rem 0 .2rem; border-top: 1px solid #ddd6c8; padding-top: 1.4rem; font-size: 1.25rem;
}
small, footer { color: #6b6f7a; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
.card { background: #fff; border: 1px solid #e6e0d4; border-radius: .6rem; padding: .6rem 1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card.bad b { color: #b3261e; }
svg, img {
  max-width: 100%; height: auto; background: #fff; border: 1px solid #e6e0d4;
  border-radius: .6rem; padding: .5rem; box-sizing: border-box;
}
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
td, th {
  border-bottom: 1px solid #e6e0d4; padding: .4rem .6rem; text-align: left; vertical-align: top;
}
code {
  background: #f0ebe0; border-radius: .25rem; padding: .05rem .3rem; overflow-wrap: anywhere;
}
"""
PAGE = """<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>大模型推理与微调：运行报告</title><style>{style}</style>
<h1>运行报告</h1><small>{machine}<br>提交 {commit}，{versions}</small>
{stages}<footer><h2>怎么得到的</h2><code>make quickstart</code> 依次运行每一关的代表脚本；\
每个数字的命令、日期和设置在 <code>{records}/</code>。接着学：
<code>make progress</code> 告诉你下一步。</footer></html>
"""
COLOURS = [
    *("#3a6ea5", "#d9822b", "#4f9d69", "#a14f8c", "#c2b280"),
    *("#7a7f8c", "#b3261e", "#2b8a8a", "#5b4fa1"),
]


def record(name: str) -> dict:
    """Metrics of the newest record of `name` (03_vllm/05_throughput); {} where it was not run."""
    file = results.FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["metrics"] if file.is_file() else {}


def figure(draw, height: float = 2.6) -> str:
    """What `draw(axes)` draws, as an <svg> element."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    }
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(8, height), layout="constrained")
    draw(axes)
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None})
    plt.close(fig)
    return re.sub(r"(?s)^.*?(?=<svg)", "", out.getvalue())  # without the XML prolog


def bars(values: dict[str, float], unit: str) -> str:
    """A horizontal bar for each of the values, the first on top."""

    def draw(axes):
        colours = COLOURS[: len(values)]
        drawn = axes.barh(list(values), list(values.values()), color=colours, height=0.6)
        axes.bar_label(drawn, fmt="%.4g", padding=4)
        axes.set_xlabel(unit)
        axes.invert_yaxis()

    return figure(draw, 0.9 + 0.4 * len(values))


def losses(curves: dict[str, list]) -> str:
    def draw(axes):
        for place, (name, curve) in enumerate(curves.items()):
            # Equal curves lie on each other: the first is the widest.
            width = 2 + 1.5 * (len(curves) - place)
            steps = range(1, len(curve) + 1)
            axes.plot(steps, curve, label=name, linewidth=width, alpha=0.75)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)

    return figure(draw, 3.2)


STATES = {"parameter": "parameters", "gradient": "gradients", "optimizer": "optimizer states"}


def zero_bytes(stages: dict[int, dict]) -> str:
    """The states of each ZeRO stage, one upon the other, and a mark where theory has them."""

    def draw(axes):
        names = [f"ZeRO-{stage}" for stage in stages]
        left = [0.0] * len(stages)
        for kind, label in STATES.items():
            sizes = [metrics[f"{kind}_state_gib"] for metrics in stages.values()]
            axes.barh(names, sizes, left=left, label=label, height=0.5)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
        theory = [metrics["state_theory_gib"] for metrics in stages.values()]
        axes.plot(theory, names, "k|", markersize=22, label="theory")
        axes.set_xlabel("GiB of states in each process, measured")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return figure(draw, 1.2 + 0.5 * len(stages))


def spelt(value) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3f} → {value[-1]:.3f}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cards(metrics: dict, labels: dict[str, str]) -> str:
    """A card for each of these metrics that the record has."""
    shown_cards = []
    for name, label in labels.items():
        if name in metrics:
            shown_cards.append(f"<div class=card><b>{spelt(metrics[name])}</b>{label}</div>")
    return f"<div class=cards>{''.join(shown_cards)}</div>"


# -----------------------------------------------------------------------------
# The stages: the HTML of each, "" where it was not run


def smoke() -> str:
    metrics = record("01_single_gpu_smoke/01_smoke")
    if not metrics:
        return ""
    labels = {
        "wrong_count": "处错误",
        "first_token_ms": "毫秒出第一个 token",
        "decode_tok_per_s": "tokens/s，单条序列",
        "decode_of_bandwidth_ratio": "达到带宽上限的比例",
    }
    products = {}
    for name, value in metrics.items():
        if product := re.fullmatch(r"matmul_(\w+)_tflop_per_s", name):
            products[product[1].replace("_", " ")] = value
    return cards(metrics, labels) + bars(products, "matrix product, TFLOP/s")


def image_edit() -> str:
    metrics = record("02_qwen_image_edit/01_edit")
    if not metrics:
        return ""
    content = cards(metrics, {"load_s": "秒加载", "step_s": "秒一步", "total_s": "秒一张图"})
    if machine.name().startswith("cpu"):
        content += (
            "<p>CPU 上的模型是随机权重，右边的噪声是预料之中的：真实的是流水线、形状和步骤。</p>"
        )
    folder = RUNS / "02_qwen_image_edit"
    pictures = sorted(folder.glob("*side_by_side.png"), key=lambda file: file.stat().st_mtime)
    if pictures:
        png = base64.b64encode(pictures[-1].read_bytes()).decode()
        content += f'<img alt="before and after" src="data:image/png;base64,{png}">'
    return content


def throughput() -> str:
    metrics = record("03_vllm/05_throughput")
    if not metrics:
        return ""
    speeds = {
        "transformers": metrics["transformers_tok_per_s"],
        "vLLM": metrics["vllm_tok_per_s"],
    }
    ratio = cards(metrics, {"vllm_over_transformers_ratio": "倍吞吐量，vLLM / transformers"})
    return ratio + bars(speeds, "generated tokens/s")


def trainings() -> str:
    scripts = {
        "one process": "04_Accelerate/01_train_ddp-one",
        "DDP": "04_Accelerate/01_train_ddp",
        "Accelerate": "04_Accelerate/02_train_accelerate",
    }
    scripts |= {f"ZeRO-{stage}": f"05_DeepSpeed/train-z{stage}" for stage in range(4)}
    records = {name: record(script) for name, script in scripts.items()}
    curves = {name: metrics["losses"] for name, metrics in records.items() if metrics}
    if not curves:
        return ""
    labels = {"world_size": "个进程", "losses": "损失，首末两步"}
    text = "<p>曲线重合就对了：并行方式只改变数存在哪里、由谁来算，不改变算什么。</p>"
    return cards(records["Accelerate"], labels) + text + losses(curves)


def zero() -> str:
    records = {stage: record(f"05_DeepSpeed/train-z{stage}") for stage in range(4)}
    stages = {stage: metrics for stage, metrics in records.items() if metrics}
    if not stages:
        return ""
    labels = {
        "zero_stage": "ZeRO 阶段，来自运行中的引擎",
        "state_gib": "GiB 状态，每个进程",
        "state_theory_gib": "GiB，公式",
    }
    return cards(stages[max(stages)], labels) + zero_bytes(stages)


def fine_tuning() -> str:
    metrics = record("06_LLaMA-Factory/02_score")
    if not metrics:
        return ""
    labels = {"base_exact_pct": "% 微调前", "tuned_exact_pct": "% 微调后", "row_count": "道题"}
    scores = {"before": metrics["base_exact_pct"], "after": metrics["tuned_exact_pct"]}
    return cards(metrics, labels) + bars(scores, "exact answers, %") + answers()


def answers() -> str:
    """Four of the requests, as answered before and after the tuning."""
    file = RUNS / "06_LLaMA-Factory/answers.json"
    scored = json.loads(file.read_text(encoding="utf-8"))[:4] if file.is_file() else []
    rows = ""
    for answer in scored:
        cells = [html.escape(answer.get(key, "")[:160]) for key in ("request", "base", "tuned")]
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = "<tr><th>没见过的请求</th><th>微调前</th><th>微调后</th></tr>"
    return f"<table>{heads}{rows}</table>"


STAGES = {
    "01 冒烟测试：机器算得对、读得快": smoke,
    "02 图像编辑：左边输入，右边输出": image_edit,
    "03 vLLM：同样的请求，同样的模型": throughput,
    "04 Accelerate：同一个训练，同样的损失": trainings,
    "05 DeepSpeed：状态切给了谁": zero,
    "06 LLaMA-Factory：微调前后，逐字相同才算对": fine_tuning,
}


def this_machine() -> str:
    facts = machine.describe()
    parts = [f"{facts['cpu']}，{facts['cores']} 核，{facts['ram_gib']} GiB"]
    parts += [f"{gpu['name']} {gpu['memory_gib']} GiB" for gpu in facts["gpus"]]
    return f"{facts['name']}：{'；'.join(parts)}"


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    contents = {title: stage() for title, stage in STAGES.items()}
    run_here = {title: content for title, content in contents.items() if content}
    if not run_here:
        fail("nothing has been run here yet: start with 'make quickstart' or 'make smoke'")
    versions = [f"{package} {version}" for package, version in machine.versions().items()]
    page = PAGE.format(
        style=STYLE,
        machine=this_machine(),
        commit=machine.commit(),
        versions="，".join(versions),
        stages="".join(f"<h2>{title}</h2>\n{text}\n" for title, text in run_here.items()),
        records=shown(results.FOLDER),
    )
    file = RUNS / "report.html"
    file.parent.mkdir(exist_ok=True)
    file.write_text(page, encoding="utf-8")
    size = f"{len(run_here)} stages, {len(page) / 1e6:.1f} MB"
    print(f"report: {shown(file)}, {size}: open it in a browser")


if __name__ == "__main__":
    main()
