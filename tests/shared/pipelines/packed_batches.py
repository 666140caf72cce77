"""Batches of views of any size, compared sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.pipelines.any_shape.batch import PackedBatch


def by_position(batches: list[PackedBatch]) -> dict[int, list[Tensor]]:
    """All that a batch says of each sample, by its position in the run."""
    found = {}
    for batch in batches:
        rows = zip(
            *(patches.split(batch.lengths(v)) for v, patches in enumerate(batch.patches)),
            *(batch.grids, batch.boxes, batch.token_ids, batch.label, batch.sample_id),
            strict=True,
        )
        for position, row in zip(batch.position.tolist(), rows, strict=True):
            assert position not in found
            found[position] = list(row)
    return found


def same(ours: dict[int, list[Tensor]], theirs: dict[int, list[Tensor]]) -> bool:
    return ours.keys() == theirs.keys() and all(
        all(map(torch.equal, ours[position], theirs[position])) for position in ours
    )
