"""Rows of pictures that have unequal numbers of them, for instance cells of grids of any shape.

Legend: R pictures, T rows of all of them, Q rows that are asked for, C features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m3i_fast.models.transformer.packing import to_device


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Hold rows of R pictures behind one another, as [R, n, ...] does where all have n.

    The lengths are known on the host, so that no call waits for the device.
    """

    values: Tensor  # [T, ...]
    lengths: tuple[int, ...]  # R

    def __len__(self) -> int:
        """Return the number R of pictures."""
        return len(self.lengths)

    def with_values(self, values: Tensor) -> Ragged:  # [T, ...]
        """Return other values of as many rows of each picture."""
        return replace(self, values=values)

    def to(self, device: torch.device) -> Ragged:
        """Copy to the device; a GPU is not waited for."""
        return self.with_values(to_device(self.values, device))

    def pictures(self, first: int, count: int) -> Ragged:
        """Return the rows of some pictures that follow one another, a view."""
        start, chosen = sum(self.lengths[:first]), self.lengths[first : first + count]
        return Ragged(self.values[start : start + sum(chosen)], chosen)

    def select(self, index: Tensor) -> Ragged:  # [N] int64, on the CPU
        """Return the rows of some pictures in any order."""
        if len(index) == len(self) and bool((index == torch.arange(len(index))).all()):
            return self
        lengths = torch.tensor(self.lengths)[index]
        ahead = self.starts()[index] - (lengths.cumsum(0) - lengths)
        chosen = tuple(lengths.tolist())
        row = torch.arange(int(lengths.sum())) + ahead.repeat_interleave(lengths)
        return Ragged(self.values[to_device(row, self.values.device)], chosen)

    def starts(self) -> Tensor:  # [R] int64, on the CPU
        """Return the number of rows before each picture's."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return lengths.cumsum(0) - lengths

    def spread(self, of_pictures: Tensor) -> Tensor:  # [R, ...] -> [T, ...]
        """Repeat a value of each picture for every one of its rows."""
        device = self.values.device
        lengths = to_device(torch.tensor(self.lengths, dtype=torch.int64), device)
        of_pictures = to_device(of_pictures, device)
        return of_pictures.repeat_interleave(lengths, 0, output_size=len(self.values))

    def mean(self) -> Tensor:  # [R, ...]
        """Return the mean over each picture's rows, of pictures that have any."""
        lengths = to_device(torch.tensor(self.lengths, dtype=torch.int64), self.values.device)
        return torch.segment_reduce(self.values, "mean", lengths=lengths, unsafe=True)

    def gather(self, index: Ragged) -> Ragged:  # int64 [Q] -> [Q, ...]
        """Return some rows of each picture by their numbers among its own."""
        return index.with_values(self.values[index.values + index.spread(self.starts())])

    def padded(self) -> Tensor:  # [R, most, ...]
        """Return as many rows of each picture, the last ones 0."""
        most = max(self.lengths)
        # Row t of picture r goes to r most + t, and is start_r + t here.
        ahead = most * torch.arange(len(self)) - self.starts()
        place = torch.arange(len(self.values), device=self.values.device) + self.spread(ahead)
        whole = self.values.new_zeros(len(self) * most, *self.values.shape[1:])
        return whole.index_copy(0, place, self.values).unflatten(0, (len(self), most))

    def shares(self, dtype: torch.dtype) -> Tensor:  # [T], sums to 1
        """Return what each row counts for in a mean over pictures of the mean over their rows."""
        each = 1 / (len(self) * torch.tensor(self.lengths, dtype=torch.float64))
        return self.spread(each.to(dtype))


Cells = Tensor | Ragged
"""Rows of pictures: [R, n, ...], or of unequal numbers."""


def alike(parts: Sequence[Cells]) -> bool:
    """Return whether all pictures have as many rows, so that a mean over rows weighs them alike."""
    lengths = {n for part in parts if isinstance(part, Ragged) for n in part.lengths}
    return len(lengths) <= 1


def joined(parts: Sequence[Ragged]) -> Ragged:
    """Put the pictures of several behind one another, without a copy of one alone."""
    if len(parts) == 1:
        return parts[0]
    lengths = sum((part.lengths for part in parts), ())
    return Ragged(torch.cat([part.values for part in parts]), lengths)


def rows_of(cells: Cells) -> Tensor:  # [R, n, ...] -> [R n, ...], or [T, ...]
    """Return the rows of all pictures behind one another."""
    return cells.values if isinstance(cells, Ragged) else cells.flatten(0, 1)


def tensor_of(cells: Cells) -> Tensor:  # [R, n, ...] itself, or [T, ...]
    """Return the tensor that holds the rows."""
    return cells.values if isinstance(cells, Ragged) else cells


def mapped(function: Callable[[Tensor], Tensor], cells: Cells) -> Cells:
    """Apply a function of rows, which keeps their number and order."""
    if isinstance(cells, Ragged):
        return cells.with_values(function(cells.values))
    return function(cells)


def gather_cells(tokens: Cells, index: Cells) -> Cells:  # [R, N, C], [R, Q] -> [R, Q, C]
    """Gather the tokens of some cells of each picture; index: int64, both of one kind."""
    if isinstance(tokens, Ragged):
        assert isinstance(index, Ragged)
        return tokens.gather(index)
    assert isinstance(index, Tensor)
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def prefer_rows(rows: Ragged, wanted: Tensor, number: int) -> Ragged:  # [T] int64, [T] bool
    """Select the first wanted rows of each picture, as `targets.prefer_cells` of squares does.

    number: of each picture, at most all; 0: as many as it has. Does not synchronise with the host.
    """
    device, count = rows.values.device, len(rows)
    picture = rows.spread(torch.arange(count))
    ordered = rows.values[(2 * picture + ~wanted).argsort(stable=True)]
    lengths = to_device(torch.tensor(rows.lengths), device)
    has = torch.zeros_like(lengths).index_add(0, picture, wanted.to(lengths.dtype))
    has = torch.where(has > 0, has, lengths)
    taken = tuple(min(number or length, length) for length in rows.lengths)
    chosen = Ragged(torch.arange(sum(taken), device=device), taken)
    place = chosen.values - chosen.spread(chosen.starts())
    first = chosen.spread(rows.starts())
    return chosen.with_values(ordered[first + place % chosen.spread(has)])


def mean_of_cells(tokens: Cells) -> Tensor:  # [R, n, C] -> [R, C]
    """Average the tokens of each picture."""
    return tokens.mean() if isinstance(tokens, Ragged) else tokens.mean(1)
