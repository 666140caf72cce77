"""Pictures of a split are chosen from all over it, and shared among ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from m3i_fast.config.data import LoaderConfig
from m3i_fast.evaluation.chosen_rows import choose_rows
from m3i_fast.pipelines.opened.open_data import open_data


def test_shares_of_ranks_are_as_long_and_cover_all_rows(dataset: Path) -> None:
    chosen = choose_rows(LoaderConfig(path=dataset, batch_size=4), 13)
    for batch_size, length in ((1, 4), (2, 4), (3, 6)):
        shares = [chosen.of_rank(rank, 4, batch_size) for rank in range(4)]
        assert {len(share) for share in shares} == {length}
        assert set(np.concatenate(shares)) == set(chosen.rows) and len(chosen.rows) == 13


def test_chosen_rows_are_labelled_and_spread_over_the_split(dataset: Path) -> None:
    cfg = LoaderConfig(path=dataset, batch_size=4)
    table = open_data(cfg).table
    chosen = choose_rows(cfg, 10, labelled=True)
    rows = table.at(chosen.rows)
    assert (rows["label"] >= 0).all() and (rows["sample_id"] == rows["group_id"]).all()
    assert len(chosen.label) == len(chosen.rows) == 10
    assert chosen.label.tolist() == rows["label"].tolist()
    every = np.asarray(table.rows)
    good = np.flatnonzero((every["label"] >= 0) & (every["sample_id"] == every["group_id"]))
    assert (chosen.rows[0], chosen.rows[-1]) == (good[0], good[-1])
