#!/usr/bin/env bash
# Regenerate locks/cpu.txt, locks/gpu.txt and locks/quantise.txt from the .in and .overrides files beside them: `make lock`.
# Versions already locked are kept while they satisfy the inputs; UPGRADE=1 takes the newest.
set -euo pipefail
cd "$(dirname "$0")/../locks"
uv=(../.venv/bin/python -m uv pip compile --quiet --generate-hashes --no-header --python-platform x86_64-manylinux_2_35
    --override common.overrides ${UPGRADE:+--upgrade})

echo "locks/cpu.txt (Python 3.11)"
if [ -n "${PIP_FIND_LINKS:-}" ]; then torch=(--find-links "$PIP_FIND_LINKS"); else torch=(--torch-backend cpu); fi
"${uv[@]}" "${torch[@]}" --python-version 3.11 --override cpu.overrides cpu.in -o cpu.txt

echo "locks/gpu.txt (Python 3.11, checked against 3.12)"
"${uv[@]}" --python-version 3.11 gpu.in -o gpu.txt
again=$(mktemp); trap 'rm -f "$again"' EXIT
"${uv[@]}" --python-version 3.12 --constraint gpu.txt gpu.in > "$again"
missing=$(comm -13 <(grep -o '^[a-z0-9][^ ;]*' gpu.txt | sort) <(grep -o '^[a-z0-9][^ ;]*' "$again" | sort))
[ -z "$missing" ] || { echo "error: on Python 3.12 gpu.in needs what locks/gpu.txt lacks:" $missing >&2; exit 2; }

echo "locks/quantise.txt (beside either)"
"${uv[@]}" --no-deps --python-version 3.11 quantise.in -o quantise.txt
