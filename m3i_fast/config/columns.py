"""What a run is told of the named columns of its data: kinds, sizes and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import ROWS, SOME_ROWS, Checked, Conflict

NO_CLASS = -1
"""Class of a sample without one, and what follows its last label or token."""
NO_LABELS = -2
"""Every label of a sample whose labels are not known; one that is known to have none has -1."""
ColumnKind = Literal["class", "labels", "numbers", "text", "regions"]
REGION_TOKENS = 32
"""Most token ids of a region's text, the first and the last one among them."""
REGION_WIDTH = 4 + REGION_TOKENS
"""Integers of a region: top, left, bottom and right of its box, then the token ids, -1 after the
last one."""
REGION_UNIT = 1 << 30
"""What the whole height, or width, of a picture or a view is in these coordinates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnConfig(Checked):
    """Size a named column, as `pipelines.dataset.annotations.columns.ColumnInfo` describes it."""

    name: str
    """Name of the column, which terms give."""
    kind: ColumnKind
    """What a sample has: a class, a set of labels, numbers, a text, or regions with a text each."""
    num_names: Annotated[int, ROWS] = 0
    """Classes, labels or numbers that there are; 0 for a text and for regions."""
    size: Annotated[int, SOME_ROWS] = 1
    """Most values of a sample: labels, numbers, tokens or regions; 1 for a class."""
    mean: tuple[float, ...] = ()
    """Mean of each number over the samples that have it; of other kinds none."""
    std: tuple[float, ...] = ()
    """Standard deviation of each number, above 0."""

    def place(self) -> str:
        return f"column {self.name!r}: "

    def conflicts(self) -> Iterator[Conflict]:
        count = self.num_names if self.kind == "numbers" else 0
        for field in ("mean", "std"):
            if len(getattr(self, field)) != count:
                got = len(getattr(self, field))
                yield field, f"expected {count} of {self.kind}, got {got}"
        if min(self.std, default=1.0) <= 0:
            yield "std", f"expected above 0, got {min(self.std)}"
        if (self.kind in ("text", "regions")) == (self.num_names > 0):
            yield (
                "num_names",
                f"expected 0 for a text and for regions alone, got {self.num_names} of {self.kind}",
            )
