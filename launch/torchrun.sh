#!/usr/bin/env bash
# Train on all GPUs of this node, or of several nodes that can reach each other.
#
#   launch/torchrun.sh m3i_vit_b_h100 --data.path SHARDS --out runs/NAME
#   NNODES=4 RENDEZVOUS=FIRST_NODE:29400 launch/torchrun.sh ...       the same on each of the nodes
#
# --out must be on a file system that all nodes share. Started again, the run resumes from its newest
# checkpoint. NPROC_PER_NODE: processes a node, by default one a GPU. RUN_ID distinguishes runs that
# share a rendezvous.
set -euo pipefail

options=(--nproc-per-node "${NPROC_PER_NODE:-gpu}")
if [[ ${NNODES:-1} -eq 1 ]]; then
    options+=(--standalone)
else
    : "${RENDEZVOUS:?expected HOST:PORT of one node, the same on all nodes, as NNODES is above 1}"
    options+=(--nnodes "$NNODES" --rdzv-backend c10d)
    options+=(--rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-m3i-fast}")
fi
exec m3i-fast launch "${options[@]}" train "$@" --auto-resume
