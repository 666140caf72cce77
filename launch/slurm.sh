#!/usr/bin/env bash
# Train on whole nodes of a Slurm cluster, in as many consecutive jobs as the run needs.
#
#   sbatch --nodes 4 launch/slurm.sh m3i_vit_b_h100 --data.path SHARDS --out runs/NAME
#
# --out must be on a file system that all nodes share, and m3i-fast on the job's PATH. Five minutes
# before the time limit Slurm sends SIGUSR1: the run saves a checkpoint and exits with 75, and the
# job is requeued and resumes from it. --max-hours does the same where jobs get no signal.
#
# SIGTERM saves as well, within the cluster's KillWait (30 s unless it is set), or GraceTime where a
# job is preempted. A job that is preempted or loses a node is requeued, by Slurm or by this script;
# a cancelled one stays cancelled, since Slurm ends this script first.
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
port=$((10000 + SLURM_JOB_ID % 20000)) # below those that Linux gives to outgoing connections

# One task a node; torchrun starts the ranks. After the first node has ended, the others get two
# minutes (or SLURM_WAIT) to end by themselves, so that all of them exit with 75; what has not ended
# then, for instance a node that waits for one that could not start, is killed. srun of Slurm 22.05
# to 23.11 gives a task one core unless it is asked for more.
code=0
srun --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-120}" \
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
    m3i-fast launch \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:$port" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    train "$@" --auto-resume || code=$?

# A job that requeues itself while it is being preempted would be requeued again when it ends.
preempted() {
    [[ $(scontrol show job "$SLURM_JOB_ID") == *" PreemptTime=2"* &&
        $(scontrol show partition "$SLURM_JOB_PARTITION") == *" PreemptMode=REQUEUE"* ]]
}

# A node that is down, or does not answer (*). Its peers' ranks fail before Slurm is sure of it, and
# Slurm would not requeue a job that has ended by then.
lost_a_node() {
    [[ $(sinfo --noheader --nodes "$SLURM_JOB_NODELIST" --format %T) =~ down|fail|\* ]]
}

case $code in
    75) what="checkpoint saved" ;;
    0 | 2 | 130) exit "$code" ;;
    *)
        lost_a_node || exit "$code"
        what="a node was lost"
        ;;
esac
echo "$what; requeuing job $SLURM_JOB_ID"
preempted || scontrol requeue "$SLURM_JOB_ID" \
    || echo "job $SLURM_JOB_ID is not requeued: sbatch the same line to continue the run" >&2
exit "$code"
