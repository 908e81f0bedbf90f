#!/usr/bin/env bash
# Install the gpu lock in a fresh clone and ask every engine in it for its version and its command line.
#
#   scripts/check_lock.sh FOLDER     FOLDER must not exist, or hold an earlier check; it takes about 10 GB and needs no GPU
set -euo pipefail
cd -P "$(dirname "$0")/.."
fail() { echo "error: $*" >&2; exit 2; }
[ $# = 1 ] || fail "name the folder for the clone: scripts/check_lock.sh FOLDER"
[ ! -e "$1" ] || [ -e "$1/locks/gpu.txt" ] || fail "$1 is here and is no clone of this repository: name another folder"
[ -e "$1" ] || git clone --quiet . "$1"
cd "$1"
LOCK=gpu ENV=venv scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH

echo "check: versions"
.venv/bin/python - <<'PY'
import importlib
from importlib.metadata import version

import torch

engines = "torch vllm transformers accelerate deepspeed llamafactory diffusers bitsandbytes peft trl gradio".split()
for name in engines:
    importlib.import_module(name)
    print(f"  {name} {version(name)}")
for task in "pt sft dpo kto rm ppo".split():
    # trl's own command line is not asked: beside transformers 5 it wants mergekit, which nothing here uses.
    importlib.import_module(f"llamafactory.train.{task}.workflow")
print(f"  torch was built for CUDA {torch.version.cuda}, GPU here: {torch.cuda.is_available()}")
PY

echo "check: command lines"
answers() {  # answers WORD COMMAND...: the command ends well and what it prints holds WORD
  local word=$1 out
  shift
  out=$("$@" 2>&1) || { tail -n 20 <<< "$out" >&2; fail "$* failed"; }
  grep -qiF -e "$word" <<< "$out" || fail "$* did not print $word"
  echo "  $*"
}
answers --config_file accelerate launch --help
answers --num_gpus deepspeed --help
answers version llamafactory-cli version
answers usage hf --help
answers usage modelscope --help
answers usage gradio --help
# vLLM decides for what device it runs before it reads the command line: without a GPU that sentence is all it can say.
serve=(.venv/bin/python -m vllm.entrypoints.openai.api_server --help)
if .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  answers --max-model-len "${serve[@]}"
else
  out=$("${serve[@]}" 2>&1) && fail "vLLM found a device where torch sees none"
  grep -q "Failed to infer device type" <<< "$out" || { tail -n 20 <<< "$out" >&2; fail "${serve[*]} failed"; }
  echo "  ${serve[*]}: ends with \"Failed to infer device type\", as it must without a GPU"
fi
echo "check: the gpu lock is whole"
