#!/usr/bin/env bash
# The first minutes on an NVIDIA GPU that has torch, transformers and triton, without a network: parts of at most four
# minutes, the most telling first, each writing what it saw as soon as it is done.
#
#   bash tests/gpu/first_run.sh                 all parts
#   bash tests/gpu/first_run.sh nccl kernels    some of them
#
# WHEELS=DIR        the slim list (tests/gpu/slim_wheels.sh DIR fetches it); unpacked beside the repository's code, nothing
#                   is installed and no compiler is asked for. Without it what python has is used.
# OUT=DIR           where results go (default: runs/first_run): PART.txt each, and summary.md over all
# PART_SECONDS=N    the most a part may take (default 240)
#
# HAFRM_GPU_TESTS_ON_CPU=1 runs all of it on a CPU with small sizes. tests/gpu/README.md says how to read the results.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT="${OUT:-runs/first_run}"
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
if [[ -n "${WHEELS:-}" ]]; then
    packages="$(mktemp -d)"
    trap 'rm -rf "$packages"' EXIT
    python3 -c 'import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$packages" "$WHEELS"/*.whl || exit 1
    export PATH="$packages/bin:$PATH"
fi
export PYTHONPATH="$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
export PYTHONUNBUFFERED=1 # what is seen is written at once
# DeepSpeed asks for MPI where it is not told who is who.
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29511}"

test_of() { python3 -m pytest -v --tb=no -rs -p no:cacheprovider -p tests.gpu.tell_at_once "$@"; }

run_nccl() { python3 -m tests.gpu.first_step; }
run_kernels() {
    test_of tests/gpu/test_kernels.py tests/gpu/test_token_logprobs.py -m "not slow" \
        -k "varlen and bfloat16 and (plain or window) or test_token_logprobs"
}
run_families() {
    test_of tests/gpu/test_models.py \
        -k "(llama or mistral or gemma2 or qwen2) and (varlen or segmented) and bfloat16_is or fused and liger"
}
run_stages() { python3 -m tests.gpu.stages "$small"; }
run_small() { python3 -m tests.gpu.benchmark "$small"; }
run_large() { python3 -m tests.gpu.benchmark "$large"; }
run_joint() {
    # Preparing pairs takes datasets and pyarrow, 55 MiB by itself: not in the slim list.
    python3 -c 'import datasets, pyarrow' 2>/dev/null || { echo "skipped: datasets and pyarrow are missing"; return 77; }
    test_of tests/gpu/test_joint_run.py
}

parts=(nccl kernels families stages small large joint)
small=1B large=7B
if [[ -n "${HAFRM_GPU_TESTS_ON_CPU:-}" ]]; then
    small=tiny large=tiny
fi
(($#)) && parts=("$@")

python3 -m tests.gpu.environment | tee "$OUT/environment.txt"
[[ -s "$OUT/summary.md" ]] || printf '| part | result | s |\n| --- | --- | --- |\n' >"$OUT/summary.md"
failed=0
for part in "${parts[@]}"; do
    declare -F "run_$part" >/dev/null || { echo "no part $part; there are nccl kernels families stages small large joint" >&2; exit 2; }
    started="$SECONDS"
    export -f test_of "run_$part"
    export small large
    timeout --kill-after 10 "${PART_SECONDS:-240}" bash -c "run_$part" 2>&1 | tee "$OUT/$part.txt"
    status="${PIPESTATUS[0]}"
    case "$status" in
        0) result=passed ;;
        77) result=skipped status=0 ;;
        124 | 137) result="cut short" ;;
        *) result="failed ($status)" ;;
    esac
    ((status)) && failed=1
    echo "| $part | $result | $((SECONDS - started)) |" | tee -a "$OUT/summary.md"
done
exit "$failed"
