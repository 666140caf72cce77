"""Regions of a picture, each a box with a text, as a column stores them and as a view shows them.

A region is a row of integers, `config.columns.REGION_WIDTH` of them: top, left, bottom and right of
its box in units of `REGION_UNIT`, the whole height or width of what it is a region of, then token
ids. So a row means the same whatever size the picture is stored in, and what a view shows of it is
the same to the bit wherever it is computed.
Legend: B samples, V views, M most regions of a sample, R most regions of a view, W integers of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.config.columns import (
    NO_CLASS,
    NO_LABELS,
    REGION_TOKENS,
    REGION_UNIT,
    REGION_WIDTH,
)
from m3i_fast.keyed_draws import Purpose, words

NONE = NO_CLASS
MOST_REGIONS = 1024
"""Most regions of a sample: the file has room in every row for the most that any sample has."""
Box = Sequence[float]
"""Top, left, bottom and right, as shares of the picture's height or width."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions as tensors, of views or of pictures: what a column's integers mean."""

    boxes: Tensor
    """[..., R, 4] float32: top, left, bottom and right in [0, 1], 0 where there is none."""
    token_ids: Tensor
    """[..., R, 32] int32: the text of each, -1 after its last token id."""
    mask: Tensor
    """[..., R] bool: the regions that there are, before the others."""

    @classmethod
    def of(cls, values: Tensor) -> Regions:  # [..., R, W] int32
        """Take apart the integers of `Batch.columns`."""
        boxes, ids = values.split([4, REGION_TOKENS], dim=-1)
        mask = ids[..., 0] >= 0
        shares = boxes.double() / REGION_UNIT
        return cls(shares.float().where(mask[..., None], 0), ids.clamp_min(NONE), mask)


def region_rows(
    regions: Sequence[tuple[Box, Sequence[int]]], size: int
) -> NDArray[np.int32]:  # [M, W]
    """Return the row of a sample with these regions: (box, token ids) of each.

    Raises ValueError for more than `size`, or for a region that `region_fault` refuses.
    """
    if len(regions) > size:
        raise ValueError(f"expected at most {size} regions, got {len(regions)}")
    rows = np.full((size, REGION_WIDTH), NONE, np.int32)
    for row, (box, ids) in zip(rows, regions, strict=False):
        if len(box) != 4 or not 0 < len(ids) <= REGION_TOKENS:
            raise ValueError(
                f"expected a box of 4 numbers and 1 to {REGION_TOKENS} token ids, got {len(box)} "
                f"and {len(ids)}"
            )
        found = np.asarray(box, np.float64)
        if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
            raise ValueError(f"expected a box of shares in [0, 1], got {list(box)}")
        row[:4] = np.rint(found * REGION_UNIT)
        row[4 : 4 + len(ids)] = ids
        if not (row[0] < row[2] and row[1] < row[3]):
            raise ValueError(f"expected top < bottom and left < right, got {list(box)}")
    return rows


def region_values(rows: NDArray[Any]) -> list[tuple[list[float], list[int]]]:  # [M, W]
    """Return (box, token ids) of each region of a sample's row."""
    found = []
    for row in rows[rows[:, 4] >= 0].tolist():
        ids = [each for each in row[4:] if each != NONE]
        found.append(([each / REGION_UNIT for each in row[:4]], ids))
    return found


def wrong_regions(rows: NDArray[Any], vocab_size: int) -> NDArray[np.bool_]:  # [N, M, W] -> [N, M]
    """Return which rows of samples are no regions, nor mark that there are no more."""
    boxes, ids = rows[..., :4].astype(np.int64), rows[..., 4:]
    there = (rows != NONE).any(2)
    bad = (boxes < 0).any(2) | (boxes > REGION_UNIT).any(2)
    bad |= (boxes[..., 0] >= boxes[..., 2]) | (boxes[..., 1] >= boxes[..., 3])
    bad |= (ids[..., 0] < 0) | (ids < NONE).any(2) | (ids >= vocab_size).any(2)
    bad |= ((ids[..., :-1] == NONE) & (ids[..., 1:] != NONE)).any(2)
    bad &= there
    bad[:, :-1] |= ~there[:, :-1] & there[:, 1:]  # a gap
    unknown = (rows == NO_LABELS).all((1, 2))
    return np.asarray(bad & ~unknown[:, None])


# ---- Views ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionViews:
    """What of a sample's regions each of its views has."""

    most: int
    """Regions of a view, R."""
    least_share: float
    """Share of a region's area that a view has to show, or else it is left out of that view."""
    seed: int

    def of(
        self,
        values: NDArray[np.int32],  # [B, M, W]
        params: NDArray[np.float32],  # [B, V, 5 and more]: y, x, height, width, flip
        image_size: NDArray[np.int64],  # [B, 2]
        positions: NDArray[np.int64],  # [B]
    ) -> NDArray[np.int32]:  # [B, V, R, W]
        """Return the regions of views, in units of the view, -1 where there are no more.

        A box is clipped to the view and mirrored with it. Of more than R regions R are drawn, which
        ones is a function of the seed and the sample's position in the run; they stay in the order
        of the column.
        """
        boxes, kept = self._clipped(values, params, image_size)
        kept &= (values[:, None, :, 4] >= 0) & (boxes[..., :2] < boxes[..., 2:]).all(3)
        order = self._order(kept, positions)  # [B, V, R]
        found = np.full((*kept.shape[:2], self.most, REGION_WIDTH), NONE, np.int32)
        taken = np.take_along_axis(kept, order, 2)
        chosen = found[:, :, : order.shape[2]]
        chosen[..., :4] = np.take_along_axis(boxes, order[..., None], 2)
        chosen[..., 4:] = values[np.arange(len(values))[:, None, None], order, 4:]
        chosen[~taken] = NONE
        return found

    def _clipped(
        self,
        values: NDArray[np.int32],
        params: NDArray[np.float32],
        image_size: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:  # [B, V, M, 4], [B, V, M]
        """Return boxes in units of each view, and which of them it shows enough of."""
        wide = params.astype(np.float64)[:, :, None]  # [B, V, 1, 5]
        scale = np.tile(image_size, 2).astype(np.float64)[:, None] / REGION_UNIT
        pixels = (values[..., :4] * scale)[:, None]  # [B, 1, M, 4]
        low, size = wide[..., :2], wide[..., 2:4]
        ends = np.stack([pixels[..., :2] - low, pixels[..., 2:] - low], axis=3)  # [B, V, M, 2, 2]
        ends = np.clip(ends / size[..., None, :], 0, 1)
        mirrored = (wide[..., 4] != 0)[..., None]
        x = ends[..., 1]
        x = np.where(mirrored, 1 - x[..., ::-1], x)
        ends = np.stack([ends[..., 0], x], axis=4)
        shown = ((ends[..., 1, :] - ends[..., 0, :]) * size).prod(3)
        area = (pixels[..., 2:] - pixels[..., :2]).prod(3)
        boxes = np.rint(ends * REGION_UNIT).astype(np.int32).reshape(*ends.shape[:3], 4)
        # a region that is shown whole is not lost to the rounding of its box
        return boxes, shown >= self.least_share * area * (1 - 1e-6)

    def _order(
        self, kept: NDArray[np.bool_], positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:  # [B, V, M] -> [B, V, R or fewer]
        """Return which regions each view takes, those that it has before the others."""
        count, views, regions = kept.shape
        place = np.broadcast_to(np.arange(regions), kept.shape)
        if kept.sum(2).max(initial=0) > self.most:
            drawn = words(positions, views * regions, seed=self.seed, purpose=Purpose.REGIONS)
            keys = (drawn >> np.uint64(1)).astype(np.int64).reshape(count, views, regions)
            last = np.iinfo(np.int64).max
            ranks = np.where(kept, keys, last).argsort(2, kind="stable").argsort(2, kind="stable")
            kept = kept & (ranks < self.most)
        order: NDArray[np.int64] = np.where(kept, place, place + regions).argsort(2, kind="stable")
        return order[..., : self.most]
