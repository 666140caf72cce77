#!/usr/bin/env bash
# Train on whole nodes of a Slurm cluster, in as many consecutive jobs as the run needs.
#
#   sbatch --nodes 4 launch/slurm.sh m3i_vit_b_h100 --data.path SHARDS --out runs/NAME
#
# --out must be on a file system that all nodes share, and m3i-fast on the job's PATH. Five minutes
# before the time limit Slurm sends SIGUSR1: the run saves a checkpoint and exits with 75, and the
# job is requeued and resumes from it. --max-hours does the same where jobs get no signal. SIGTERM
# (scancel, preemption) saves as well and ends this script: Slurm itself requeues a preempted job,
# and a cancelled one stays cancelled.
#SBATCH --job-name=m3i-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail

: "${SLURM_JOB_ID:?expected to run in a Slurm job, got none: sbatch launch/slurm.sh RECIPE ...}"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

# One task a node; torchrun starts the ranks. After the first node has ended, the others get two
# minutes to end by themselves, so that all of them exit with 75.
code=0
srun --kill-on-bad-exit=0 --wait=120 \
    m3i-fast launch \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:$port" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m m3i_fast.cli train "$@" --auto-resume || code=$?

if [[ $code -eq 75 ]]; then
    echo "checkpoint saved; requeuing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
