"""Rows of features that may be larger than memory, taken a few at a time, and checked.

Legend: N rows, C features, n rows that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS_A_SLICE = 1024


class Rows(Protocol):
    """Features [N, C] fp32, such as a NumPy array or an np.memmap; rows are taken and copied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, C)."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return the rows of a slice or of an int64 array: [n, C]."""


class Joined:
    """Rows of several arrays side by side, [N, C_1 + C_2 + ...], which are joined when taken.

    Raises ValueError for no array, or for arrays of different numbers of rows.
    """

    def __init__(self, *parts: Rows) -> None:
        if len(num_rows := {part.shape[0] for part in parts}) != 1:
            raise ValueError(f"parts: expected arrays of one number of rows, got {num_rows or 0}")
        self.parts = parts
        self.shape = (num_rows.pop(), sum(part.shape[1] for part in parts))

    def __getitem__(self, index: slice | NDArray[np.int64], /) -> NDArray[np.float32]:
        """Return the rows of a slice or of an int64 array: [n, C_1 + C_2 + ...]."""
        return np.concatenate([part[index] for part in self.parts], axis=1)


def take(name: str, rows: Rows, index: slice | NDArray[np.int64]) -> Tensor:  # [n, C] fp32
    """Copy some rows to a tensor on the CPU.

    Raises ValueError, with the name of the rows, where a value is NaN or infinite.
    """
    taken = np.array(rows[index], dtype=np.float32)
    if not np.isfinite(taken).all():
        raise ValueError(f"{name}: expected finite features, got NaN or infinity")
    return torch.from_numpy(taken)


def slices(num_rows: int) -> Iterator[slice]:
    """Yield slices of at most ROWS_A_SLICE rows that cover all of them in order."""
    for start in range(0, num_rows, ROWS_A_SLICE):
        yield slice(start, min(start + ROWS_A_SLICE, num_rows))
