#!/usr/bin/env bash
# Sets up an environment and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh test

# The models are tiny: two processes of one thread each are the fastest.
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal "$@"
