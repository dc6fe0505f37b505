#!/usr/bin/env bash
# Train on the GPUs of one node:
#   sbatch slurm/train_node.sh --config-name=train_demo [key=value ...]
#
# Submit from the repository, after `make venv` on a login node. Give the run a `name=` of its own:
# it is the run folder, and a job that is queued again continues what it finds there.
#SBATCH --job-name=pizero
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
# shellcheck source=slurm/launch.sh
source "$SLURM_SUBMIT_DIR/slurm/launch.sh"
train "$@"
