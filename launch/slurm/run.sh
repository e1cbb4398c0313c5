# Sourced by train.sbatch and sweep.sbatch, from the repository's root.
#
# `train ARGUMENTS` runs the trainer in all tasks of the job, and has the job requeued if it is to be resumed.
# What a site needs around it comes from the environment of sbatch:
#   BIPE_SETUP   a file that is sourced first: module load, a virtual environment
#   BIPE_PYTHON  the command that runs Python (python), such as "apptainer exec --nv jax.sif python"

# SLURM signals the tasks. Where it signals this shell as well, that must live on until they have saved.
trap : TERM

# Of one task of an array; SLURM_JOB_ID could mean all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "$(date '+%F %T') job $job: $*" >&2; }
refuse() { say "error: $*"; exit 1; }

if [ -n "${BIPE_SETUP:-}" ]; then
    [ -r "$BIPE_SETUP" ] || refuse "BIPE_SETUP=$BIPE_SETUP cannot be read"
    . "$BIPE_SETUP"
fi
read -ra python <<<"${BIPE_PYTHON:-python}"

train() {
    local argument previous='' workdir='' devices=--config.mesh.devices=$SLURM_NTASKS
    local tasks=${SLURM_TASKS_PER_NODE%%[!0-9]*} code
    for argument; do
        [ "$previous" != --workdir ] || workdir=$argument
        previous=$argument
        case $argument in
            --workdir=*) workdir=${argument#*=} ;;
            --config.mesh.devices=*) devices=$argument ;;
        esac
    done
    [ -n "$workdir" ] || refuse "--workdir=DIR is needed"
    # JAX gives each task one GPU; others would idle, unnoticed.
    [ "${SLURM_GPUS_ON_NODE:-$tasks}" = "$tasks" ] ||
        refuse "$SLURM_GPUS_ON_NODE GPUs a node, but $tasks tasks: --ntasks-per-node=$SLURM_GPUS_ON_NODE"
    # Each task is to see all GPUs of its node, from which JAX picks that of the task's number there: srun
    # is not to know of --gpus-per-task. (--gpu-bind=none would show it other jobs' GPUs as well.)
    unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    # Since 22.05 srun does not take this from sbatch.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

    say "$SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"
    mkdir -p "$workdir" || refuse "--workdir=$workdir cannot be made"
    rm -f "$workdir/failed" # of an earlier try
    srun --kill-on-bad-exit=1 --label \
        "${python[@]}" -m bipe_jax.train "$@" "$devices"
    code=$?
    say "the trainer ended with status $code"
    "${python[@]}" -m launch.restart --workdir="$workdir" --code=$code && requeue
    exit $code
}

# Only a job that nobody else has ended: SLURM itself requeues one that it preempts or whose node fails,
# and one that its user has cancelled would come back.
requeue() {
    local state attempt
    for attempt in 1 2 3 4 5 6; do
        state=$(squeue --noheader --jobs="$job" --format=%T)
        case $state in
            RUNNING) scontrol requeue "$job" && say "requeued" && return ;;
            ?*) say "$state: left to SLURM" && return ;;
        esac
        sleep 20 # the controller may be away
    done
    say "error: could not be requeued: submit it again to resume"
}
