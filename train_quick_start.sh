#!/usr/bin/env bash
# From a fresh clone to a trained model, in two steps: environment, then one training command.
# train_quick_start.bat does the same, step for step, on Windows.
set -euo pipefail
unset CDPATH                # cd would look elsewhere
unset PYTHONPATH PYTHONHOME # pip would take what they hold for installed
export PIP_USER=0           # a pip.conf may ask for --user, which an environment refuses
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv_python=$root/.venv/bin/python

usage() {
  cat <<'TEXT'
./train_quick_start.sh               train on drawn sample plates: minutes, nothing to download
./train_quick_start.sh food101       train MobileNetV2 on Food-101 for 20 epochs (5 GB download)
./train_quick_start.sh setup [FILE]  only make .venv and install (also what FILE lists)

Any flag of backend/train_model.py may follow the first two, for example --epochs 3.
TEXT
}

fail() {
  echo "train_quick_start: $*" >&2
  exit 1
}

suits() { # PYTHON: exists, is 3.10 or newer, and has 64 bits
  command -v "$1" >/dev/null &&
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10) or sys.maxsize < 2**32)' 2>/dev/null
}

is_new() { # PYTHON: newer than those that NutriLearn was tried with
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 15))'
}

version_of() {
  if command -v "$1" >/dev/null; then "$1" --version 2>&1; else echo "not there"; fi
}

find_python() {
  local name newer='' names=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
  [ -z "${PYTHON:-}" ] || names=("$PYTHON")
  for name in "${names[@]}"; do
    suits "$name" || continue
    if ! is_new "$name"; then
      echo "$name"
      return
    fi
    newer=${newer:-$name}
  done
  [ -n "$newer" ] || fail "a 64-bit Python 3.10 to 3.14 is needed, but ${PYTHON:-python3} is" \
    "$(version_of "${PYTHON:-python3}"); get one from python.org or your system's" \
    "packages (in an unusual place: PYTHON=/path/to/python ./train_quick_start.sh)"
  echo "$("$newer" --version) is newer than 3.14; if installing fails, use PYTHON=/path/to/python3.14" >&2
  echo "$newer"
}

make_environment() {
  local unfinished=$root/.venv/unfinished base
  [ ! -e "$unfinished" ] || rm -rf "$root/.venv"
  if [ -e "$root/.venv" ]; then
    suits "$venv_python" && "$venv_python" -c 'import pip' && return
    fail "$root/.venv has no working 64-bit Python 3.10 or newer with pip; delete it and try again"
  fi
  base=$(find_python)
  "$base" -c 'import platform, sys; sys.exit((sys.platform, platform.machine()) == ("darwin", "x86_64"))' ||
    fail "PyTorch has no packages for Macs with an Intel processor, nor for an Intel Python on" \
      "Apple silicon; use an arm64 Python, Linux, Windows or Colab"
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make environments; on Debian and Ubuntu: sudo apt install" \
      "$("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  echo "making .venv with $("$base" --version)"
  mkdir "$root/.venv" && : >"$unfinished" || fail "$root is not writable"
  "$base" -m venv "$root/.venv" || {
    rm -rf "$root/.venv"
    fail "the environment could not be made, see above"
  }
  rm "$unfinished"
}

install() { # FILE: install what it lists, unless this very list is installed already
  local stamp=$root/.venv/installed-${1//\//-}
  cmp -s "$root/$1" "$stamp" && return
  [ -f "$root/$1" ] || fail "there is no $1 in $root"
  "$venv_python" -c 'import shutil, sys; sys.exit(shutil.disk_usage(sys.prefix).free < 10**10)' ||
    echo "less than 10 GB free: enough without CUDA (3 GB), not for PyTorch with CUDA on Linux" >&2
  echo "installing $1 (several minutes the first time)"
  "$venv_python" -m pip install --disable-pip-version-check -r "$root/$1" || fail "installing" \
    "failed, see above. No connection: pip needs its package index once. No space: free some, or" \
    "point TMPDIR at a larger disk. No matching version: PyTorch has packages for 64-bit Python" \
    "3.10 to 3.14 on Linux (glibc), Windows and Apple silicon. Then run this again; what is" \
    "installed is kept"
  cp "$root/$1" "$stamp"
}

setup() {
  make_environment
  install backend/requirements.txt
  [ $# -eq 0 ] || install "$1"
}

train() {
  "$venv_python" "$root/backend/train_model.py" "$@"
}

show_next() { # ask the new model about one test picture, then say what to do next
  local sample=$root/data/sample/food-101
  local picture
  picture=$sample/images/$(head -n 1 "$sample/meta/test.txt").jpg
  echo
  echo "What the model sees in one test picture:"
  train --predict "$picture"
  cat <<'TEXT'

Made: the model and its report.html in ml-models/, the plates in data/sample/, the run in
checkpoints/ and mlflow.db. The plates are drawn: the model shows that everything works, and knows
nothing about your own food. Next:
  ./train_quick_start.sh food101
  .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db
  cd backend && ../.venv/bin/uvicorn app.main:app
These train on Food-101 (101 real dishes), compare runs on http://127.0.0.1:5000, and let you try
the model on http://127.0.0.1:8000.
TEXT
}

case "${1:-}" in
  -h | --help | help)
    usage
    if [ -x "$venv_python" ]; then
      train --help
    fi
    ;;
  setup)
    setup "${@:2}"
    ;;
  food101)
    setup
    train --epochs 20 --model_name mobilenet_v2 "${@:2}"
    ;;
  "")
    setup
    train --sample --model_name efficientnet_lite0 --epochs 8
    show_next
    ;;
  -*)
    setup
    train --sample --model_name efficientnet_lite0 --epochs 8 "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
