"""Score the base model and the tuned one on held-out requests: greedy answers, exact match.

    make lf-score                       # after make lf-train
    make lf-score ARGS="--train"        # train first: before and after in one go
    make lf-score ARGS="--adapter runs/06_LLaMA-Factory/lora_z2 --limit 16"

The held-out split has phrasings and combinations of values that training does not have, so memory alone scores nothing. An answer
counts only when it is the expected text, character for character. Base and tuned model are one model in memory: PEFT switches the
adapter off for the first pass. The prompt is made by the model's own chat template, as a server would make it.
Look at: the same request before and after, the two scores, and the answers that are still wrong.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import ROOT, RUNS, data, fail, jobs, results, shown
from lab.profile import load_profile

HERE = Path(__file__).resolve().parent


def main() -> None:
    profile = load_profile()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default=f"runs/{HERE.name}/lora", help="folder that training wrote (default: %(default)s)")
    parser.add_argument("--test", default=profile.finetune.test, help="data set, by name or path (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N rows (default: all)")
    parser.add_argument("--batch-size", type=int, default=profile.finetune.batch_size, help="requests at a time (default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="run 01_train.py first")
    args = parser.parse_args()

    # -----------------------------------------------------------------------------
    # 1. The adapter, and the held-out rows

    import factory

    rows = data.rows(args.test)[: args.limit or None]
    if args.batch_size < 1:
        fail("--batch-size must be at least 1")
    jobs.refuse_taken_cards()
    if args.train:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training is ended with us
        process = subprocess.Popen([sys.executable, str(HERE / "01_train.py")])
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
        if code:
            raise SystemExit(code)
    adapter = factory.adapter_folder(args.adapter)
    base = ROOT / json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not base.is_dir():
        fail(f"the base model {shown(base)} of this adapter is gone: run 'make lf-train' again")

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, profile.finetune.dtype)).to(profile.device)
    model = PeftModel.from_pretrained(model, adapter).eval()

    # -----------------------------------------------------------------------------
    # 2. Greedy answers, in batches

    requests = [row["messages"][0]["content"] for row in rows]
    expected = [row["messages"][1]["content"] for row in rows]
    longest = max(len(tokenizer(text)["input_ids"]) for text in expected) + 4  # an answer that is longer is wrong anyway

    @torch.inference_mode()
    def answers() -> list[str]:
        found = []
        for start in range(0, len(requests), args.batch_size):
            chats = [[{"role": "user", "content": request}] for request in requests[start : start + args.batch_size]]
            inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
            inputs = inputs.to(profile.device)
            output = model.generate(**inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    began = time.monotonic()
    with model.disable_adapter():
        before = answers()
    middle = time.monotonic()
    after = answers()
    ended = time.monotonic()

    # -----------------------------------------------------------------------------
    # 3. Before and after

    wrong = [i for i, text in enumerate(after) if text != expected[i]]
    base_pct, tuned_pct = (100 * sum(a == e for a, e in zip(found, expected, strict=True)) / len(rows) for found in (before, after))
    line = {text: text.replace("\n", "\\n")[:110] for text in before + after}  # a text on one line, cut
    for i in range(min(3, len(rows))):
        print(f"request   {requests[i]}\n  base    {line[before[i]]}\n  tuned   {line[after[i]]}\n  wanted  {expected[i]}\n")
    for i in wrong[:10]:
        print(f"wrong     {requests[i]}\n  tuned   {line[after[i]]}\n  wanted  {expected[i]}")
    print(f"\nexact match on {len(rows)} held-out requests: base {base_pct:.1f} %, tuned {tuned_pct:.1f} % ({len(wrong)} wrong)")
    metrics = {"base_exact_pct": round(base_pct, 1), "tuned_exact_pct": round(tuned_pct, 1), "row_count": len(rows)}
    metrics |= {"wrong_count": len(wrong), "base_s": round(middle - began, 1), "tuned_s": round(ended - middle, 1)}
    answered = RUNS / HERE.name / "answers.json"
    table = [{"request": r, "wanted": e, "base": b, "tuned": t} for r, e, b, t in zip(requests, expected, before, after, strict=True)]
    answered.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    print(f"all answers: {shown(answered)}")
    results.finish(__file__, metrics, {"adapter": shown(adapter), "test": args.test, "dtype": profile.finetune.dtype})


if __name__ == "__main__":
    main()
