#!/usr/bin/env bash
# From nothing to a trained hybrid reward model and the answer whether it learned what there was to learn.
#
#   bash launch/quickstart.sh [OUT_DIR]        default: runs/quickstart in the repository
#
# Makes a virtual environment (see environment.sh), preference pairs with a known best accuracy and a small model, and
# trains it on two processes, with the GPUs if there are any.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/runs/quickstart}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
if [[ -e "$out/run" ]]; then
    echo "$out/run is there already: remove it or name another folder, bash launch/quickstart.sh OUT_DIR" >&2
    exit 1
fi
source "$root/launch/environment.sh" ""
cd "$root"

python -m hafrm_ds.quickstart "$out"

# One GPU carries one process; without GPUs two processes share the cores.
processes="$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')"
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
options=(
    --config launch/recipes/quickstart.yaml
    --output_dir "$out/run"
    --model.name_or_path "$out/model"
    --data.train "$out/data/train.jsonl"
    --data.eval "{held_out: \"$out/data/test.jsonl\"}"
    --reference.store "$out/reference"
)
for job in precompute_reference train; do
    free_port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
    deepspeed --num_gpus "$processes" --master_port "$free_port" "launch/$job.py" "${options[@]}"
done

echo
python -m hafrm_ds.quickstart "$out" --results
echo
echo "$out/data       pairs and what is known about them (rubric.json)"
echo "$out/model      the model and tokenizer that training started from"
echo "$out/reference  the log-probs of that model on the pairs, computed once"
echo "$out/run        configuration, metrics.jsonl, TensorBoard files and the trained model (final/)"
