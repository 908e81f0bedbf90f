"""What fewer bits cost and give: score, KV cache and speed of each folder, served by vLLM.

    make lf-quantise SCORE=1
    python modules/06_LLaMA-Factory/18_quantised.py --limit 8 --models runs/06_LLaMA-Factory/merged

The folders are the merged model and what 14_quantise.py has made of it, or those that you name.
Each answers the held-out requests greedily, all at once and then some of them alone. Flags that
this script does not know go to vLLM. On a CPU vLLM's kernel for 4 bits needs AVX-512; on one
without, transformers widens the weights and answers: the same rounding, no speed worth a number.
Look at: whether the score holds, the tokens that the KV cache has room for on a GPU, and the
tokens/s alone, where reading the weights is all that a step does, and all at once.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import factory
import scoring
from answering import greedy_answers, most_tokens

from lab import ROOT, engine, fail, jobs, machine, results, shown
from lab.profile import load_profile
from lab.table import table

ALONE = 4  # requests that are asked one after the other


class Served(NamedTuple):
    answers: list[str]
    room: int | None  # tokens that the KV cache holds; None on a CPU, where it is a setting
    together: float | None  # tokens/s, all requests at once
    alone: float | None  # tokens/s, one request


def generate(vllm, prompts: list[list[int]], most: int) -> tuple[list[str], float]:
    """(greedy answers to the tokens of each prompt, tokens/s over all of them)."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=most)
    for number, prompt in enumerate(prompts):
        vllm.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
    done = {}
    began = time.perf_counter()
    while vllm.has_unfinished_requests():
        done |= {int(one.request_id): one.outputs[0] for one in vllm.step() if one.finished}
    seconds = time.perf_counter() - began
    outputs = [done[number] for number in range(len(prompts))]
    tokens = sum(len(output.token_ids) for output in outputs)
    return [output.text for output in outputs], tokens / seconds


def serve(folder: Path, profile, flags: list[str], prompts: list[list[int]], most: int) -> Served:
    """vLLM's engine with this folder, from its start to its end."""
    vllm = engine.start(folder, profile.dtype, profile.throughput.args, flags)
    generate(vllm, prompts[:ALONE], 4)  # so that nothing is compiled while the clock runs
    cache = vllm.vllm_config.cache_config
    room = cache.num_gpu_blocks * cache.block_size if profile.device == "cuda" else None
    # The answers before are in the prefix cache, as they would be of any server.
    alone = [generate(vllm, [prompt], most)[1] for prompt in prompts[:ALONE]]
    answers, together = generate(vllm, prompts, most)
    engine.stop(vllm)
    return Served(answers, room, together, sum(alone) / len(alone))


def has_kernel(folder: Path, profile) -> bool:
    """Whether vLLM has code for this folder's weights on this machine."""
    described = json.loads((folder / "config.json").read_text())
    in_four_bits = described.get("quantization_config", {}).get("format") == "pack-quantized"
    return profile.device == "cuda" or not in_four_bits or machine.fast_bfloat16()


def main() -> None:
    profile = load_profile()
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    several = "folders of whole models (default: the merged one, and all quantised ones)"
    parser.add_argument("--models", nargs="+", metavar="FOLDER", help=several)
    held_out = "held-out data set, by name or file (default: %(default)s)"
    parser.add_argument("--test", default=profile.finetune.test, help=held_out)
    first = "take only the first N rows (default: all)"
    parser.add_argument("--limit", type=int, default=0, metavar="N", help=first)
    args, flags = parser.parse_known_args()
    jobs.refuse_taken_cards()
    quantised = sorted((factory.FOLDER / "quantised").glob("*/config.json"))
    folders = [ROOT / model for model in args.models or []]
    folders = folders or [factory.FOLDER / "merged", *(file.parent for file in quantised)]
    for folder in folders:
        if not (folder / "config.json").is_file():
            fail(
                f"there is no model in {shown(folder)}: run 'make lf-merge' and 'make lf-quantise'"
            )

    # -----------------------------------------------------------------------------
    # 1. The same prompts for all of them

    from transformers import AutoTokenizer

    rows = scoring.converted_rows(args.test, None, args.limit)
    tokenizer = AutoTokenizer.from_pretrained(folders[0], padding_side="left")
    switches = factory.trained(shown(folders[0])).switches
    questions = scoring.questions(rows, tokenizer, switches)
    texts = [question.prompt for question in questions]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    most = most_tokens(tokenizer, questions)

    # -----------------------------------------------------------------------------
    # 2. One after the other

    metrics = {"row_count": len(questions)}
    lines = []
    for folder in folders:
        print(f"{shown(folder)}: {len(questions)} requests", flush=True)
        if has_kernel(folder, profile):
            served = serve(folder, profile, flags, prompts, most)
        else:
            print("  transformers: vLLM's kernel for 4 bits needs AVX-512 on a CPU", flush=True)
            model = scoring.loader(profile)(folder)
            batch = profile.finetune.batch_size
            answers, _ = greedy_answers(model, tokenizer, texts, batch, most)
            served = Served(answers, None, None, None)
        answers = [scoring.without_thoughts(answer) for answer in served.answers]
        name = folder.name.replace("-", "_")
        scores = scoring.measures(name, questions, answers)
        speeds = {
            f"{name}_gb": round(factory.size_gb(folder), 3),
            f"{name}_kv_cache_count": served.room,
            f"{name}_tokens_per_s": served.together and round(served.together, 1),
            f"{name}_alone_tokens_per_s": served.alone and round(served.alone, 1),
        }
        metrics |= scores | {key: value for key, value in speeds.items() if value is not None}
        lines.append([folder.name, scoring.exact_shown(scores, name), *speeds.values()])

    # -----------------------------------------------------------------------------
    # 3. Side by side

    header = ["", "exact, % (95 %)", "GB", "KV cache, tokens", "tokens/s", "tokens/s alone"]
    table(header, lines)
    config = {"models": [shown(folder) for folder in folders], "test": args.test}
    results.finish(__file__, metrics, config, folders[0].name if args.models else "")


if __name__ == "__main__":
    main()
