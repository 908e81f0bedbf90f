#!/usr/bin/env bash
# Choose or create the environment and fill it with the hashed lock: `make setup`.
#
#   make setup                the active or existing conda environment `videofen`, one made from environment.yml
#                             where conda or mamba is installed, else .venv; the gpu lock where an NVIDIA card is
#   make setup LOCK=cpu|gpu   take this lock whatever the machine; the environment then keeps it
#   make setup ENV=venv       take .venv even where conda is installed
#   make setup YES=1          let it change a `videofen` that it did not create
#   scripts/setup.sh --check  is the environment there and up to date? (every make target asks)
#
# It needs bash, any python3 from 3.8 on (without pip or venv) and a C++ compiler. uv, fetched by the lock's hash,
# brings Python 3.11 where none is complete, makes .venv and fills it.
set -euo pipefail
cd -P "$(dirname "$0")/.."
root=$PWD
. scripts/machine.sh

fail() { echo "error: $*" >&2; exit 2; }
say() { echo "setup: $*"; }

# -----------------------------------------------------------------------------
# 1. Which environment, which lock

case ${LOCK:-} in ""|cpu|gpu) ;; *) fail "LOCK=$LOCK is unknown: say LOCK=cpu or LOCK=gpu" ;; esac
case ${ENV:-} in ""|venv|conda) ;; *) fail "ENV=$ENV is unknown: say ENV=venv or ENV=conda" ;; esac

conda=""
for c in mamba conda "${CONDA_EXE:-}"; do [ -n "$c" ] && command -v "$c" >/dev/null && { conda=$c; break; }; done
[ "${ENV:-}" != conda ] || [ -n "$conda" ] || fail "ENV=conda, but neither conda nor mamba is on PATH: install Miniforge, or say ENV=venv"
# conda prints `videofen  *  /path`, mamba 2 indents that and pads it with blanks.
conda_prefix() { { "$conda" env list 2>/dev/null || true; } | sed -n 's/ *$//; s/^ *videofen[ *+]\{1,\}//p' | head -n 1; }

# torch and DeepSpeed hand paths to the compiler unquoted: no blanks, no characters that mean something to a shell.
compilable() { local LC_ALL=C; [[ $1 != *[!A-Za-z0-9_./@+~=$'\x80'-$'\xff'-]* ]]; }

# The marker says that set-up made this environment, and, once it is filled, from what: lock, hash of what was installed,
# whether LOCK `asked` for the lock or it was `found`, this folder. An interrupted run leaves it empty.
marker=.videofen-setup
made_for() { [ ! -e "$1/$marker" ] || sed -nE 's/^[cg]pu [0-9a-f]* ((asked|found) )?//p' "$1/$marker"; }

linked=""
[ ! -L .venv ] || [ ! -e .venv ] || linked=$(readlink .venv)
own=$root/.venv             # the environment that set-up makes without conda
if ! compilable "$root"; then
  data=${XDG_DATA_HOME:-${HOME:-/proc}/.local/share}/videofen
  own=$data/$(sha256sum <<< "$root" | cut -c1-12)
  [ -z "$linked" ] || [ -e "$linked/conda-meta" ] || [ "$(made_for "$linked")" != "$root" ] || own=$linked
fi
# A link to an environment that set-up made where this folder stood before: it is made anew.
old=""
[ -z "$linked" ] || [ "$linked" = "$own" ] || [ -e "$linked/conda-meta" ] || [ ! -e "$linked/$marker" ] || { old=$linked; linked=""; }

prefix=$own                 # .venv is the environment, or a link to it: make finds Python there
if [ "${ENV:-}" != venv ]; then
  if [ "${CONDA_DEFAULT_ENV:-}" = videofen ] && [ -n "${CONDA_PREFIX:-}" ]; then prefix=$CONDA_PREFIX
  elif [ -n "$linked" ]; then prefix=$linked
  elif [ -n "$conda" ] && [ ! -d .venv ]; then prefix=$(conda_prefix); prefix=${prefix:-new}; fi
fi
[ "$prefix" = "$own" ] || [ -L .venv ] || [ ! -e .venv ] ||
  fail "the conda environment videofen is active, and .venv is here too: remove one of them (rm -r .venv, or conda deactivate)"
[ "${ENV:-}" != venv ] || [ -z "$linked" ] || [ "$linked" = "$own" ] ||
  fail ".venv is a link to $linked: remove the link (rm .venv), then repeat make setup ENV=venv"

made=""
[ ! -e "$prefix/$marker" ] || IFS= read -r made < "$prefix/$marker" || true
read -r installed _ how _ <<< "$made"
if [ "${1:-}" = --check ]; then lock=${installed:-cpu}
elif [ -n "${LOCK:-}" ]; then lock=$LOCK; how=asked
elif [ "$how" = asked ]; then lock=$installed           # a lock is kept only if it was asked for
elif nvidia_card; then lock=gpu; how=found
else lock=cpu; how=found; fi
# Of pyproject.toml what the installation of `lab` reads: settings of ruff and pytest may change.
package() { awk '/^\[/ {on = !/^\[tool[.](ruff|pytest)/} on' pyproject.toml; }
contents="$lock $({ cat "locks/$lock.txt"; package; } | sha256sum | cut -c1-16)"
current=""
[ "$prefix" = new ] || [ ! -x "$prefix/bin/python" ] || [ ! .venv/bin -ef "$prefix/bin" ] ||
  [[ $made != "$contents "@(asked|found)" $root" ]] || current=1

if [ "${1:-}" = --check ]; then
  if [ -z "$current" ]; then
    [ -x .venv/bin/python ] && fail "the environment is not up to date: run 'make setup'"
    fail "no environment yet: run 'make setup' first"
  fi
  if [ "$installed $how" = "cpu found" ] && nvidia_card && [ -z "$(gpu_lock_problem found)" ]; then
    fail "an NVIDIA GPU is usable now, the environment has the cpu lock: run 'make setup' (or keep it: make setup LOCK=cpu)"
  fi
  exit 0
fi

# -----------------------------------------------------------------------------
# 2. What would fail later is said now

[ "$(uname -sm)" = "Linux x86_64" ] || fail "the locks are for Linux on x86-64, this is $(uname -sm)"
if [ "$lock" = gpu ] && nvidia_card; then
  problem=$(gpu_lock_problem "$how")
  [ -z "$problem" ] || fail "$problem"
elif [ "$lock" = gpu ]; then say "no NVIDIA card is seen here: the gpu lock because LOCK=gpu asked for it"
elif nvidia_card; then say "the NVIDIA card here is not used: the cpu lock because LOCK=cpu asked for it (make setup LOCK=gpu takes the other)"
elif wsl2 && [ "$how" = found ]; then say "no NVIDIA driver of Windows is seen from WSL2: the cpu lock (if this machine has an NVIDIA card, $(driver_command), and repeat make setup)"
fi

base=""                     # any Python, to fetch uv and to read pip's settings with
for candidate in python3 python "$at/usr/bin/python3" $(compgen -c python3. || true); do
  "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null && { base=$candidate; break; }
done
[ -n "$base" ] || fail "no Python 3.8 or newer on PATH: $(install_command python3), then repeat make setup"
[ "$prefix" = new ] || command -v g++ >/dev/null || compgen -G "$prefix/bin/*-g++" >/dev/null ||
  fail "no C++ compiler, which DeepSpeed and torch.compile need: $(install_command g++), or install Miniforge, whose environment brings one; then repeat make setup"

# Python.h: Triton, torch.compile and DeepSpeed build extensions.
header='import os, sysconfig; print(os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h"))'
complete() { local path; path=$("$1" -c "$header" 2>/dev/null) && [ -e "$path" ] && compilable "$path"; }
no_headers="the Python of $prefix has no headers (Python.h), which Triton and DeepSpeed need: remove that environment (rm -r $prefix) and repeat make setup, which makes it from a complete Python"

if [ -n "$current" ]; then
  complete "$prefix/bin/python" || fail "$no_headers"
  echo "$contents $how $root" > "$prefix/$marker"
  say "up to date ($lock lock, $prefix)"
  exit 0
fi

if [ "$prefix" != "$own" ]; then
  compilable "$root" || fail "compilers cannot cope with the blank or special character in the path of this folder, which conda's programs get through .venv: take a plain environment with make setup ENV=venv, or move this folder"
  compilable "$prefix" || fail "compilers cannot cope with the blank or special character in $prefix: take a plain environment with make setup ENV=venv, or move conda's"
elif ! compilable "$own"; then
  fail "compilers cannot cope with the blank or special character in the path of this folder, and also in $data, where its environment would stand: set XDG_DATA_HOME to another folder, then repeat make setup"
elif [ "$own" != "$root/.venv" ]; then
  mkdir -p "$own" 2>/dev/null && [ -w "$own" ] ||
    fail "compilers cannot cope with the blank or special character in the path of this folder, and $data, where its environment would stand, cannot be written: set XDG_DATA_HOME to another folder, then repeat make setup"
  say "compilers cannot cope with the blank or special character in this path: the environment stands in $own, .venv is a link to it"
fi

need=6; [ "$lock" = cpu ] || need=18        # GiB: the environment and uv's cache of wheels
target=$root; [ "$prefix" = new ] || target=$(dirname "$prefix")
free=$(df -Pk "$target" | awk 'NR==2 {print int($4 / 1048576)}')
[ -e "$prefix/$marker" ] || [ "$free" -ge "$need" ] ||
  fail "$free GiB free on the disk of $target, the $lock lock needs $need GiB: free some space, then repeat make setup"

# -----------------------------------------------------------------------------
# 3. uv, of the version in the lock

# A hash pins each file, so a mirror is as good as PyPI.
index=$(package_index "$base")
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cache=${XDG_CACHE_HOME:-${HOME:-/proc}/.cache}
{ mkdir -p "$cache" && [ -w "$cache" ]; } 2>/dev/null || export UV_CACHE_DIR=${UV_CACHE_DIR:-${RUNS:-$root/runs}/cache/uv}   # HOME is read-only

requirement() { awk -v pattern="$1" '/^[^ #]/ {on = $0 ~ pattern} on' "locks/$lock.txt"; }   # the lock's entries whose first line matches
uv=""
for candidate in "$prefix/bin/uv" uv; do
  version=$("$candidate" --version 2>/dev/null | cut -d' ' -f2) && [[ $(requirement '^uv==') = "uv==$version "* ]] && { uv=$(command -v "$candidate"); break; }
done
[ -n "$uv" ] || uv=$("$base" scripts/get_uv.py "locks/$lock.txt" "$work") || exit 2

# -----------------------------------------------------------------------------
# 4. The environment

# A complete Python for this lock that is here already.
python_here() {
  local tried minor
  for tried in python3.11 python3 python "$("$uv" python find 3.11 2>/dev/null || true)" $([ "$lock" = cpu ] || echo python3.12); do
    [ -n "$tried" ] && command -v "$tried" >/dev/null || continue
    minor=$("$tried" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$minor" = 3.11 ] || { [ "$minor" = 3.12 ] && [ "$lock" = gpu ]; }; then complete "$tried" && { command -v "$tried"; return; }; fi
  done
  return 1
}

# ... or one that uv brings, into the environment's own folder.
python_fetched() {
  say "no complete Python 3.11 (with Python.h) is here: uv fetches one" >&2
  export UV_PYTHON_INSTALL_DIR=${UV_PYTHON_INSTALL_DIR:-$prefix/python}
  "$uv" python install --no-bin 3.11 >&2 && "$uv" python find --managed-python 3.11
}

if [ "$prefix" = new ]; then
  say "creating the conda environment videofen from environment.yml with $conda"
  "$conda" env create -f environment.yml || fail "$conda could not create videofen (see above): mend that and repeat make setup, or take a plain .venv with make setup ENV=venv"
  prefix=$(conda_prefix)
  { [ -n "$prefix" ] && [ -x "$prefix/bin/python" ]; } || fail "$conda created videofen, but it holds no Python: remove it (conda env remove -n videofen), then repeat make setup"
  : > "$prefix/$marker"
elif [ "$prefix" = "$own" ] && [ "$(made_for "$own")" != "$root" ]; then   # none yet, interrupted half-way, or made in another folder
  [ ! -e .venv ] || [ -L .venv ] || [ -e ".venv/$marker" ] || [ "${YES:-}" = 1 ] ||
    fail ".venv is here and was not made by make setup: remove it, or let set-up replace it with YES=1"
  case $uv in "$root"/.venv/*|"$own"/*) cp "$uv" "$work/uv"; uv=$work/uv ;; esac
  stood=""; [ -z "$old" ] || stood=$(made_for "$old")
  [ -z "$stood" ] || [ -e "$stood" ] || rm -rf "$old"       # its folder is gone
  rm -rf .venv "$own"
  { mkdir "$own" && : > "$own/$marker"; } || fail "could not make $own (see above)"
  python=$(python_here) || python=$(python_fetched) ||
    fail "Python 3.11 could not be fetched (see above): set UV_PYTHON_INSTALL_MIRROR to a mirror of python-build-standalone's releases, or install it: $(python_command "$lock"); then repeat make setup"
  say "creating $own with $("$python" --version)"
  "$uv" venv --quiet --allow-existing --python "$python" "$own" || fail "could not create $own (see above): check that the disk has space and that this folder can be written, then repeat make setup"
  if [ "$own" != "$root/.venv" ]; then
    # Python takes the path by which it is called for its own, and through the link that one has the blank again.
    minor=$("$own/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    rm -f "$own/bin/python3" "$own/bin/python$minor"
    mv "$own/bin/python" "$own/bin/python$minor"
    printf '#!/bin/sh\nexec "%s/bin/python%s" "$@"\n' "$own" "$minor" > "$own/bin/python"
    chmod +x "$own/bin/python"
    ln -s python "$own/bin/python3"
  fi
elif [ -z "$made" ] && [ -e "$prefix/$marker" ]; then
  # Interrupted: uv takes what it left half-installed for installed (INSTALLER is written last).
  for info in "$prefix"/lib/python3.*/site-packages/*.dist-info; do [ -e "$info/INSTALLER" ] || rm -rf "$info"; done
fi
[ -x "$prefix/bin/python" ] || fail "$prefix has no Python: conda install -n videofen python=3.11, or remove it, then repeat make setup"
minor=$("$prefix/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$minor" = 3.11 ] || { [ "$minor" = 3.12 ] && [ "$lock" = gpu ]; } ||
  fail "$prefix has Python $minor, the $lock lock needs 3.11: remove that environment and repeat make setup"
complete "$prefix/bin/python" || fail "$no_headers"

# -----------------------------------------------------------------------------
# 5. Fill it with the lock

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
echo "$contents $how $root" > "$prefix/$marker"
say "done. To use it in your shell: $([ -e "$prefix/conda-meta" ] && echo 'conda activate videofen' || echo 'source .venv/bin/activate')"
