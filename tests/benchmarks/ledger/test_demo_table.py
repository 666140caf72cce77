"""The table over seeds says what the rows say."""

from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger.demo_table import SUBJECT, table
from m3i_fast.benchmarks.ledger.rows import append_row


def _append(folder: Path, seed: int, trained: float, **more: Any) -> None:
    figures = {
        "seed": seed,
        "num_steps": 10 + seed,
        "train_images_per_s": 100.0,
        "held_out_concepts": 4,
        "knn_top1": {"trained": trained, "untrained": 0.5, "chance": 0.25},
        **more,
    }
    append_row(SUBJECT, figures, command="test", folder=folder)


def test_mean_and_range_of_the_newest_row_of_each_seed(tmp_path: Path) -> None:
    assert "no row" in table(tmp_path)
    for seed, trained in ((0, 0.99), (0, 0.6), (1, 0.7), (2, 0.8)):
        _append(tmp_path, seed, trained)
    text = table(tmp_path)
    assert "| measure | trained | untrained | chance |" in text.splitlines()  # what any row has
    assert "| kNN | 70.0 (60.0 to 80.0) | 50.0 | 25.0 |" in text.splitlines()
    assert "seeds [0, 1, 2], 4 held-out concepts, 10 to 12 steps, 100 images/s" in text
    assert "linear" not in text and "hard half" not in text


def test_rows_of_other_held_out_pictures_stay_apart(tmp_path: Path) -> None:
    _append(tmp_path, 0, 0.99)
    of = {"split_digest": "0123abcd", "knn_top1_hard": {"trained": 0.25, "pixels": 0.125}}
    for seed in (1, 2):
        _append(tmp_path, seed, 0.5, **of)
    lines = table(tmp_path).splitlines()
    assert lines[0].startswith("seeds [1, 2], ")
    assert "| kNN | 50.0 | 50.0 | - | 25.0 |" in lines
    assert "| kNN, hard half | 25.0 | - | 12.5 | - |" in lines
