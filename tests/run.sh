#!/usr/bin/env bash
# Set up .venv (made anew or reused) and run the tests; arguments go to pytest (-n 0: one process).
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./train_quick_start.sh setup tests/requirements.txt
# Two threads of one process spin while they wait for a core that something else uses.
export OMP_WAIT_POLICY=PASSIVE MPLBACKEND=Agg
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
