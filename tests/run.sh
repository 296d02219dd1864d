#!/usr/bin/env bash
# The project's checks and tests, as CI runs them. Every part prints its seconds.
#
#   bash tests/run.sh           all: checks, fast tests, those that ask a package index or start several processes
#   bash tests/run.sh fast      checks and fast tests: about two minutes on two cores
#   bash tests/run.sh checks    lint, format, which room imports which, types
set -euo pipefail

what="${1:-all}"
case "$what" in
    all | fast | checks) ;;
    *)
        echo "usage: bash tests/run.sh [all | fast | checks]" >&2
        exit 2
        ;;
esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launch/environment.sh" test
cd "$root"

timed() {
    local started="$SECONDS"
    echo "+ $*"
    "$@"
    echo "  $((SECONDS - started)) s"
}

timed python -m ruff check .
timed python -m ruff format --check .
timed lint-imports # .importlinter
timed python -m mypy
[[ "$what" == checks ]] && exit

# Side by side, as many as there are cores; a test file stays with one process, whose fixtures it shares.
# The tests for GPUs run on the CPU here: that finds mistakes in them.
cores="$(nproc)" # before OMP_NUM_THREADS, which nproc obeys
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HAFRM_GPU_TESTS_ON_CPU=1
side_by_side=(--numprocesses "$cores" --dist loadfile --durations 15)
timed python -m pytest -q -m "not distributed and not slow and not index" "${side_by_side[@]}"
[[ "$what" == fast ]] && exit

# The files in which a test is marked so: the others need not be imported.
marked() { grep -rlE --include='test_*.py' "mark\.$1\b" tests; }
# These ask a package index, and are skipped where none answers.
timed python -m pytest -q -rs -m index "${side_by_side[@]}" $(marked index)
# These start several processes, which wait for one another; last those that must not wait for others as well.
timed python -m pytest -q -m "distributed and not alone" "${side_by_side[@]}" $(marked distributed)
timed python -m pytest -q -m alone --durations 15 $(marked alone)
