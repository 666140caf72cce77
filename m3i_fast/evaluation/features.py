"""Features of a set of pictures by one encoder.

Legend: N items, D encoder width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """The features of a set of pictures by one encoder, with their labels, concepts and pixels."""

    encoder: Tensor  # [N, D] fp32, mean of the frozen encoder's patch tokens
    image: Tensor  # [N, E] fp32, image embedding that captions are matched with; E = 0: none
    text: Tensor  # [N, E] fp32, embedding of the picture's caption
    captioned: Tensor  # [N] bool, whether the picture has a caption
    label: Tensor  # [N] int64, -1 = not labelled
    group: Tensor  # [N] int64, the concept
    pixels: Tensor  # [N, 12 * 12 * 3] fp32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.label):
                raise ValueError(
                    f"Features.{field.name}: expected {len(self.label)} rows, as label has, "
                    f"got {len(value)}"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(
                    f"Features.{field.name}: expected finite values, got NaN or infinity"
                )

    def rows(self, keep: Tensor) -> Features:  # [N] bool or [n] int64
        """Return the chosen rows of every field."""
        return Features(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})

    def cpu(self) -> Features:
        """Return the same features on the CPU."""
        return Features(**{field.name: getattr(self, field.name).cpu() for field in fields(self)})


def concatenate(features: Sequence[Features]) -> Features:
    """Return the rows of all features, in order."""
    return Features(
        **{
            field.name: torch.cat([getattr(each, field.name) for each in features])
            for field in fields(Features)
        }
    )
