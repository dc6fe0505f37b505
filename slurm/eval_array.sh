#!/usr/bin/env bash
# Evaluate under many settings, one array task for each line of a sweep file:
#   sbatch --array=1-7 slurm/eval_array.sh slurm/sweep_metaworld.txt \
#       --config-name=eval_metaworld checkpoint=outputs/metaworld/checkpoints/latest
#
# Task 1 takes the first line that is not a comment, and so on. Each line gives a run_dir= of its
# own; a task that is queued again continues with the episodes that its run folder lacks.
#SBATCH --job-name=pizero-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

sweep=$1
shift
line=$(grep -v -e '^#' -e '^ *$' "$sweep" | sed -n "${SLURM_ARRAY_TASK_ID}p")
if [ -z "$line" ]; then
    printf 'no line %s in %s\n' "$SLURM_ARRAY_TASK_ID" "$sweep" >&2
    exit 1
fi
read -ra overrides <<<"$line"
printf 'task %s: %s\n' "$SLURM_ARRAY_TASK_ID" "$line"
exec srun .venv/bin/python scripts/run.py "$@" "${overrides[@]}"
