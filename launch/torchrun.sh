#!/usr/bin/env bash
# Train on all GPUs of this node, or of several nodes that can reach each other.
#
#   launch/torchrun.sh m3i_vit_b_h100 --data.path SHARDS --out runs/NAME
#   NNODES=4 RENDEZVOUS=FIRST_NODE:29400 launch/torchrun.sh ...       the same on each of the nodes
#
# --out is on a file system that all nodes see. Started again, it goes on from the newest checkpoint.
# NPROC_PER_NODE: processes a node, unless one a GPU. RUN_ID tells runs of one rendezvous apart.
set -euo pipefail

options=(--nproc-per-node "${NPROC_PER_NODE:-gpu}")
if [[ ${NNODES:-1} -eq 1 ]]; then
    options+=(--standalone)
else
    : "${RENDEZVOUS:?expected HOST:PORT of one of the nodes, the same on all of them}"
    options+=(--nnodes "$NNODES" --rdzv-backend c10d)
    options+=(--rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-m3i-fast}")
fi
exec m3i-fast launch "${options[@]}" -m m3i_fast.cli train "$@" --auto-resume
