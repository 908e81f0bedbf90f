"""One device or two: the same model with tensor-parallel-size 1 and 2. What gets faster?

A second device halves what each of them reads and multiplies, and adds two all-reduces a layer. So
a step gets less than twice as fast; but the weights lie there once instead of twice, and all the
rest of the second device's memory holds KV cache.

    make vllm-tp
    python modules/03_vllm/10_tensor_parallel_speed.py --shape qwen2.5-1.5b-instruct --batches 1 16

Only the model's shape is needed (configs/models.yaml): random weights cost the same time. On a CPU
a `device` is one core.
Look at: the ratio at batch 1 and at larger ones, of reading a prompt, and the tokens the KV cache
holds.
"""

import argparse
import json
import os

from closed_loop import drive  # the file beside this one

from lab import RUNS, engine, fail, jobs, models, results
from lab.profile import load_profile, need_cards
from lab.table import table


def main() -> None:
    profile = load_profile()
    defaults = profile.tensor_parallel
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        default=defaults.shape,
        help="name in configs/models.yaml, hub id or config.json (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=list(defaults.batches),
        help=f"requests at once (default: {' '.join(map(str, defaults.batches))})",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=defaults.prompt_tokens,
        help="of each (default: %(default)s)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=defaults.answer_tokens,
        help="of each (default: %(default)s)",
    )
    args, flags = parser.parse_known_args()
    if min(*args.batches, args.prompt_tokens, args.answer_tokens - 1) < 1:
        fail("--batches and --prompt-tokens must be at least 1, --answer-tokens at least 2")
    need_cards("vllm-tp", 2, "see it on a CPU after make setup LOCK=cpu")
    jobs.refuse_taken_cards()
    config = models.config(args.shape)
    for name in ("num_attention_heads", "num_key_value_heads"):
        if config.get(name, 2) % 2:
            fail(f"{args.shape} cannot be divided by two: its {name} is {config[name]}")
    folder = RUNS / "models" / f"shape-{args.shape.replace('/', '--')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))

    from vllm import SamplingParams

    def requests(batch: int, tokens: int, answer: int) -> list:
        """`batch` prompts of `tokens` tokens, every one different, answers of `answer` tokens."""
        length = {"max_tokens": answer, "ignore_eos": True}
        params = SamplingParams(temperature=0, detokenize=False, **length)
        prompts = []
        for i in range(batch):
            prompts.append([1000 + (17 * i + 31 * j + 7 * answer) % 9000 for j in range(tokens)])
        return [({"prompt_token_ids": prompt}, params) for prompt in prompts]

    # -----------------------------------------------------------------------------
    # 1. The same requests, on one device and on two

    metrics: dict[str, float] = {}
    for devices in (1, 2):
        if profile.device == "cpu":  # each rank one core
            cores = map(str, range(devices))
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores)
        engine_args = {**defaults.args, "tensor-parallel-size": devices}
        vllm = engine.start(folder, profile.dtype, engine_args, flags)
        drive(vllm, requests(2, args.prompt_tokens, 3))  # compiles what is compiled

        alone = drive(vllm, requests(1, args.prompt_tokens, 2)).timings[0]
        metrics[f"tp{devices}_prefill_tok_per_s"] = round(args.prompt_tokens / alone.first, 1)
        for batch in args.batches:
            step = drive(vllm, requests(batch, 16, args.answer_tokens)).step_s
            metrics[f"tp{devices}_batch_{batch}_step_ms"] = round(1e3 * step, 3)
        cache = vllm.vllm_config.cache_config
        metrics[f"tp{devices}_kv_cache_count"] = cache.num_gpu_blocks * cache.block_size
        engine.stop(vllm)

    # -----------------------------------------------------------------------------
    # 2. Side by side: of a time, less is a gain; of a rate and of room, more

    rows = []

    def gain(title: str, name: str, of_a_time: bool = False) -> float:
        one = metrics[f"tp1_{name}"]
        two = metrics[f"tp2_{name}"]
        ratio = one / two if of_a_time else two / one
        rows.append([title, f"{one:,.1f}", f"{two:,.1f}", f"{ratio:.2f}x"])
        return round(ratio, 2)

    prefill = f"prefill of {args.prompt_tokens}"
    ratios = {"prefill_gain_ratio": gain(f"{prefill}, tokens/s", "prefill_tok_per_s")}
    for batch in args.batches:
        step = gain(f"a step of {batch}, ms", f"batch_{batch}_step_ms", of_a_time=True)
        ratios[f"batch_{batch}_gain_ratio"] = step
    ratios["kv_cache_gain_ratio"] = gain("tokens the KV cache holds", "kv_cache_count")
    print()
    table(["tensor-parallel-size", "1", "2", "gain"], rows)

    # -----------------------------------------------------------------------------
    # 3. The picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = [f"decode,\nbatch {batch}" for batch in args.batches]
    names = [f"prefill\nof {args.prompt_tokens} tokens", *decode, "KV cache"]
    colours = ["tab:blue"] * (len(names) - 1) + ["tab:green"]
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    bars = ax.bar(names, ratios.values(), width=0.55, color=colours)
    ax.bar_label(bars, fmt="%.2fx")
    ax.axhline(2, color="k", ls="--", lw=1)
    device = "core" if profile.device == "cpu" else "GPU"
    ax.set_title(f"Tensor parallelism on 2 x {device}: {args.shape}")
    ax.set(ylabel="two devices / one", ylim=(0, max(2.3, 1.15 * max(ratios.values()))))
    results.picture(__file__, "tensor_parallel", fig)
    results.finish(__file__, metrics | ratios, vars(args))


if __name__ == "__main__":
    main()
