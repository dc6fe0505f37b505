# Sourced by the training scripts: runs torchrun on every node of the job and minds its end.
#
# Slurm warns the batch script with USR1 before the time is up (#SBATCH --signal=B:USR1@...). The
# warning goes on to the trainers, which save a checkpoint and leave, and the job is queued again: it
# finds its run folder and continues. Pre-emption with requeueing (TERM) takes the same way.
# shellcheck shell=bash

cd "$SLURM_SUBMIT_DIR" || exit
# One name for the run on every node. The first node holds the meeting place.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
rendezvous=(
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node=gpu
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID"
    --rdzv-endpoint="$head_node:$((20000 + SLURM_JOB_ID % 20000))"
)

# train --config-name=NAME [key=value ...]
train() {
    local warned='' status=0 step
    trap 'warned=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
    # torchrun itself has to outlive the warning, so it starts with USR1 ignored; the trainers listen.
    # shellcheck disable=SC2016  # "$@" is the inner shell's
    srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' torchrun \
        .venv/bin/python -m torch.distributed.run "${rendezvous[@]}" scripts/run.py "$@" &
    step=$!
    wait "$step" || status=$?
    if [ -n "$warned" ]; then
        # The first wait ended with the trap; this one ends with the step.
        status=0
        wait "$step" || status=$?
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
