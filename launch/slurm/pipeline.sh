#!/usr/bin/env bash
# Reference pass, training and evaluation as three jobs, each of which starts when the one before has succeeded; when
# one fails, those after it are cancelled. From the root of the repository:
#
#   bash launch/slurm/pipeline.sh OUTPUT_DIR SOURCE... -- --config launch/recipes/NAME.yaml [--section.key value ...]
#
# trains into OUTPUT_DIR and evaluates OUTPUT_DIR/final on each SOURCE into OUTPUT_DIR/evaluated. Options of sbatch that
# hold for all three come in the environment:
#
#   HAFRM_SBATCH="--nodes 4 --time 12:00:00" bash launch/slurm/pipeline.sh ...
set -euo pipefail

output_dir="${1:?the folder of the run}" sources=()
shift
while (($#)) && [[ "$1" != -- ]]; do
    sources+=("$1")
    shift
done
if ((${#sources[@]} == 0 || $# < 2)); then
    echo "usage: bash launch/slurm/pipeline.sh OUTPUT_DIR SOURCE... -- OPTIONS OF TRAINING" >&2
    exit 2
fi
shift # the --
read -ra shared <<<"${HAFRM_SBATCH:-}"

submit() { # NAME OF THE STAGE, ITS OPTIONS FOR sbatch..., ITS SCRIPT, OPTIONS...
    local stage="$1"
    shift
    job="$(sbatch --parsable --kill-on-invalid-dep=yes "${shared[@]}" "$@")"
    job="${job%%;*}" # the name of a cluster may follow
    echo "$stage: job $job"
}

submit "reference pass" launch/slurm/precompute_reference.sbatch "$@" --output_dir "$output_dir"
submit training "--dependency=afterok:$job" launch/slurm/train.sbatch "$@" --output_dir "$output_dir"
submit evaluation "--dependency=afterok:$job" launch/slurm/evaluate.sbatch \
    --model "$output_dir/final" --data "${sources[@]}" --output_dir "$output_dir/evaluated"
