#!/usr/bin/env bash
# Try each Python that the README names, with the packages at their lowest and at their newest
# versions: a dry run of training, a picture that the model answers, and the fast tests. Takes an
# hour on two cores; each environment is removed again (up to 7 GB; UV_TORCH_BACKEND=cpu: 2 GB).
#   bash tests/pythons.sh
#   bash tests/pythons.sh 3.14 lowest-direct tests/app/test_api.py   one of them, with these tests
# uv gets a Python that is not there; where it cannot, that one is not tried, and a line says so.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./train_quick_start.sh setup tests/requirements.txt
uv=$PWD/.venv/bin/uv
pythons=${1:-$(sed -n 's/^pythons=(\(.*\))$/\1/p' .ci/resolve)}
resolutions=${2:-lowest-direct highest}
export OMP_WAIT_POLICY=PASSIVE MPLBACKEND=Agg

try() { # FOLDER RESOLUTION [PYTEST ARGUMENT...]: in the environment there
  local python=$1/env/bin/python small=(--sample --data_dir "$1/data" --output_dir "$1/ml-models"
    --checkpoint_dir "$1/checkpoints" --tracking_uri "sqlite:///$1/mlflow.db"
    --model_name efficientnet_lite0 --images_per_class 10 --epochs 1 --freeze_layers all)
  "$uv" pip install --quiet --python "$python" --only-binary :all: --resolution "$2" \
    -r backend/requirements.txt -r tests/requirements.txt &&
    "$python" backend/train_model.py "${small[@]}" &&
    "$python" backend/train_model.py --output_dir "$1/ml-models" --predict \
      "$(find "$1/data" -name '*.jpg' | head -n 1)" &&
    "$python" -m pytest --quiet -m "not slow" "${@:3}"
}

failed=0
for python in $pythons; do
  for resolution in $resolutions; do
    folder=$(mktemp -d)
    name="Python $python, $resolution versions" began=$SECONDS
    if ! "$uv" venv --quiet --python "$python" "$folder/env"; then
      echo "== $name: not tried, see above"
    elif try "$folder" "$resolution" "${@:3}"; then
      echo "== $name: passed, $((SECONDS - began)) s"
    else
      echo "== $name: FAILED, $((SECONDS - began)) s"
      failed=1
    fi
    rm -rf "$folder"
  done
done
exit "$failed"
