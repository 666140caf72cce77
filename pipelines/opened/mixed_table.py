"""The table and the shards of a mixture: those of its data sets, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.columns import Values, missing_values, moved
from m3i_fast.pipelines.dataset.sample_table import ROW, Rows, SampleTable
from m3i_fast.pipelines.opened.mixture import MixedData
from m3i_fast.pipelines.storage.shards import BucketReads, Shards

NO_CLASS = -2  # of a label that its data set has no class for: refused as what it is


@dataclass(frozen=True, slots=True)
class MixedTable:
    """The rows of all data sets, with labels and ids as those of one."""

    mixed: MixedData
    tables: tuple[SampleTable, ...]

    @property
    def has_bad(self) -> bool:
        """Return whether any row may be marked as bad."""
        return any(table.has_bad for table in self.tables)

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def at(self, numbers: NDArray[np.int64]) -> Rows:  # [N] -> [N]
        """Return rows by their number."""
        datasets, own = self.mixed.split_rows(numbers)
        rows = np.zeros(len(numbers), ROW)
        for d, table in enumerate(self.tables):
            rows[datasets == d] = table.at(own[datasets == d])
        num_classes = np.array([len(m.class_names) for m in self.mixed.manifests])[datasets]
        label = rows["label"].astype(np.int64)
        wrong = (label < -1) | (label >= num_classes)
        mapped = self.mixed.labels(datasets, np.where(wrong, -1, label))
        rows["label"] = np.where(wrong, NO_CLASS, mapped)
        for name in ("sample_id", "group_id"):
            rows[name] = self.mixed.ids(datasets, rows[name].astype(np.int64))
        return rows

    def columns_at(self, numbers: NDArray[np.int64]) -> Values:  # [N]
        """Return the values of each column; missing where a data set does not have it."""
        datasets, own = self.mixed.split_rows(numbers)
        values = {c.name: missing_values(c, len(numbers)) for c in self.mixed.columns}
        for d, (table, own_columns) in enumerate(
            zip(self.tables, self.mixed.column_places, strict=True)
        ):
            there = datasets == d
            found = table.columns_at(own[there]) if own_columns and there.any() else {}
            for column in self.mixed.columns:
                if column.name in found:
                    theirs, places = own_columns[column.name]
                    of_set = moved(theirs, column, found[column.name], places)
                    values[column.name][there] = of_set
        return values

    def same_set(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [N] -> [N], [N]
        """Return the first row of each row's data set, and how many rows that has."""
        datasets, own = self.mixed.split_rows(numbers)
        return numbers - own, np.array(self.mixed.sizes, np.int64)[datasets]


class MixedShards:
    """The shards of all data sets, in folders or in object storage."""

    def __init__(self, table: MixedTable, shards: Sequence[Shards]) -> None:
        self._table, self._shards = table, shards

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Announce samples that will be located, in the order of their turn: [N] rows."""
        datasets, own = self._table.mixed.split_rows(samples)
        for d, shards in enumerate(self._shards):
            shards.expect(own[datasets == d])

    def expect_no_more(self) -> None:
        """Forget what was announced, since a run goes on elsewhere."""
        for shards in self._shards:
            shards.expect_no_more()

    def reads(self) -> BucketReads | None:
        """Return what was read so far from object storage, of all data sets together."""
        each = [reads for shards in self._shards if (reads := shards.reads()) is not None]
        return sum(each, BucketReads()) if each else None

    def close(self) -> None:
        """Stop what fetches, and give back what is held, of all though one raises."""
        with ExitStack() as closing:  # they share their threads, which the first one stops
            for shards in self._shards:
                closing.callback(shards.close)

    def locate(self, _: object, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return the file and the offset in it of each sample.

        Every data set is asked, since those in object storage count the batches that pass.
        """
        datasets, own = self._table.mixed.split_rows(samples)
        found: list[tuple[str, int]] = [("", 0)] * len(samples)
        for d, shards in enumerate(self._shards):
            where = np.flatnonzero(datasets == d)
            places = shards.locate(self._table.tables[d], own[where])
            for index, place in zip(where.tolist(), places, strict=True):
                found[index] = place
        return found
