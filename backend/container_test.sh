#!/usr/bin/env bash
# Build the image of this folder's Dockerfile and run it as compose.yaml does: it answers a picture
# and its probes, takes a new version while it runs, and ends in time. Prints the facts. Needs docker
# or podman, curl, and a folder with a released model, which stays as it is (default: ml-models):
#   bash backend/container_test.sh [MODEL_DIR]
# Where no registry answers, BASE=IMAGE builds on an image that is there, with python 3.10 or newer
# and pip. It is not the Dockerfile's own; the rest is. This one is made of Debian's packages:
#   debootstrap --variant=minbase --include=python3-pip,python-is-python3 trixie base
#   tar -C base -c . | podman import -c "ENV PIP_BREAK_SYSTEM_PACKAGES=1" - nutrilearn-base
set -euo pipefail
unset CDPATH
image=nutrilearn-container-test address=

fail() {
  echo "container_test: $*" >&2
  exit 1
}

find_engine() {
  for name in docker podman; do
    if "$name" info >/dev/null 2>&1; then
      echo "$name"
      return
    fi
  done
}

clean_up() {
  (($? == 0)) || [ -z "$address" ] || "$engine" logs --tail 20 "$image" >&2
  "$engine" rm -f "$image" >/dev/null 2>&1 || true
  "$engine" rmi "$image" >/dev/null 2>&1 || true
  rm -rf "$models"
}

within() { # SECONDS COMMAND...: until it succeeds
  local end=$((SECONDS + $1))
  until "${@:2}"; do
    ((SECONDS < end)) || fail "not within $1 s: ${*:2}"
    sleep 0.5
  done
}

ask() { # PATH [CURL OPTION...]
  curl -fsS --max-time 60 "${@:2}" "http://$address$1"
}

is_ready() { ask /ready >/dev/null 2>&1; }

serves() { # VERSION
  [[ $(ask /api/v1/model) == *"\"version\":$1,"* ]]
}

build() {
  local began=$SECONDS bytes
  "$engine" build -q -t "$image" ${BASE:+--build-arg "BASE=$BASE"} . >/dev/null
  bytes=$("$engine" image inspect -f '{{.Size}}' "$image")
  echo "built in $((SECONDS - began)) s on ${BASE:-the base of the Dockerfile}: $((bytes / 1000000)) MB"
}

start() {
  local began=$SECONDS
  "$engine" run -d --name "$image" -p 127.0.0.1::8000 -v "$models:/models:ro,z" --read-only \
    --tmpfs /tmp -e NUTRILEARN_RELOAD_POLL_SECONDS=1 "$image" >/dev/null
  address=$("$engine" port "$image" 8000 | head -n 1)
  within 300 is_ready
  echo "ready after $((SECONDS - began)) s, as user $("$engine" exec "$image" id -u)"
}

probe() {
  local code
  code=$("$engine" inspect -f '{{index .Config.Healthcheck.Test 3}}' "$image")
  "$engine" exec "$image" python -c "$code"
  ask /health
  ask /ready
  echo
}

answer() { # a plate that the image draws itself
  local draw="import sys; from PIL import Image; image = Image.new('RGB', (640, 480), 'orange')"
  "$engine" exec "$image" python -c "$draw; image.save(sys.stdout.buffer, 'PNG')" |
    ask /api/v1/predict -F "file=@-;filename=plate.png"
  echo
}

release() { # VERSION NEXT: the same model once more, as a release leaves it
  local file began=$SECONDS
  for file in "$models/food_model_v$1".*; do
    cp "$file" "${file/_v$1./_v$2.}"
  done
  sed "s/food_model_v$1\./food_model_v$2./; s/\"version\": $1,/\"version\": $2,/" \
    "$models/food_model_v$1.json" >"$models/food_model_v$2.json"
  cp "$models/food_model_v$2.json" "$models/new.json"
  mv "$models/new.json" "$models/model_config.json"
  within 60 serves "$2"
  echo "version $2 serves $((SECONDS - began)) s after its release"
}

stop() {
  local began=$SECONDS code
  "$engine" stop -t 20 "$image" >/dev/null
  code=$("$engine" inspect -f '{{.State.ExitCode}}' "$image")
  ((code != 137)) || fail "it had to be killed 20 s after SIGTERM"
  echo "stopped $((SECONDS - began)) s after SIGTERM, exit code $code"
}

source_dir=$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/../ml-models}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")"
engine=$(find_engine)
[ -n "$engine" ] || {
  echo "container_test: skipped, neither docker nor podman works here"
  exit
}
version=$(sed -n 's/^  "version": \([0-9]*\),$/\1/p' "$source_dir/model_config.json")
[ -n "$version" ] || fail "no released model in $source_dir; train one, or name another folder"
next=$(find "$source_dir" -name 'food_model_v*.json' | sed 's/.*_v//' | sort -n | tail -n 1)
next=$((${next%.json} + 1))
models=$(mktemp -d)
trap clean_up EXIT
cp -R "$source_dir/." "$models"
chmod -R a+rX "$models"
export BUILDAH_FORMAT=docker # OCI's images have no health check

"$engine" --version
build
start
probe
answer
release "$version" "$next"
answer
stop
