#!/usr/bin/env bash
# Resize an RLDS set, the shards shared out over the tasks of an array (or one task without --array):
#   sbatch --array=0-7 slurm/resize_rlds.sh SOURCE TARGET --size 224 [--filter-success ...]
#
# A task that is queued again, and the same command given again, go on with the shards that are
# missing; the task that writes the last one completes the set. A process holds one episode at a
# time, so memory goes by CPUs, not by the size of the set.
#SBATCH --job-name=pizero-resize
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem-per-cpu=1G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

part=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-1}
printf 'part %s: %s\n' "$part" "$*"
exec srun .venv/bin/python scripts/resize_rlds.py "$@" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" --part "$part"
