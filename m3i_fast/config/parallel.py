"""How a run is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from m3i_fast.config.fields import BATCHES, DEPTHS, ROWS, Checked, Conflict, unmet


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig(Checked):
    """How weights, batches and memory are divided over ranks and within one."""

    shard: Annotated[int, range(-1, 2**20 + 1)] = 1
    """Ranks that weights, gradients, moments and averages are spread over. 1: every rank holds all
    (DDP); -1: all ranks (FSDP2); between: as many groups of so many ranks (HSDP)."""
    chunk: Annotated[int, ROWS] = 0
    """Rows that encoders and decoders work on at a time (gradient caching): activations take the
    memory of so many, losses see the whole batch, the forward pass is run twice. 0: all rows."""
    accumulate: Annotated[int, BATCHES] = 1
    """Batches of data.batch_size that a rank's step adds the gradients of: the whole batch is
    data.batch_size x accumulate x ranks. Each term's mean is over the members of one of them."""
    prefetch: Annotated[int, range(DEPTHS.stop)] = 0
    """Blocks whose weights are gathered before their turn, forward and backward, where weights are
    spread: more of them hide a slower network, and each takes the memory of a block. 0: one, when
    FSDP2 sees fit."""

    def place(self) -> str:
        return "parallel."

    def conflicts(self) -> Iterator[Conflict]:
        return unmet(self, shard=(self.shard != 0, "-1 or >= 1"))
