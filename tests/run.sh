#!/usr/bin/env bash
# Set up, then run the test suite:  bash tests/run.sh [--all] [pytest arguments]
# --all adds the slow tests. Everything else goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
. launch/env.sh
export OMP_NUM_THREADS=1
exec python -m pytest -q "$@"
