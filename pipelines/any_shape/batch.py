"""`PackedBatch`, a batch of views of any size and aspect as patches behind one another.

Legend: B images, V views of each, P pixels along a side of a patch, T patches of a view of all
images, C tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from m3i_fast.pipelines.batch import Batch, copy_to_device


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Views of B images with their boxes, captions and labels; row b of each field is image b.

    Boxes, positions and the other fields are those of a `Batch`.
    """

    patches: tuple[Tensor, ...]  # V x [T, 3 P P] uint8, global views first; image after image
    grids: Tensor  # [B, V, 2] int64: rows and columns of each view's patches; always on the CPU
    num_global: int
    """Views that are global ones; the others are local."""
    boxes: Tensor  # [B, V, 5] float32
    image_size: Tensor  # [B, 2] float32: height, width of the upright image
    token_ids: Tensor  # [B, C] int32, zero padded
    num_tokens: Tensor  # [B] int64, 0 = no caption
    label: Tensor  # [B] int64, -1 = no label
    sample_id: Tensor  # [B] int64
    group_id: Tensor  # [B] int64
    position: Tensor  # [B] int64, ascending; always on the CPU
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Named columns, a tensor each, as those of a `Batch`."""
    step_counts: tuple[int, ...] = ()
    """Images of each batch of the step, of all ranks: number m is the rank's m mod the number of
    ranks. Empty for a batch that is a step by itself."""

    @property
    def batch_size(self) -> int:
        """Return the number B of images, which differs from batch to batch."""
        return self.sample_id.shape[0]

    @property
    def num_local(self) -> int:
        """Return how many local views each image has."""
        return len(self.patches) - self.num_global

    def lengths(self, view: int) -> list[int]:
        """Return the patches of a view of each image."""
        lengths: list[int] = self.grids[:, view].prod(1).tolist()
        return lengths

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy the batch to `device` without waiting; grids and positions stay on the CPU."""
        target = torch.device(device)
        moved: dict[str, Any] = {
            "patches": tuple(copy_to_device(each, target) for each in self.patches),
            "columns": {name: copy_to_device(each, target) for name, each in self.columns.items()},
        }
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor) and name not in ("grids", "position"):
                moved[name] = copy_to_device(value, target)
        return replace(self, **moved)


AnyBatch = Batch | PackedBatch
"""What a training step takes: squares of one size, or views of any shape."""


def step_counts(batches: Sequence[AnyBatch], num_ranks: int) -> list[int]:
    """Return how many samples each batch of a step has: number m is the rank's m mod num_ranks.

    batches: this rank's. Raises ValueError for batches of any shape that are of another step.
    """
    first = batches[0]
    if not isinstance(first, PackedBatch) or not first.step_counts:
        if isinstance(first, PackedBatch) and num_ranks * len(batches) > 1:
            raise ValueError(
                "batches: expected step_counts of each batch where a step has several, got none"
            )
        return [batch.batch_size for batch in batches for _ in range(num_ranks)]
    counts = list(first.step_counts)
    if len(counts) != num_ranks * len(batches):
        raise ValueError(
            f"batches: expected those of a step of {len(counts)} batches of all ranks, got "
            f"{len(batches)} on each of {num_ranks}"
        )
    return counts
