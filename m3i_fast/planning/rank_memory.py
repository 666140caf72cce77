"""What one rank of a run holds on its card: the traced step, shared out, and what is beside it.

What torch's allocator holds is computed; what the process holds besides is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.traffic import Nodes
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.planning.step_memory import (
    AVERAGE,
    BATCH,
    FROZEN,
    PARAMETERS,
    STATES,
    Footprint,
    block_sizes,
    count_parameters,
    largest_block,
    trained,
)
from m3i_fast.planning.tensor_tracker import CAST_WEIGHTS, GRADIENTS

# Of a process on a GPU, in bytes; constants, not measured.
CONTEXT = {"CUDA context": 0.5 * 2**30, "DALI decoder and pools": 2.0 * 2**30}
NCCL = {"NCCL buffers": 0.5 * 2**30}
GATHERED, REDUCED, AHEAD = "gathered weights", "gradients being reduced", "batches ahead"
ADDED_UP = "gradients added up"  # of the batches of a step, whole on every rank
WORKSPACE, GRAPHS = "cuBLAS workspace", "CUDA graphs"
SHARDED = (PARAMETERS, FROZEN, AVERAGE, STATES, GRADIENTS)
ASSUMPTIONS = [
    "every image has a label and a caption, the captions of all ranks are candidates of each",
    "memory beside torch's allocator is made of constants; left out are fragmentation, workspaces "
    "of kernels but cuBLAS's, and what torch.compile saves",
    "ddp: gradients are views of its buckets, which hold them all from the start. fsdp: a block a "
    "unit, one more gathered ahead or as many as parallel.prefetch, weights in the type that is "
    "computed with, gradients reduced in fp32, and where batches are added up kept whole",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank at the peak of a step, by part."""

    parts: Mapping[str, float]
    assumed: Mapping[str, float]
    """Beside torch's allocator."""
    limit: float | None
    """Of the card, as published; None: not known."""

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + sum(self.assumed.values())

    @property
    def fits(self) -> bool | None:
        return None if self.limit is None else self.total <= self.limit


def memory_of(
    cfg: TrainConfig,
    card: Card,
    nodes: Nodes,
    footprint: Footprint,
    objective: MutualInformation,
    *,
    num_shards: int,
    bf16: bool,
) -> Memory:
    """Return the memory of a rank whose weights are sharded over `num_shards` ranks.

    footprint: of a step with so many shards. objective: on the meta device. bf16: whether matrix
    products run in it.
    """
    several = nodes.num_ranks > 1
    if num_shards > 1:
        parts = _sharded(
            footprint,
            objective,
            num_shards=num_shards,
            weight_bytes=2 if bf16 else 4,
            ahead=max(cfg.parallel.prefetch, 1),
        )
    else:
        parts = {**(footprint.ddp_peak if several else footprint.peak)}
    if cfg.parallel.accumulate > 1 and several:  # DDP's are beside its buckets
        parts[ADDED_UP] = 4.0 * trained(count_parameters(objective))
    assumed: dict[str, float] = {AHEAD: footprint.held[BATCH] * cfg.data.prefetch}
    if card.is_gpu:
        assumed |= CONTEXT | (NCCL if several else {})
    return Memory(
        parts=parts | _beside_tensors(cfg, card, footprint),
        assumed=assumed,
        limit=card.memory_bytes,
    )


def _sharded(
    footprint: Footprint,
    objective: MutualInformation,
    *,
    num_shards: int,
    weight_bytes: int,
    ahead: int,
) -> dict[str, float]:
    """Return a rank's memory under FSDP by block.

    ahead: blocks that are gathered while one computes.
    """
    parts: dict[str, float] = {
        part: size / num_shards if part in SHARDED else size
        for part, size in footprint.sharded_peak.items()
        if part != CAST_WEIGHTS  # they are gathered in that type
    }
    blocks = block_sizes(objective)
    rest, gathered = trained(count_parameters(objective)) - sum(blocks), largest_block(objective)
    of_rest = 4.0 if weight_bytes == 4 else 4.0 + weight_bytes  # and what autocast makes of it
    return parts | {
        GATHERED: of_rest * rest + weight_bytes * (1.0 + ahead) * gathered,
        REDUCED: 4.0 * max(blocks, default=0),
    }


def _beside_tensors(cfg: TrainConfig, card: Card, footprint: Footprint) -> dict[str, float]:
    """Return what torch's allocator holds beside the step's own tensors."""
    workspace = _workspace(cfg, card)
    if cfg.cuda_graphs == "none":
        return {WORKSPACE: workspace}
    if cfg.cuda_graphs == "step":
        # What a step allocates, and its batch, once more: steps with monitors have no graph. The
        # stream of the capture has a workspace, and so has the graph.
        kept = footprint.of_a_step + footprint.held[BATCH] + 2 * workspace
        return {WORKSPACE: workspace, GRAPHS: kept}
    of_calls = footprint.graphs  # each in memory of its own, with a workspace
    return {WORKSPACE: workspace, GRAPHS: sum(of_calls) + len(of_calls) * workspace}


def _workspace(cfg: TrainConfig, card: Card) -> int:
    """Return the bytes that torch's allocator gives cuBLAS for the stream of the step."""
    if not (card.is_gpu and cfg.deterministic):
        return card.workspace_bytes
    return 8 * 4 * 2**20  # CUBLAS_WORKSPACE_CONFIG=:4096:8, which a deterministic run sets
