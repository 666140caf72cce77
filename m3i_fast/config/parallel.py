"""How a run is divided over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from m3i_fast.config.fields import BATCHES, DEPTHS, ROWS, Checked, Conflict, unmet


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig(Checked):
    """Divide weights, batches and memory over ranks and within one."""

    shard: Annotated[int, range(-1, 2**20 + 1)] = 1
    """Ranks that weights, gradients, moments and averages are sharded over. 1: replicated on every
    rank (DDP); -1: over all ranks (FSDP2); between: over groups of so many ranks, and replicated
    between the groups (HSDP)."""
    chunk: Annotated[int, ROWS] = 0
    """Rows that encoders and decoders take at a time (gradient caching): activations need the
    memory of so many rows, losses see the whole batch, and the forward pass runs twice. 0: all
    rows."""
    accumulate: Annotated[int, BATCHES] = 1
    """Batches whose gradients a rank adds up in a step: the whole batch is data.batch_size x
    accumulate x ranks. Each term's mean is over the members of one of them."""
    prefetch: Annotated[int, range(DEPTHS.stop)] = 0
    """Blocks whose weights are gathered ahead, forward and backward, where weights are sharded:
    more of them hide a slower network, and each takes the memory of a block. 0: FSDP2's own choice,
    one block."""

    def place(self) -> str:
        return "parallel."

    def conflicts(self) -> Iterator[Conflict]:
        return unmet(self, shard=(self.shard != 0, "-1 or >= 1"))
