#!/bin/sh
# The tests of launch/slurm.sh start a cluster of two nodes on this machine. Install Debian's Slurm
# where this machine lets us (root and apt-get); elsewhere those tests say that they were skipped,
# and why. The cluster has its own configuration, key and ports: nothing here has to be configured.
installed() (
    PATH=$PATH:/usr/sbin
    for program in slurmctld slurmd sbatch munged; do
        command -v "$program" >/dev/null || exit 1
    done
)
installed && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "slurm: not installed (needs root and apt-get); its tests will be skipped"
    exit 0
fi
echo "slurm: installing it for the tests of launch/slurm.sh"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >/dev/null || echo "slurm: apt-get failed; its tests will be skipped"
