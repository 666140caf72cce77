"""Rows of features in a file: read by blocks, so that memory does not grow with their number.

Legend: N rows, C width of a row, n rows that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Index = NDArray[np.int64]
ROWS_A_SLICE = 1024


class Rows(Protocol):
    """Anything like an array [N, C] fp32 whose rows are taken by a slice or an int64 array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


class FileRows:
    """The rows of a .npy file, which is mapped into memory for each access alone.

    A map that stays open counts every page that was read as the process's memory, up to the whole
    file. Here what an access returns is a copy, and nothing else stays.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; ValueError for another array than [N, C]."""
        self.path = path
        opened = np.load(path, mmap_mode="r", allow_pickle=False)
        if opened.ndim != 2:
            raise ValueError(f"{path}: expected an array [N, C], got {list(opened.shape)}")
        self.shape: tuple[int, ...] = opened.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Index) -> NDArray[Any]:
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[key])


class Joined:
    """Rows of several arrays side by side, [N, C_1 + C_2 + ...], which are joined when taken.

    Raises ValueError for no array, or for arrays of different numbers of rows.
    """

    def __init__(self, *parts: Rows) -> None:
        if len(num_rows := {part.shape[0] for part in parts}) != 1:
            raise ValueError(f"parts: expected arrays of one number of rows, got {num_rows or 0}")
        self.parts = parts
        self.shape = (num_rows.pop(), sum(part.shape[1] for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Index, /) -> NDArray[np.float32]:
        """Return the rows of a slice or of an int64 array: [n, C_1 + C_2 + ...]."""
        return np.concatenate([part[index] for part in self.parts], axis=1)


def take(name: str, rows: Rows, index: slice | Index) -> Tensor:  # [n, C] fp32
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


def row_blocks(
    rows: Rows,
    index: Index | None = None,  # [n] numbers of rows; None: all of them
    *,
    size: int,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, Tensor]]:  # place among the n, [size, C] fp32 on the device
    """Yield rows block by block; their places are those in `index`.

    Raises ValueError where a value is NaN or infinite: no comparison with it holds, so that ranks
    and votes that count comparisons would be those of the best encoder.
    """
    num = len(rows) if index is None else len(index)
    for start in range(0, num, size):
        place = slice(start, min(start + size, num))
        block = np.asarray(rows[place if index is None else index[place]], dtype=np.float32)
        if not np.isfinite(block).all():
            raise ValueError("rows: expected finite features, got NaN or infinity")
        yield place, torch.from_numpy(np.ascontiguousarray(block)).to(device)


def unit(block: Tensor) -> Tensor:  # [n, C] -> [n, C] of unit length
    """Scale rows to unit length, as cosines need them."""
    return F.normalize(block, dim=-1)


def take_rows(rows: Rows, index: Index) -> Tensor:  # [n, C] fp32
    """Return some rows as one tensor on the CPU, for what has to see them all."""
    blocks = [block for _, block in row_blocks(rows, index, size=1 << 14)]
    return torch.cat(blocks) if blocks else torch.empty(0, rows.shape[1])
