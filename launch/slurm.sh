#!/usr/bin/env bash
#SBATCH --job-name=largekd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --output=slurm-%j.log
# TERM two minutes before the limit, so that the ranks save.
#SBATCH --signal=TERM@120
# One task is one rank; the ranks read their numbers from Slurm:
#   sbatch launch/slurm.sh --config recipes/quickstart.yaml run.dir=/shared/runs/first
set -euo pipefail
# Slurm runs a copy of this file: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
. launch/env.sh

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
# Two jobs on one node get different ports.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

exec srun --kill-on-bad-exit=1 python launch/train.py "$@"
