"""Named columns of a data set: what is known of a sample beside its class and captions.

A split has its columns in one file, a row of fixed size a sample, in the order of its table. The
file is mapped into memory, so that a batch's rows cost nothing and no shard is read for them.
Legend: N samples, M most labels of a sample, K numbers, T tokens of a text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.columns import NO_CLASS, NO_LABELS, REGION_WIDTH
from m3i_fast.config.columns import ColumnKind as Kind
from m3i_fast.durable_files import replaced_atomically
from m3i_fast.pipelines.dataset.annotations.regions import (
    MOST_REGIONS,
    region_rows,
    region_values,
    wrong_regions,
)

Values = Mapping[str, NDArray[Any]]
"""Arrays of N samples by column, as `Batch.columns` has them as tensors."""
NONE = NO_CLASS
COLUMNS_SUFFIX = ".columns"
UNNAMED: tuple[Kind, ...] = ("text", "regions")
"""Kinds of which no name of a value is kept."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
MOST_VALUES = 1 << 16
"""Most labels, numbers or tokens of a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnInfo:
    """A column: what it is called and what it holds.

    class: one of `names`, [N] int64, -1 for none. labels: a set of `names`, [N, M] int64, -1 after
    the last one and -2 where the set is not known. numbers: one for each of `names`, [N, K] fp32,
    NaN where it is not known. text: token ids of the data set's tokenizer, [N, T] int32, -1 after
    the last one and where there is none. regions: a box and the token ids of a text each, [N, M, W]
    int32 as `regions` says, -1 after the last one and -2 where they are not known.
    """

    name: str
    kind: Kind
    names: tuple[str, ...] = ()
    """Of the classes, labels or numbers, by their index; of a text and of regions none."""
    size: int = 1
    """Values that a row has: 1, M labels, K numbers, T token ids or M regions."""

    def __post_init__(self) -> None:
        """Raise ValueError for a name, kind or size that no column has."""
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"column: expected a name of up to 40 letters, digits and _, got {self.name!r}"
            )
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"column {self.name}: expected kind {', '.join(get_args(Kind))}, got {self.kind!r}"
            )
        if (self.kind in UNNAMED) == bool(self.names):
            raise ValueError(
                f"column {self.name}: expected names of all but a text and regions, got "
                f"{len(self.names)} of {self.kind}"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"column {self.name}: expected each name once, got one twice")
        sizes = {
            "class": (1, 1),
            "numbers": (len(self.names),) * 2,
            "regions": (1, MOST_REGIONS),
        }
        least, most = sizes.get(self.kind, (1, MOST_VALUES))
        if not least <= self.size <= most:
            raise ValueError(
                f"column {self.name}: expected size {least} to {most}, got {self.size}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of a sample's values in the file."""
        scalar = "<f4" if self.kind == "numbers" else "<i4"
        if self.kind == "regions":
            return np.dtype((scalar, (self.size, REGION_WIDTH)))
        return np.dtype(scalar if self.kind == "class" else (scalar, (self.size,)))

    @property
    def missing(self) -> float:
        """Return what a row holds where nothing is known."""
        unknown = {"labels": NO_LABELS, "regions": NO_LABELS, "numbers": math.nan}
        return unknown.get(self.kind, NONE)

    def row(self, value: Sequence[Any] | int | None) -> NDArray[Any]:
        """Return a sample's row: of an index, indices, numbers (None: unknown), ids or regions.

        A region is (box, token ids), as `regions.region_rows` takes it. None: nothing is known.
        Raises ValueError for a value out of range, or too many.
        """
        row = np.full(self.dtype.shape, self.missing, self.dtype.base)
        if value is None:
            return row
        if self.kind == "regions":
            try:
                return region_rows(value, self.size)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        given: list[Any] = [value] if isinstance(value, Integral) else list(value)  # type: ignore[arg-type]
        if self.kind == "labels":
            row[:] = NONE
        is_whole = self.kind in ("class", "numbers")
        if len(given) > self.size or (is_whole and len(given) < self.size):
            raise ValueError(f"{self.name}: expected {self.size} values, got {len(given)}")
        limit = len(self.names)
        if self.kind in ("class", "labels"):
            wrong = [each for each in given if each is None or not 0 <= each < limit]
            if wrong or len(set(given)) < len(given):
                raise ValueError(
                    f"{self.name}: expected indices from 0 to {limit - 1}, each once, got {given}"
                )
        filled = [math.nan if each is None else each for each in given]
        if self.kind == "class":
            return np.array(filled[0], self.dtype)
        row[: len(filled)] = filled
        return row

    def value(self, row: NDArray[Any]) -> Any:
        """Return what `row` made a sample's row of, as JSON has it."""
        found = np.asarray(row).reshape(-1)
        if not known(self, found[None])[0]:
            return None
        if self.kind == "regions":
            return region_values(found.reshape(self.dtype.shape))
        if self.kind == "numbers":
            return [None if math.isnan(each) else each for each in found.tolist()]
        kept = found[found != NONE].tolist()
        return kept[0] if self.kind == "class" else kept


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsInfo:
    """The columns' file of a split, and what is counted in it."""

    file: str
    num_bytes: int
    sha256: str
    num_known: dict[str, int] = field(default_factory=dict)
    """Samples of which something is known, by column."""
    count: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Samples that have each number, by column of numbers."""
    mean: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Mean of each known number, by column of numbers; 0 where none is known."""
    std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Its standard deviation; 1 where that is 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for a file outside of the dataset directory."""
        if PurePosixPath(self.file).name != self.file or not self.file.endswith(COLUMNS_SUFFIX):
            raise ValueError(
                f"expected a {COLUMNS_SUFFIX} file of the dataset directory, got {self.file!r}"
            )


def rows_dtype(columns: Sequence[ColumnInfo]) -> np.dtype[Any]:
    """Return the type of a row of the file."""
    return np.dtype([(column.name, column.dtype) for column in columns])


def rows_of(
    columns: Sequence[ColumnInfo], values: Sequence[Mapping[str, Any]]
) -> NDArray[np.void]:  # [N]
    """Return rows of samples by their values, as `ColumnInfo.row` takes them."""
    rows = np.zeros(len(values), rows_dtype(columns))
    for column in columns:
        for number, of_sample in enumerate(values):
            rows[column.name][number] = column.row(of_sample.get(column.name))
    return rows


def write_columns(
    file: Path, columns: Sequence[ColumnInfo], parts: Iterable[NDArray[np.void]]
) -> ColumnsInfo:
    """Write the columns of a split beside their place, and rename; return their entry."""
    digest, num_bytes = hashlib.sha256(), 0
    counts = Known(columns)
    with replaced_atomically(file) as temporary, temporary.open("wb") as out:
        for part in parts:
            content = np.ascontiguousarray(part, rows_dtype(columns)).tobytes()
            digest.update(content)
            num_bytes += out.write(content)
            counts.add(part)
    return ColumnsInfo(
        file=file.name, num_bytes=num_bytes, sha256=digest.hexdigest(), **counts.result()
    )


class Known:
    """A count of what is known of each column, with mean and variance of numbers in fp64.

    Sums are of distances from the first known number, so that numbers far from 0, such as dates,
    keep their deviation; they are added one after the other, so that it does not matter in which
    parts the rows come.
    """

    def __init__(self, columns: Sequence[ColumnInfo]) -> None:
        self.columns = columns
        self.num_known = {column.name: 0 for column in columns}
        # count, sum of distances and sum of their squares
        self.moments = {c.name: np.zeros((3, c.size)) for c in columns if c.kind == "numbers"}
        self.first = {name: np.full(m.shape[1], np.nan) for name, m in self.moments.items()}

    def add(self, rows: NDArray[np.void]) -> None:
        """Count rows of the file."""
        if not len(rows):
            return
        for column in self.columns:
            found = rows[column.name].reshape(len(rows), -1)
            self.num_known[column.name] += int(known(column, found).sum())
            if column.kind == "numbers":
                wide = found.astype(np.float64)
                there, first = ~np.isnan(wide), self.first[column.name]
                of_part = np.take_along_axis(wide, there.argmax(0)[None], 0)[0]
                first[:] = np.where(np.isnan(first), of_part, first)
                distance = np.where(there, wide - first, 0)
                added = np.stack([there, distance, distance**2], axis=1)  # [N, 3, K]
                before = self.moments[column.name][None]
                self.moments[column.name] = np.add.accumulate(np.concatenate([before, added]))[-1]

    def result(self) -> dict[str, Any]:
        """Return num_known, count, mean and std of `ColumnsInfo`."""
        counts, mean, std = {}, {}, {}
        for name, (count, total, square) in self.moments.items():
            some = np.maximum(count, 1)
            counts[name] = tuple(count.astype(np.int64).tolist())
            mean[name] = tuple((np.nan_to_num(self.first[name]) + total / some).tolist())
            variance = np.maximum(square / some - (total / some) ** 2, 0)
            std[name] = tuple(np.where(variance > 0, np.sqrt(variance), 1.0).tolist())
        return {"num_known": self.num_known, "count": counts, "mean": mean, "std": std}


def known(column: ColumnInfo, values: NDArray[Any]) -> NDArray[np.bool_]:  # [N, size] -> [N]
    """Return the samples of which something is known."""
    if column.kind == "numbers":
        return np.asarray(~np.isnan(values).all(1))
    return np.asarray(values[:, 0] != column.missing)


def rows_fault(
    columns: Sequence[ColumnInfo],
    rows: NDArray[np.void],
    numbers: NDArray[np.int64],
    *,
    vocab_size: int,
) -> str | None:
    """Return what is wrong with rows of the file, the first one named; None: nothing.

    numbers: [N] of each row in the file, to name it by.
    """
    for column in columns:
        if column.kind == "numbers":
            wrong = np.isinf(rows[column.name]).any(1)
            expected = "finite numbers or NaN"
        elif column.kind == "regions":
            of_regions = wrong_regions(rows[column.name], vocab_size)
            wrong = of_regions.any(1)
            expected = f"boxes in the picture, with token ids below {vocab_size}, -1 at the end"
        else:
            values = rows[column.name].reshape(len(rows), -1)
            limit = vocab_size if column.kind == "text" else len(column.names)
            unknown = (values == column.missing).all(1)
            ended = (values[:, :-1] == NONE) & (values[:, 1:] != NONE)
            wrong = ((values < NONE) | (values >= limit)).any(1) | ended.any(1)
            wrong &= ~unknown
            expected = f"{NONE} to {limit - 1}, -1 at the end"
        if wrong.any():
            first = int(np.argmax(wrong))
            got = rows[column.name][first].tolist()
            if column.kind == "regions":
                number = int(np.argmax(of_regions[first]))
                got = f"{got[number]} as region {number}"
            return f"row {numbers[first]}: {column.name}: expected {expected}, got {got}"
    return None


class ColumnTable:
    """The columns of a split, by row of its table."""

    def __init__(
        self, file: Path, columns: Sequence[ColumnInfo], rows: NDArray[np.void], vocab_size: int
    ) -> None:
        """vocab_size: number of different token ids of texts."""
        self.file, self.columns, self.rows = file, tuple(columns), rows
        self._vocab_size = vocab_size

    @classmethod
    def open(
        cls,
        folder: Path,
        columns: Sequence[ColumnInfo],
        info: ColumnsInfo,
        *,
        num_samples: int,
        vocab_size: int,
    ) -> ColumnTable:
        """Map the file into memory.

        Raises FileNotFoundError, or ValueError where it does not have the size of its samples.
        """
        file, dtype = folder / info.file, rows_dtype(columns)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected the columns of a split, got none")
        expected, size = num_samples * dtype.itemsize, file.stat().st_size
        if not size == info.num_bytes == expected:
            raise ValueError(
                f"{file}: expected {expected} bytes of {num_samples} samples (manifest: "
                f"{info.num_bytes}), got {size}"
            )
        return cls(file, columns, np.memmap(file, dtype, "r"), vocab_size)

    def fault(self, numbers: NDArray[np.int64]) -> str | None:  # [N]
        """Return what is wrong with rows, the file and the first one named; None: nothing."""
        found = rows_fault(
            self.columns, np.asarray(self.rows)[numbers], numbers, vocab_size=self._vocab_size
        )
        return None if found is None else f"{self.file}: {found}"

    def at(self, numbers: NDArray[np.int64]) -> Values:  # [N]
        """Return the values of samples, by the numbers of their rows; copies.

        Raises ValueError for a value that the column does not have.
        """
        if (fault := self.fault(numbers)) is not None:
            raise ValueError(f"{fault}; see all that is wrong by: m3i-fast data verify")
        rows = np.asarray(self.rows)[numbers]
        return {column.name: as_values(column, rows[column.name]) for column in self.columns}


def as_values(column: ColumnInfo, stored: NDArray[Any]) -> NDArray[Any]:
    """Return stored values as a batch has them: classes and labels as int64."""
    dtype = {"numbers": np.float32, "text": np.int32, "regions": np.int32}
    return np.ascontiguousarray(stored, dtype=dtype.get(column.kind, np.int64))


def missing_values(column: ColumnInfo, count: int) -> NDArray[Any]:  # [N, ...]
    """Return the values of samples of a data set that does not have the column."""
    shape = count, *column.dtype.shape
    return as_values(column, np.full(shape, column.missing, column.dtype.base))


# ---- Several data sets ---------------------------------------------------------------------------


def joined(first: ColumnInfo, second: ColumnInfo) -> ColumnInfo:
    """Return the column that holds both: names in the order in which they are first named.

    Raises ValueError for columns of two kinds, or other numbers.
    """
    if first.kind != second.kind:
        raise ValueError(
            f"column {first.name}: expected {first.kind} as an earlier data set has it, got "
            f"{second.kind}"
        )
    if first.kind == "numbers" and first.names != second.names:
        raise ValueError(
            f"column {first.name}: expected the numbers {', '.join(first.names)} as an earlier "
            f"data set has them, got {', '.join(second.names)}"
        )
    names = tuple(dict.fromkeys(first.names + second.names))
    return replace(first, names=names, size=max(first.size, second.size))


def places_in(own: ColumnInfo, whole: ColumnInfo) -> NDArray[np.int64]:  # [names of own]
    """Return the index of each name of a data set's column in the column joined of several."""
    index = {name: place for place, name in enumerate(whole.names)}
    return np.array([index[name] for name in own.names], np.int64)


def moved(
    own: ColumnInfo, whole: ColumnInfo, values: NDArray[Any], places: NDArray[np.int64]
) -> NDArray[Any]:
    """Return values of a data set's column as those of the joined one; places: `places_in`."""
    if own.kind in ("class", "labels"):
        values = np.where(values < 0, values, places[values])  # below 0: what marks missing ones
    room = whole.size - own.size
    if values.ndim > 1 and room:
        last = np.where(values[:, :1] == whole.missing, whole.missing, NONE)
        values = np.concatenate([values, last.repeat(room, 1)], axis=1)
    return values


def pooled(
    column: ColumnInfo, of_splits: Sequence[ColumnsInfo]
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # [K], [K]
    """Return mean and standard deviation of a column's numbers over splits, each by its count."""
    found = [info for info in of_splits if info.num_known.get(column.name)]
    if len(found) == 1:
        return found[0].mean[column.name], found[0].std[column.name]
    if not found:
        return (0.0,) * column.size, (1.0,) * column.size
    weight, means, stds = (
        np.array([getattr(info, key)[column.name] for info in found], np.float64)
        for key in ("count", "mean", "std")
    )
    total = np.maximum(weight.sum(0), 1)
    mean = (weight * means).sum(0) / total
    # a split whose numbers are all the same has a deviation of 1 in the place of 0
    variance = (weight * (stds**2 + (means - mean) ** 2)).sum(0) / total
    return tuple(mean.tolist()), tuple(np.where(variance > 0, np.sqrt(variance), 1.0).tolist())
