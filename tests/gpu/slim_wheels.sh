#!/usr/bin/env bash
# Fetch the wheels of tests/gpu/first_run.sh on a connected machine with the same python and platform, and count them.
#
#   bash tests/gpu/slim_wheels.sh DIR
set -euo pipefail

limit_mib=60
list="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slim_wheels.txt"
mkdir -p "$1"
# What a wheel asks for beyond the list is not wanted here. deepspeed comes as source alone.
python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$1" --requirement "$list"
bytes="$(cat "$1"/*.whl | wc -c)"
echo "$(find "$1" -name '*.whl' | wc -l) wheels, $((bytes / 2**20)) MiB of at most $limit_mib"
((bytes < limit_mib * 2**20))
