#!/usr/bin/env bash
# What needs an NVIDIA GPU, without a network: the environment, every kernel, whole models, a training run, benchmarks.
#
#   bash tests/gpu/run.sh                          all of it, on the first GPU; with two or more also on all together
#   bash tests/gpu/run.sh tests/gpu/test_FILE.py   some tests (arguments of pytest), no benchmark
#
# OUT=DIR                the tables of the benchmark are also written to DIR/benchmark.md
# HAFRM_WHEELS=DIR       packages that are missing are installed from the wheels in DIR, not from a package index
# HAFRM_EXTRAS=test,cuda,gpu-test  also installs FlashAttention 4, and Liger to compare with
# HAFRM_VENV=DIR         where the virtual environment is; launch/environment.sh says more
#
# To fill a folder of wheels, on a connected machine with the same python and platform, from the repository's root:
#
#   pip wheel --wheel-dir DIR 'setuptools>=77' '.[test]'         or '.[test,cuda,gpu-test]'
#
# A torch that the GPU machine's python has is used as it is: the wheels of torch, triton and CUDA may then be deleted.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
if [[ -n "${HAFRM_WHEELS:-}" ]]; then
    PIP_FIND_LINKS="$(cd "$HAFRM_WHEELS" && pwd)"
    export PIP_FIND_LINKS PIP_NO_INDEX=1
fi
if [[ -n "${OUT:-}" ]]; then
    mkdir -p "$OUT"
    OUT="$(cd "$OUT" && pwd)"
    export OUT
fi
source "$root/launch/environment.sh" "${HAFRM_EXTRAS:-test}"
cd "$root"

python -m tests.gpu.environment
if (($#)); then
    exec python -m pytest -q -rs -m gpu "$@"
fi
python -m pytest -q -rs -m gpu tests/gpu
python -m tests.gpu.benchmark
