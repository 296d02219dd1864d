# shellcheck shell=bash
# Sourced by the batch scripts of this folder.
#
#   start_ranks ENTRY [OPTIONS]
#
# starts an entry file on all nodes of the job, one process for each task, and requeues the job when the time limit has
# stopped it. srun starts the processes themselves: signals reach them, and their exit status comes back.
#
# Environment variables, all optional:
#   HAFRM_PYTHON              python on the nodes (python, as the submitting shell finds it)
#   HAFRM_LOGS                where the folder with the logs of the ranks is made (the folder of submission)
#   HAFRM_MAX_REQUEUES        a job that the time limit stops is requeued so often at most (100)
#   HAFRM_CONTAINER_IMAGE     run in this image; python is then that of the image
#   HAFRM_CONTAINER_RUNTIME   pyxis (srun's plugin for enroot; the default) or apptainer
#   HAFRM_CONTAINER_MOUNTS    folders to show in it besides the folder of submission: /data,/models:/m

STOPPED_STATUS=75 # hafrm_ds/processes/stopping.py: was asked to stop, has saved, can go on

srun_options=()
interpreter=() # what runs an entry file

choose_interpreter() {
    local mounts="$PWD${HAFRM_CONTAINER_MOUNTS:+,$HAFRM_CONTAINER_MOUNTS}"
    interpreter=("${HAFRM_PYTHON:-python}")
    [[ -n "${HAFRM_CONTAINER_IMAGE:-}" ]] || return 0
    case "${HAFRM_CONTAINER_RUNTIME:-pyxis}" in
        pyxis)
            # Enroot wants both sides of a mount.
            mounts="$(tr ',' '\n' <<<"$mounts" | sed '/:/!s/.*/&:&/' | paste -sd ,)"
            srun_options+=("--container-image=$HAFRM_CONTAINER_IMAGE" "--container-mounts=$mounts")
            srun_options+=("--container-workdir=$PWD")
            ;;
        apptainer)
            interpreter=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$HAFRM_CONTAINER_IMAGE" "${interpreter[@]}")
            ;;
        *)
            echo "HAFRM_CONTAINER_RUNTIME is $HAFRM_CONTAINER_RUNTIME; it takes pyxis or apptainer" >&2
            return 2
            ;;
    esac
}

start_ranks() {
    local entry="$1" job logs status=0
    shift
    # A task of an array goes by the array's name: its own number may stand for the whole array.
    job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    job="${job:-$SLURM_JOB_ID}"
    logs="${HAFRM_LOGS:-$PWD}/$SLURM_JOB_NAME-$job"
    mkdir -p "$logs" || return
    choose_interpreter || return
    export PYTHONUNBUFFERED=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun forgets it
    # The ranks watch one another and end together, each after its own last words: srun need not end any.
    srun_options+=(--kill-on-bad-exit=0 --wait=0 --open-mode=append "--output=$logs/rank-%4t.log")
    echo "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0} of $entry on $SLURM_JOB_NODELIST, logs in $logs"
    srun "${srun_options[@]}" "${interpreter[@]}" "$entry" "$@" || status=$?
    echo "$(date '+%F %T') $entry has ended with status $status"
    if ((status == STOPPED_STATUS)); then
        if ((${SLURM_RESTART_COUNT:-0} < ${HAFRM_MAX_REQUEUES:-100})); then
            echo "requeued: scontrol requeue $job"
            scontrol requeue "$job"
        else
            echo "not requeued: it has been ${SLURM_RESTART_COUNT} times (HAFRM_MAX_REQUEUES)" >&2
        fi
    fi
    return "$status"
}
