#!/usr/bin/env bash
# The packages of locks/quantise.txt, newer than the environment's, in a folder of their own: `make lf-quantise` calls this.
#
# A Python that has .venv/quantise in its PYTHONPATH takes these first and all others from the environment, where torch is.
set -euo pipefail
cd -P "$(dirname "$0")/.."
. scripts/machine.sh
folder=.venv/quantise
exec 9> .venv/quantise.busy
flock 9                     # of two at once, the second waits
! cmp -s locks/quantise.txt "$folder/lock.txt" || exit 0

echo "fetching $(grep -c '^[a-z]' locks/quantise.txt) packages of locks/quantise.txt into $folder"
index=$(package_index .venv/bin/python)
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
rm -rf "$folder"
.venv/bin/python -m uv pip install --quiet --no-deps --require-hashes --target "$folder" -r locks/quantise.txt || {
  echo "error: the packages that quantising needs did not arrive (see above): check the network and the disk, then repeat the command" >&2
  exit 2
}
cp locks/quantise.txt "$folder/lock.txt"
