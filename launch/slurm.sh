#!/usr/bin/env bash
# Train on whole nodes of a Slurm cluster, in as many jobs after another as it takes.
#
#   sbatch --nodes 4 launch/slurm.sh m3i_vit_b_h100 --data.path SHARDS --out runs/NAME
#
# --out is on a file system that all nodes see, and m3i-fast on the PATH of the job. Five minutes
# before its time is up Slurm sends SIGUSR1; the run saves and exits with 75, the job goes back into
# the queue, and goes on from there. --max-hours does the same where jobs get no signal. A SIGTERM
# (scancel, preemption) saves as well, and ends this script: Slurm itself queues a preempted job
# again, and a cancelled one stays cancelled.
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

: "${SLURM_JOB_ID:?not in a job: expected sbatch launch/slurm.sh RECIPE ...}"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))

# One task a node: torchrun starts the ranks. The other nodes get two minutes to end by themselves
# after the first one has, so that all of them have exited with 75.
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
    echo "saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
