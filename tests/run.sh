#!/usr/bin/env bash
# The project's tests, as CI runs them: lint, then the fast tests, then those that start several processes.
#
#   bash tests/run.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/environment.sh" test
cd "$root"

python -m ruff check .
python -m ruff format --check .
lint-imports  # which room may import which: .importlinter
# The tests for GPUs run on the CPU here: that finds mistakes in them.
HAFRM_GPU_TESTS_ON_CPU=1 python -m pytest -q -m "not distributed and not slow"
python -m pytest -q -m distributed
