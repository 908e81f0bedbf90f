"""Greedy answers of vLLM in float32.

python vllm_chat.py '["MODEL FOLDER", "ADAPTER FOLDER or nothing", ["REQUEST"]]'
"""

import json
import sys

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    folder, adapter, requests = json.loads(sys.argv[1])
    llm = LLM(
        model=folder,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        enable_lora=bool(adapter),
    )
    outputs = llm.chat(
        [[{"role": "user", "content": request}] for request in requests],
        SamplingParams(temperature=0, max_tokens=60),
        use_tqdm=False,
        lora_request=LoRARequest("launch", 1, adapter) if adapter else None,
    )
    print("TEXTS", json.dumps([output.outputs[0].text for output in outputs]))


if __name__ == "__main__":
    main()
