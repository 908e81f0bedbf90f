#!/usr/bin/env bash
# Choose or create the environment and fill it with the hashed lock: `make setup`.
#
#   make setup                the active or existing conda environment `videofen`, one made from environment.yml
#                             where conda or mamba is installed, else .venv; the gpu lock where an NVIDIA GPU is visible
#   make setup LOCK=cpu|gpu   take this lock whatever the machine; the environment then keeps it
#   make setup ENV=venv       take .venv even where conda is installed
#   make setup YES=1          let it change a `videofen` that it did not create
#   scripts/setup.sh --check  is the environment there and up to date? (every make target asks)
set -euo pipefail
cd -P "$(dirname "$0")/.."
root=$PWD

fail() { echo "error: $*" >&2; exit 2; }
say() { echo "setup: $*"; }

# -----------------------------------------------------------------------------
# 1. Which lock, which environment

gpu_visible() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }
case ${LOCK:-} in ""|cpu|gpu) ;; *) fail "LOCK=$LOCK is unknown: say LOCK=cpu or LOCK=gpu" ;; esac
case ${ENV:-} in ""|venv|conda) ;; *) fail "ENV=$ENV is unknown: say ENV=venv or ENV=conda" ;; esac

conda=""
for c in mamba conda "${CONDA_EXE:-}"; do [ -n "$c" ] && command -v "$c" >/dev/null && { conda=$c; break; }; done
[ "${ENV:-}" != conda ] || [ -n "$conda" ] || fail "ENV=conda, but neither conda nor mamba is on PATH: install Miniforge, or say ENV=venv"
# conda prints `videofen  *  /path`, mamba 2 indents that and pads it with blanks.
conda_prefix() { { "$conda" env list 2>/dev/null || true; } | sed -n 's/ *$//; s/^ *videofen[ *+]\{1,\}//p' | head -n 1; }

prefix=$root/.venv          # .venv is the environment, or a link to the conda one: make finds Python there
if [ "${ENV:-}" != venv ]; then
  if [ "${CONDA_DEFAULT_ENV:-}" = videofen ] && [ -n "${CONDA_PREFIX:-}" ]; then prefix=$CONDA_PREFIX
  elif [ -L .venv ] && [ -e .venv ]; then prefix=$(readlink .venv)
  elif [ -n "$conda" ] && [ ! -d .venv ]; then prefix=$(conda_prefix); prefix=${prefix:-new}; fi
fi
[ "$prefix" = "$root/.venv" ] || [ -L .venv ] || [ ! -e .venv ] ||
  fail "the conda environment videofen is active, and .venv is here too: remove one of them (rm -r .venv, or conda deactivate)"
[ "${ENV:-}" != venv ] || [ ! -L .venv ] || fail ".venv is a link to $(readlink .venv): remove the link (rm .venv), then repeat make setup ENV=venv"

# The marker says that set-up made this environment, and, once it is filled, from what: an interrupted run leaves it empty.
marker=.videofen-setup
made=$(cat "$prefix/$marker" 2>/dev/null || echo none)
lock=${LOCK:-$(echo "$made" | sed -n 's/^\([cg]pu\) .*/\1/p')}
if [ -z "$lock" ]; then if gpu_visible; then lock=gpu; else lock=cpu; fi; fi
wanted="$lock $(cat "locks/$lock.txt" pyproject.toml | sha256sum | cut -c1-16) $root"
if [ "$prefix" != new ] && [ -x "$prefix/bin/python" ] && [ "$made" = "$wanted" ] && [ .venv/bin -ef "$prefix/bin" ]; then
  [ "${1:-}" = --check ] || say "up to date ($lock lock, $prefix)"
  exit 0
fi
if [ "${1:-}" = --check ]; then
  [ -x .venv/bin/python ] && fail "the environment is not up to date: run 'make setup'"
  fail "no environment yet: run 'make setup' first"
fi

# -----------------------------------------------------------------------------
# 2. What would fail later is said now

if [ "$lock" = gpu ] && gpu_visible; then   # torch 2.11 carries CUDA 13
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  [ "${driver%%.*}" -ge 580 ] 2>/dev/null ||
    fail "NVIDIA driver $driver is too old for the gpu lock (CUDA 13): install driver 580 or newer (Ubuntu: sudo apt install nvidia-driver-580) and reboot, or take LOCK=cpu"
fi
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the locks are for Linux on x86-64, this is $(uname -sm)"

need=6; [ "$lock" = cpu ] || need=18        # GiB: the environment and uv's cache of wheels
target=$root; [ "$prefix" = new ] || target=$(dirname "$prefix")
free=$(df -Pk "$target" | awk 'NR==2 {print int($4 / 1048576)}')
[ -e "$prefix/$marker" ] || [ "$free" -ge "$need" ] ||
  fail "$free GiB free on the disk of $target, the $lock lock needs $need GiB: free some space, then repeat make setup"

# -----------------------------------------------------------------------------
# 3. The environment

python_for_venv() {
  local tried minor
  for tried in python3.11 python3 python "$(uv python find 3.11 2>/dev/null || true)" $([ "$lock" = cpu ] || echo python3.12); do
    [ -n "$tried" ] && command -v "$tried" >/dev/null || continue
    minor=$("$tried" -c 'import sys, ensurepip, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$minor" = 3.11 ] || { [ "$minor" = 3.12 ] && [ "$lock" = gpu ]; }; then echo "$tried"; return; fi
  done
  return 1
}

if [ "$prefix" = new ]; then
  say "creating the conda environment videofen from environment.yml with $conda"
  "$conda" env create -f environment.yml || fail "$conda could not create videofen (see above): mend that and repeat make setup, or take a plain .venv with make setup ENV=venv"
  prefix=$(conda_prefix)
  { [ -n "$prefix" ] && [ -x "$prefix/bin/python" ]; } || fail "$conda created videofen, but it holds no Python: remove it (conda env remove -n videofen), then repeat make setup"
  : > "$prefix/$marker"
elif [ "$prefix" = "$root/.venv" ] && [[ $made != *" $root" ]]; then   # none yet, interrupted half-way, or made in another folder
  [ ! -e .venv ] || [ "$made" != none ] || [ "${YES:-}" = 1 ] || fail ".venv is here and was not made by make setup: remove it, or let set-up replace it with YES=1"
  python=$(python_for_venv) || fail "no Python 3.11 with its venv module found: install it (Ubuntu: sudo apt install python3.11 python3.11-venv; anywhere: uv python install 3.11, or Miniforge), then repeat make setup"
  say "creating .venv with $("$python" --version)"
  rm -rf .venv && mkdir .venv && : > "$prefix/$marker"
  "$python" -m venv .venv || fail "could not create .venv (see above): check that the disk has space and that this folder can be written, then repeat make setup"
elif [ -z "$made" ]; then
  # Interrupted: uv takes what it left half-installed for installed (INSTALLER is written last), and pip, to get uv with, may be gone.
  for info in "$prefix"/lib/python3.*/site-packages/*.dist-info; do [ -e "$info/INSTALLER" ] || rm -rf "$info"; done
  "$prefix/bin/python" -m ensurepip >/dev/null 2>&1 || true
fi
[ -x "$prefix/bin/python" ] || fail "$prefix has no Python: conda install -n videofen python=3.11, or remove it, then repeat make setup"
minor=$("$prefix/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$minor" = 3.11 ] || { [ "$minor" = 3.12 ] && [ "$lock" = gpu ]; } ||
  fail "$prefix has Python $minor, the $lock lock needs 3.11: remove that environment and repeat make setup"
command -v g++ >/dev/null || compgen -G "$prefix/bin/*-g++" >/dev/null ||
  fail "no C++ compiler, which DeepSpeed and torch.compile need: install g++ (Ubuntu: sudo apt install build-essential), then repeat make setup"

# -----------------------------------------------------------------------------
# 4. Fill it with the lock

# A hash pins each file, so a mirror is as good as PyPI; uv does not read pip's settings by itself.
index=${PIP_INDEX_URL:-$("$prefix/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
[ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cache=${XDG_CACHE_HOME:-${HOME:-/proc}/.cache}
{ mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null || export UV_CACHE_DIR=${UV_CACHE_DIR:-$root/runs/cache/uv}   # HOME is read-only

requirement() { awk -v pattern="$1" '/^[^ #]/ {on = $0 ~ pattern} on' "locks/$lock.txt"; }   # the lock's entries whose first line matches
requirement '^uv==' > "$work/uv.txt"
if [ -x "$prefix/bin/uv" ] && grep -q "^uv==$("$prefix/bin/uv" --version | cut -d' ' -f2) " "$work/uv.txt"; then uv=$prefix/bin/uv
else
  "$prefix/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target "$work/uv" -r "$work/uv.txt" ||
    fail "could not install uv from PyPI (see above): check the network or set PIP_INDEX_URL to a mirror, then repeat make setup"
  uv=$work/uv/bin/uv
fi
pip=("$uv" pip)
on=(--python "$prefix/bin/python")

if [ ! -e "$prefix/$marker" ] && [ "${YES:-}" != 1 ]; then
  say "$prefix was not made by make setup. This would change in it (- removed, + installed):"
  links=(); [ -z "${PIP_FIND_LINKS:-}" ] || links=(--find-links "$PIP_FIND_LINKS")
  "${pip[@]}" sync --dry-run "${on[@]}" "${links[@]}" --require-hashes "locks/$lock.txt" 2>&1 | sed -n 's/^ /   /p'
  fail "nothing was changed: let it with 'make setup YES=1', or keep that environment and take a plain one with 'make setup ENV=venv'"
fi

[ -L .venv ] || [ -e .venv ] || ln -s "$prefix" .venv
[ .venv/bin -ef "$prefix/bin" ] || ln -sfn "$prefix" .venv
: > "$prefix/$marker"
say "installing $(grep -c '^[a-z0-9]' "locks/$lock.txt") packages of locks/$lock.txt into $prefix"
requirement '[+]cpu ' > "$work/local.txt"   # wheels that PyPI does not have
if [ -s "$work/local.txt" ]; then
  one=("${pip[@]}" install "${on[@]}" --no-deps --require-hashes -r "$work/local.txt")
  { [ -n "${PIP_FIND_LINKS:-}" ] && "${one[@]}" --find-links "$PIP_FIND_LINKS"; } || "${one[@]}" --torch-backend cpu ||
    fail "could not get torch for CPU: its wheels come from PyTorch's own index, or from a folder of wheels named by PIP_FIND_LINKS; then repeat make setup"
fi
"${pip[@]}" sync "${on[@]}" --compile-bytecode --require-hashes "locks/$lock.txt" ||
  fail "installation stopped (see above): check the network and the disk, then repeat make setup, which goes on where it stopped"
"${pip[@]}" install --quiet "${on[@]}" --no-deps --no-build-isolation -e . || fail "could not install the lab package of this repository (see above)"
if [ "$lock" = cpu ] && ! grep -q '^torchaudio==.*[+]cpu' locks/cpu.txt; then
  # PyPI's torchaudio is linked to CUDA, which torch+cpu lacks; without its extension it imports and works.
  rm -f "$prefix"/lib/python3.*/site-packages/torchaudio/lib/*.so
fi
echo "$wanted" > "$prefix/$marker"
say "done. To use it in your shell: $([ -e "$prefix/conda-meta" ] && echo 'conda activate videofen' || echo 'source .venv/bin/activate')"
