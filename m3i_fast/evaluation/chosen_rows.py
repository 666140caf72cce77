"""Chooses pictures of a split that are evaluated or shown, from all over it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch_rows import good_rows
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.opened.open_data import open_data
from m3i_fast.pipelines.storage.remote import shards_url


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Pictures of a split: rows of its table, alike on all ranks."""

    cfg: LoaderConfig
    rows: NDArray[np.int64]  # [N]
    label: NDArray[np.int64]  # [N], -1: none
    classes_of_split: int
    """Number of classes among all pictures that they were chosen from."""

    @property
    def classes(self) -> NDArray[np.int64]:  # [classes]
        """Return the classes of the chosen pictures, each once."""
        return np.unique(self.label[self.label >= 0])

    def of_rank(self, rank: int, num_ranks: int, batch_size: int) -> NDArray[np.int64]:  # [share]
        """Return a rank's share in whole batches: rows are repeated at the end to fill the last.

        With sharded weights every rank has to make as many forward passes, and a compiled model is
        compiled anew for a batch of another size.
        """
        share = -(-len(self.rows) // (num_ranks * batch_size)) * batch_size
        return self.rows[np.arange(rank, share * num_ranks, num_ranks) % len(self.rows)]


def choose_rows(
    cfg: LoaderConfig, most: int, *, labelled: bool = False, representatives_only: bool = True
) -> ChosenRows:
    """Choose at most so many pictures of a split, those that the table does not mark as bad.

    labelled: only those with a class. representatives_only: one a group.
    They are at even steps of the table, since tars of others may be in the order of their classes;
    of a bucket the first ones, since a picture is fetched with its neighbours. Raises as
    `open_data`.
    """
    opened = open_data(replace(cfg, lanes=1))  # as `evaluation_batches` reads a bucket
    try:
        table = opened.table
        assert isinstance(table, SampleTable)  # one data set
        good = good_rows(table, representatives_only=representatives_only)
        label = table.at(good)["label"]
        if labelled:
            good, label = good[label >= 0], label[label >= 0]
        classes_of_split = len(np.unique(label[label >= 0]))
        if len(good) > most:
            is_remote = shards_url(cfg.path) is not None
            even = np.linspace(0, len(good) - 1, most).round().astype(np.int64)
            taken = np.arange(most) if is_remote else even
            good, label = good[taken], label[taken]
        return ChosenRows(cfg, good, label.astype(np.int64), classes_of_split)
    finally:
        opened.shards.close()
