"""One self-contained page about what has been run here, with plots: `make report` (the end of `make
quickstart` writes it too).

It reads the newest record of every script in runs/records/ and writes runs/report.html: no server,
no network, no other file.
"""

import argparse
import base64
import html
import io
import json
import re

from lab import ROOT, RUNS, fail, machine, results, shown

STYLE = """
body{font:16px/1.7 system-ui,"Noto Sans CJK SC","Microsoft YaHei",sans-serif;color:#1f2430;background:#faf8f4;max-width:60rem;margin:0 auto;padding:2rem 1rem}
h1{font-size:1.9rem;margin:0}h2{margin:2.6rem 0 .2rem;border-top:1px solid #ddd6c8;padding-top:1.4rem;font-size:1.25rem}small,footer{color:#6b6f7a}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:.8rem 0}.card{background:#fff;border:1px solid #e6e0d4;border-radius:.6rem;padding:.6rem 1rem}
.card b{display:block;font-size:1.5rem;line-height:1.3}.card.bad b{color:#b3261e}svg,img{max-width:100%;height:auto;background:#fff;border:1px solid #e6e0d4;
border-radius:.6rem;padding:.5rem;box-sizing:border-box}table{border-collapse:collapse;width:100%;font-size:.86rem}td,th{border-bottom:1px solid #e6e0d4;padding:.4rem .6rem;
text-align:left;vertical-align:top}code{background:#f0ebe0;border-radius:.25rem;padding:.05rem .3rem;overflow-wrap:anywhere}
"""
COLOURS = [
    "#3a6ea5",
    "#d9822b",
    "#4f9d69",
    "#a14f8c",
    "#c2b280",
    "#7a7f8c",
    "#b3261e",
    "#2b8a8a",
    "#5b4fa1",
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


def bars(pairs: dict[str, float], unit: str) -> str:
    def draw(axes):
        found = axes.barh(
            list(pairs)[::-1],
            list(pairs.values())[::-1],
            color=COLOURS[: len(pairs)][::-1],
            height=0.6,
        )
        axes.bar_label(found, fmt="%.4g", padding=4)
        axes.set_xlabel(unit)

    return figure(draw, 0.9 + 0.4 * len(pairs))


def losses(curves: dict[str, list]) -> str:
    def draw(axes):
        for i, (name, values) in enumerate(
            curves.items()
        ):  # equal curves lie on each other: the first is the widest
            axes.plot(
                range(1, len(values) + 1),
                values,
                label=name,
                linewidth=2 + 1.5 * (len(curves) - i),
                alpha=0.75,
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)

    return figure(draw, 3.2)


def zero_bytes(stages: dict[int, dict]) -> str:
    def draw(axes):
        names, bottom = [f"ZeRO-{stage}" for stage in stages], [0.0] * len(stages)
        for kind in ("parameter", "gradient", "optimizer"):
            values = [m[f"{kind}_state_gib"] for m in stages.values()]
            axes.barh(
                names,
                values,
                left=bottom,
                label=f"{kind}s" if kind != "optimizer" else "optimizer states",
                height=0.5,
            )
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        axes.plot(
            [m["state_theory_gib"] for m in stages.values()],
            names,
            "k|",
            markersize=22,
            label="theory",
        )
        axes.set_xlabel("GiB of states in each process, measured")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return figure(draw, 1.2 + 0.5 * len(stages))


def cards(metrics: dict, words: dict[str, str]) -> str:
    def text(value) -> str:
        if isinstance(value, list):
            return f"{value[0]:.3f} → {value[-1]:.3f}"
        return (
            f"{value:,.4g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    return (
        "<div class=cards>"
        + "".join(
            f"<div class=card><b>{text(metrics[k])}</b>{w}</div>"
            for k, w in words.items()
            if k in metrics
        )
        + "</div>"
    )


def sections() -> list[tuple[str, str]]:
    """(title, HTML) of every stage that has a record."""
    found = []
    if smoke := record("01_single_gpu_smoke/01_smoke"):
        words = {
            "wrong_count": "处错误",
            "first_token_ms": "毫秒出第一个 token",
            "decode_tok_per_s": "tokens/s，单条序列",
            "decode_of_bandwidth_ratio": "达到带宽上限的比例",
        }
        products = {
            k[7:-12].replace("_", " "): v
            for k, v in smoke.items()
            if k.startswith("matmul_") and k.endswith("_tflop_per_s")
        }
        found.append(
            (
                "01 冒烟测试：机器算得对、读得快",
                cards(smoke, words) + bars(products, "matrix product, TFLOP/s"),
            )
        )
    if edit := record("02_qwen_image_edit/01_edit"):
        pictures = sorted(
            (RUNS / "02_qwen_image_edit").glob("*side_by_side.png"), key=lambda f: f.stat().st_mtime
        )
        picture = (
            f'<img alt="before and after" src="data:image/png;base64,{base64.b64encode(pictures[-1].read_bytes()).decode()}">'
            if pictures
            else ""
        )
        note = (
            "<p>CPU 上的模型是随机权重，右边的噪声是预料之中的：真实的是流水线、形状和步骤。</p>"
            if machine.name().startswith("cpu")
            else ""
        )
        found.append(
            (
                "02 图像编辑：左边输入，右边输出",
                cards(edit, {"load_s": "秒加载", "step_s": "秒一步", "total_s": "秒一张图"})
                + note
                + picture,
            )
        )
    if speed := record("03_vllm/05_throughput"):
        pairs = {"transformers": speed["transformers_tok_per_s"], "vLLM": speed["vllm_tok_per_s"]}
        found.append(
            (
                "03 vLLM：同样的请求，同样的模型",
                cards(speed, {"vllm_over_transformers_ratio": "倍吞吐量，vLLM / transformers"})
                + bars(pairs, "generated tokens/s"),
            )
        )
    trainings = {
        "one process": "04_Accelerate/01_train_ddp-one",
        "DDP": "04_Accelerate/01_train_ddp",
        "Accelerate": "04_Accelerate/02_train_accelerate",
    }
    trainings |= {f"ZeRO-{stage}": f"05_DeepSpeed/train-z{stage}" for stage in range(4)}
    curves = {name: m["losses"] for name, script in trainings.items() if (m := record(script))}
    if curves:
        text = "<p>曲线重合就对了：并行方式只改变数存在哪里、由谁来算，不改变算什么。</p>"
        found.append(
            (
                "04 Accelerate：同一个训练，同样的损失",
                cards(
                    record("04_Accelerate/02_train_accelerate"),
                    {"world_size": "个进程", "losses": "损失，首末两步"},
                )
                + text
                + losses(curves),
            )
        )
    if stages := {stage: m for stage in range(4) if (m := record(f"05_DeepSpeed/train-z{stage}"))}:
        last = stages[max(stages)]
        words = {
            "zero_stage": "ZeRO 阶段，来自运行中的引擎",
            "state_gib": "GiB 状态，每个进程",
            "state_theory_gib": "GiB，公式",
        }
        found.append(("05 DeepSpeed：状态切给了谁", cards(last, words) + zero_bytes(stages)))
    if score := record("06_LLaMA-Factory/02_score"):
        file = RUNS / "06_LLaMA-Factory/answers.json"
        answers = json.loads(file.read_text(encoding="utf-8"))[:4] if file.is_file() else []
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(a[k][:160])}</td>" for k in ("request", "base", "tuned"))
            + "</tr>"
            for a in answers
        )
        table = f"<table><tr><th>没见过的请求</th><th>微调前</th><th>微调后</th></tr>{rows}</table>"
        pairs = {"before": score["base_exact_pct"], "after": score["tuned_exact_pct"]}
        found.append(
            (
                "06 LLaMA-Factory：微调前后，逐字相同才算对",
                cards(
                    score,
                    {
                        "base_exact_pct": "% 微调前",
                        "tuned_exact_pct": "% 微调后",
                        "row_count": "道题",
                    },
                )
                + bars(pairs, "exact answers, %")
                + table,
            )
        )
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    parts = sections()
    if not parts:
        fail("nothing has been run here yet: start with 'make quickstart' or 'make smoke'")
    facts = machine.describe()
    where = f"{facts['cpu']}，{facts['cores']} 核，{facts['ram_gib']} GiB" + "".join(
        f"；{g['name']} {g['memory_gib']} GiB" for g in facts["gpus"]
    )
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in parts)
    versions = "，".join(f"{package} {version}" for package, version in machine.versions().items())
    page = f"""<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>大模型推理与微调：运行报告</title><style>{STYLE}</style>
<h1>运行报告</h1><small>{facts["name"]}：{where}<br>提交 {machine.commit()}，{versions}</small>
{body}<footer><h2>怎么得到的</h2><code>make quickstart</code> 依次运行每一关的代表脚本；每个数字的命令、日期和设置在 <code>{shown(results.FOLDER)}/</code>。接着学：
<code>make progress</code> 告诉你下一步。</footer></html>
"""
    file = RUNS / "report.html"
    file.parent.mkdir(exist_ok=True)
    file.write_text(page, encoding="utf-8")
    print(
        f"report: {file.relative_to(ROOT)}, {len(parts)} stages, {len(page) / 1e6:.1f} MB: open it in a browser"
    )


if __name__ == "__main__":
    main()
