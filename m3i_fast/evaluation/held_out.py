"""Facts about the held-out pictures that hold for any encoder: near-duplicates and the hard half.

Legend: M held-out pictures, one a concept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.feature_extraction import small_pixels
from m3i_fast.pipelines.dataset.near_duplicates import cluster_groups, distances, rounded

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch

ENDINGS = ("", "_hard")  # of a measure's name: on all items, on the hard ones


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The held-out items, in the order that every measure has them in."""

    group: Tensor  # [M] int64, the concept
    cluster: Tensor  # [M] int64; items of one are nearly the same picture
    distance: Tensor  # [M] fp64, to the nearest training picture

    @property
    def hard(self) -> Tensor:  # [M] bool
        """Return the half farthest from any training picture; of equal items the earlier."""
        order = self.distance.argsort(descending=True, stable=True)
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[: (len(order) + 1) // 2]] = True
        return chosen

    def rows(self, ending: str) -> Tensor:  # [M] bool
        """Return the items of a measure whose name ends in `ending`."""
        return self.hard if ending else torch.ones_like(self.hard)

    def align(
        self,
        values: Tensor,  # [G, ...]
        group: Tensor,  # [G] int64 in ascending order, some of the held-out concepts
        missing: float,
    ) -> Tensor:  # [M, ...]
        """Place the values of some concepts at their rows, and `missing` at all other rows."""
        aligned = values.new_full((len(self.group), *values.shape[1:]), missing)
        if len(group) == 0:
            return aligned
        place = torch.searchsorted(group, self.group).clamp_max(len(group) - 1)
        has_value = group[place] == self.group
        aligned[has_value] = values[place[has_value]]
        return aligned


def describe_held_out(heldout: Iterable[Batch], training: Iterable[Batch]) -> HeldOut:
    """Compare held-out pictures with each other and with all training pictures, one view a sample.

    Distances and clusters are those of `pipelines.near_duplicates`. Pictures of one size give the
    same ones whatever size a model takes. Memory is that of the held-out thumbnails and one batch.
    """
    batches = [(batch.group_id.cpu(), small_pixels(batch.global_views[0])) for batch in heldout]
    group = torch.cat([of for of, _ in batches])
    pictures = rounded(torch.cat([pixels for _, pixels in batches]).cpu())
    nearest = np.full(len(pictures), np.inf)
    for batch in training:
        if batch.batch_size:
            others = rounded(small_pixels(batch.global_views[0]).cpu())
            nearest = np.minimum(nearest, distances(pictures, others).min(1))
    clusters = cluster_groups(group, pictures)
    return HeldOut(
        group=group,
        cluster=torch.tensor([clusters[int(concept)] for concept in group]),
        distance=torch.from_numpy(nearest),
    )
