"""Score the base model and the tuned one on held-out requests: greedy answers, exact match.

    make lf-score                       # after make lf-train
    make lf-score ARGS="--train"        # train first: before and after in one go
    make lf-score ARGS="--adapter runs/06_LLaMA-Factory/lora_z2 --limit 16"

The held-out split has phrasings and combinations of values that training does not have, so memory
alone scores nothing. An answer counts only when it is the expected text, character for character.
Base and tuned model are one model in memory: PEFT switches the adapter off for the first pass. The
prompt is made by the model's own chat template, as a server would make it.
Look at: the same request before and after, the two scores, and the answers that are still wrong.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import factory

from lab import RUNS, data, fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def greedy_answers(model, tokenizer, requests: list[str], batch_size: int, most: int) -> list[str]:
    """The model's answer of at most `most` tokens to each request, `batch_size` at a time."""
    answers: list[str] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": request}] for request in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(  # [batch, prompt + answer], prompts padded on the left
            **inputs,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        prompt_length = inputs["input_ids"].shape[1]
        answers += tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return answers


def train_first() -> None:
    """Run 01_train.py to its end, or go on with it; end with its exit code where it fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends with us
    process = subprocess.Popen([sys.executable, str(HERE / "01_train.py"), "--resume-or-begin"])
    try:
        code = process.wait()
    finally:
        process.terminate()
        process.wait()
    if code:
        raise SystemExit(code)


def on_one_line(text: str) -> str:
    return text.replace("\n", "\\n")[:110]


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What is scored
    factory.add_adapter_flag(parser)
    parser.add_argument("--train", action="store_true", help="run 01_train.py first")
    # On what
    parser.add_argument(
        "--test",
        default=profile.finetune.test,
        help="held-out data set, by name or path (default: %(default)s)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="take only the first N rows (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=profile.finetune.batch_size,
        help="requests that are answered at a time (default: %(default)s)",
    )
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The held-out rows, the adapter and its model

    rows = data.rows(args.test)[: args.limit or None]
    requests = [row["messages"][0]["content"] for row in rows]
    wanted = [row["messages"][1]["content"] for row in rows]
    if args.batch_size < 1:
        fail("--batch-size must be at least 1")
    jobs.refuse_taken_cards()
    if args.train:
        train_first()
    adapter = factory.adapter_folder(args.adapter)
    trained = json.loads((adapter / "adapter_config.json").read_text())
    folder = factory.base_model(trained["base_model_name_or_path"])

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    dtype = getattr(torch, profile.finetune.dtype)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(profile.device)
    model = PeftModel.from_pretrained(base, adapter).eval()

    # -----------------------------------------------------------------------------
    # 2. Greedy answers, without the adapter and with it

    # An answer that is longer than any expected one is wrong anyway.
    most = max(len(tokenizer(text)["input_ids"]) for text in wanted) + 4
    with torch.inference_mode():
        began = time.monotonic()
        with model.disable_adapter():
            before = greedy_answers(model, tokenizer, requests, args.batch_size, most)
        middle = time.monotonic()
        after = greedy_answers(model, tokenizer, requests, args.batch_size, most)
        ended = time.monotonic()

    # -----------------------------------------------------------------------------
    # 3. Before and after

    wrong = [row for row, answer in enumerate(after) if answer != wanted[row]]
    right_before = [row for row, answer in enumerate(before) if answer == wanted[row]]
    base_pct = 100 * len(right_before) / len(rows)
    tuned_pct = 100 - 100 * len(wrong) / len(rows)
    for row in range(min(3, len(rows))):
        print(f"request   {requests[row]}")
        print(f"  base    {on_one_line(before[row])}")
        print(f"  tuned   {on_one_line(after[row])}")
        print(f"  wanted  {wanted[row]}\n")
    for row in wrong[:10]:
        print(f"wrong     {requests[row]}")
        print(f"  tuned   {on_one_line(after[row])}")
        print(f"  wanted  {wanted[row]}")
    print(
        f"\nexact match on {len(rows)} held-out requests: "
        f"base {base_pct:.1f} %, tuned {tuned_pct:.1f} % ({len(wrong)} wrong)"
    )
    file = RUNS / HERE.name / "answers.json"
    columns = ("request", "wanted", "base", "tuned")
    answers = [
        dict(zip(columns, texts, strict=True))
        for texts in zip(requests, wanted, before, after, strict=True)
    ]
    file.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    print(f"all answers: {shown(file)}")
    metrics = {
        "base_exact_pct": round(base_pct, 1),
        "tuned_exact_pct": round(tuned_pct, 1),
        "row_count": len(rows),
        "wrong_count": len(wrong),
        "base_s": round(middle - began, 1),
        "tuned_s": round(ended - middle, 1),
    }
    config = {"adapter": shown(adapter), "test": args.test, "dtype": profile.finetune.dtype}
    results.finish(__file__, metrics, config)


if __name__ == "__main__":
    main()
