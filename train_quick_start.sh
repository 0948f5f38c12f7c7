#!/usr/bin/env bash
# From a fresh clone to a trained model, in two steps: environment, then one training command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'TEXT'
./train_quick_start.sh               train on drawn sample plates: minutes, nothing to download
./train_quick_start.sh food101       train MobileNetV2 on Food-101 for 20 epochs (5 GB download)
./train_quick_start.sh setup [FILE]  only make .venv and install (also what FILE requires)

Any flag of backend/train_model.py may follow, for example --epochs 3; they are listed by
./train_quick_start.sh flags
TEXT
}

fail() {
  echo "train_quick_start: $*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer was found; install one from python.org or your system's packages" \
    "(an unusual place: PYTHON=/path/to/python ./train_quick_start.sh)"
}

make_environment() {
  [ -x .venv/bin/python ] && return
  local python
  python=$(find_python)
  echo "making .venv with $("$python" --version)"
  "$python" -m venv .venv || {
    rm -rf .venv
    fail "the environment could not be made; on Debian and Ubuntu: sudo apt install python3-venv"
  }
}

install() { # FILE: install what it requires, unless this very list is installed already
  local stamp
  stamp=".venv/installed-$(.venv/bin/python - "$1" <<'PYTHON'
import hashlib, pathlib, sys
print(hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()[:16])
PYTHON
)"
  [ -e "$stamp" ] && return
  local free_kb
  free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
  [ "$free_kb" -gt 8000000 ] ||
    echo "only $((free_kb / 1000000)) GB are free here; a PyTorch with CUDA takes up to 7 GB" >&2
  echo "installing $1 (several minutes the first time)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1" ||
    fail "installing failed, see above. No connection? pip needs its package index once. No space?" \
      "Free some, or delete .venv and try again"
  touch "$stamp"
}

setup() {
  make_environment
  install backend/requirements.txt
  [ $# -eq 0 ] || install "$1"
}

show_next() { # ask the new model about one test picture, then say what to do next
  local picture
  picture="data/sample/food-101/images/$(head -n 1 data/sample/food-101/meta/test.txt).jpg"
  echo
  echo "What the model sees on one picture of the test set:"
  .venv/bin/python backend/train_model.py --predict "$picture"
  cat <<'TEXT'

These plates are drawn; the model shows that everything works, not what is on your table. Next:
  ./train_quick_start.sh food101                       Food-101: 101 real dishes
  .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db      compare runs on localhost:5000
  cd backend && ../.venv/bin/uvicorn app.main:app      try the model on localhost:8000
TEXT
}

case "${1:-}" in
  -h | --help | help)
    usage
    ;;
  setup)
    shift
    setup "$@"
    ;;
  flags)
    setup
    .venv/bin/python backend/train_model.py --help
    ;;
  food101)
    shift
    setup
    .venv/bin/python backend/train_model.py --epochs 20 --model_name mobilenet_v2 "$@"
    ;;
  "" | -*)
    setup
    .venv/bin/python backend/train_model.py --sample --model_name efficientnet_lite0 --epochs 8 "$@"
    show_next
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
