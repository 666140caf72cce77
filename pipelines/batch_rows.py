"""The rows of a batch: which samples it takes, where their bytes lie, and what is drawn for them.

All of it is a function of positions in the run, computed some thousand positions at a time, so that
a batch costs the thread that schedules a backend next to nothing.
Legend: B samples of a batch, N positions, P bytes of the longest path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.keyed_draws import Purpose, words
from m3i_fast.pipelines.dataset.annotations.columns import Values
from m3i_fast.pipelines.dataset.sample_table import BAD, NO_CRC, Rows, SampleTable
from m3i_fast.pipelines.sample_order.positions import Integers, Layout, Order, shuffled
from m3i_fast.pipelines.storage.shards import Shards

# Columns of a row, as SampleRow in cuda/dali/sample_record.h.
COLUMNS = ("position", "sample_id", "offset", "size", "crc32c", "caption", "alternate")
_POSITIONS_AT_ONCE = 2**14
# Where each is looked up in the table: a row that was not read yet is a page of the file to fetch.
_LOOKED_UP_AT_ONCE = 2**10
_MOST_ATTEMPTS = 1000


class Table(Protocol):
    """The rows of a data set, or of several that are mixed."""

    @property
    def has_bad(self) -> bool:
        """Return whether any row may be marked as bad."""

    def __len__(self) -> int: ...

    def at(self, numbers: Integers, /) -> Rows:  # [N] -> [N]
        """Return rows by their number."""

    def columns_at(self, numbers: Integers, /) -> Values:  # [N]
        """Return the values of each named column of rows."""

    def same_set(self, numbers: Integers, /) -> tuple[Integers, Integers]:  # [N] -> [N], [N]
        """Return the first row of each row's data set, and how many rows that has."""


@dataclass(frozen=True, slots=True)
class BatchRows:
    """What a backend is told about the samples of a batch, and what is known of them already."""

    rows: Integers  # [B, 7], COLUMNS
    paths: NDArray[np.uint8]  # [B, P], padded with zeros
    samples: Integers  # [B] rows of the table
    label: Integers  # [B], -1: none
    group_id: Integers  # [B]
    columns: Values = field(default_factory=dict)  # [B, ...] each

    @property
    def positions(self) -> Integers:
        """Return the position of each sample in the run: [B]."""
        return self.rows[:, 0]

    @property
    def sample_id(self) -> Integers:
        """Return the id of each sample: [B]."""
        return self.rows[:, 1]

    def path(self, index: int) -> str:
        """Return the path of the file that a sample lies in."""
        return self.paths[index].tobytes().rstrip(b"\0").decode()


def rows_of(
    table: Table,
    shards: Shards,
    positions: Integers,  # [B]
    samples: Integers,  # [B]
    caption: Integers | None = None,  # [B], of 2**32
    alternate: Integers | None = None,
) -> BatchRows:
    """Return the rows of a batch; without draws they ask for first captions and alternates."""
    entries = table.at(samples)
    places = shards.locate(table, samples)
    rows = np.zeros((len(samples), len(COLUMNS)), np.int64)
    rows[:, 0], rows[:, 1] = positions, entries["sample_id"]
    rows[:, 2], rows[:, 3] = [offset for _, offset in places], entries["size"]
    rows[:, 4] = np.where(entries["flags"] & NO_CRC, -1, entries["crc32c"].astype(np.int64))
    if caption is not None:
        rows[:, 5] = caption
    if alternate is not None:
        rows[:, 6] = alternate
    paths = np.array([path.encode() for path, _ in places])
    return BatchRows(
        rows=rows,
        paths=paths.view(np.uint8).reshape(len(paths), -1),
        samples=samples,
        label=entries["label"].astype(np.int64),
        group_id=entries["group_id"].astype(np.int64),
        columns=table.columns_at(samples),
    )


class TrainingRows:
    """An endless iterator over the rows of one rank's batches, from a position of the run on."""

    def __init__(
        self,
        table: Table,
        shards: Shards,
        layout: Layout,
        *,
        rank: int,
        seed: int,
        start: int,
        first_batch: int = 0,
        skipped: frozenset[int] = frozenset(),
        order: Order | None = None,
        batches_ahead: int = 0,
    ) -> None:
        """start: samples that all ranks took before. first_batch: batches of this rank since then.

        skipped: rows of the table that are not to be taken, beside those that it marks as bad.
        order: gives the row of the table at each position; None: `positions.shuffled`.
        batches_ahead: batches that the shards are told of before their turn.
        """
        self._table, self._shards, self._layout = table, shards, layout
        self._rank, self._seed = rank, seed
        whole_steps, self._batch = divmod(first_batch, layout.accumulate)
        for _ in range(whole_steps):
            start = layout.next_start(start)
        self._start = start  # of the step of which batch number `_batch` is planned next
        self._order = order or partial(shuffled, size=len(table), seed=seed)
        self._skipped = np.array(sorted(skipped), np.int64)
        self._ahead = batches_ahead
        self._planned: deque[tuple[Integers, ...]] = deque()
        self._expected = 0  # of the planned batches, those that the shards know of
        shards.expect_no_more()

    def __iter__(self) -> TrainingRows:
        return self

    def __next__(self) -> BatchRows:
        while len(self._planned) <= self._ahead:
            self._planned.extend(self._plan())
        for i in range(self._expected, self._ahead + 1):
            self._shards.expect(self._planned[i][1])
        self._expected = self._ahead
        return rows_of(self._table, self._shards, *self._planned.popleft())

    def samples_at(self, positions: Integers) -> Integers:  # [N] -> [N]
        """Return the table's row of the sample at each position, replacements in their place.

        Raises ValueError where hardly any sample of the table can be used.
        """
        samples = self._order(positions)
        left = np.flatnonzero(self._is_unusable(samples))
        for attempt in range(1, _MOST_ATTEMPTS):
            if not len(left):
                return samples
            drawn = words(positions[left], attempt, seed=self._seed, purpose=Purpose.REPLACEMENT)
            first, size = self._table.same_set(samples[left])  # a mixture's shares stay
            samples[left] = first + (drawn[:, -1] % size.astype(np.uint64)).astype(np.int64)
            left = left[self._is_unusable(samples[left])]
        _, size = self._table.same_set(samples[left])
        raise ValueError(f"expected samples that can be used, got hardly any of {size[0]}")

    def _is_unusable(self, samples: Integers) -> NDArray[np.bool_]:
        unusable = np.isin(samples, self._skipped)
        if self._table.has_bad:
            unusable |= (self._table.at(samples)["flags"] & BAD) != 0
        return unusable

    def _plan(self) -> Iterator[tuple[Integers, ...]]:
        """Choose and draw for many batches at once: numpy is as slow on a few numbers."""
        layout = self._layout
        at_once = _LOOKED_UP_AT_ONCE if self._table.has_bad else _POSITIONS_AT_ONCE
        of_batches = []
        for _ in range(max(at_once // layout.most_samples, 1)):
            of_batches.append(layout.positions(self._start, self._rank, self._batch))
            self._batch += 1
            if self._batch == layout.accumulate:
                self._start, self._batch = layout.next_start(self._start), 0
        positions = np.concatenate(of_batches)
        draws = [
            (words(positions, 1, seed=self._seed, purpose=purpose)[:, 0] >> np.uint64(32)).astype(
                np.int64
            )
            for purpose in (Purpose.CAPTION, Purpose.ALTERNATE)
        ]
        columns = (positions, self.samples_at(positions), *draws)
        ends = np.cumsum([len(batch) for batch in of_batches])[:-1]
        yield from zip(*(np.split(column, ends) for column in columns), strict=True)


def good_rows(table: SampleTable, *, representatives_only: bool) -> Integers:  # [N]
    """Return the rows of samples that the table does not mark as bad, in its order.

    representatives_only: only samples after which their group is named.
    """
    taken = (table.rows["flags"] & BAD) == 0
    if representatives_only:
        taken &= table.rows["sample_id"] == table.rows["group_id"]
    return np.flatnonzero(taken)


def ordered_rows(
    table: SampleTable,
    shards: Shards,
    batch_size: int,
    *,
    representatives_only: bool,
    fetch_ahead: int,
    rows: Integers | None = None,
) -> Iterator[BatchRows]:
    """Yield the rows of one pass over `good_rows`, or over `rows` in their order.

    fetch_ahead: samples that the shards are told of before their turn.
    """
    good = good_rows(table, representatives_only=representatives_only) if rows is None else rows
    for start in range(0, len(good), batch_size):
        first = start + fetch_ahead if start else 0
        shards.expect(good[first : start + fetch_ahead + batch_size])
        samples = good[start : start + batch_size]
        yield rows_of(table, shards, samples, samples)
