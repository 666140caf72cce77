"""The search by blocks votes as scikit-learn's classifier does with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from m3i_fast.evaluation.feature_rows import FileRows
from m3i_fast.evaluation.rows import neighbours
from m3i_fast.evaluation.rows.neighbours import classify_by_neighbours

RANDOM = np.random.default_rng(3)
LABEL = RANDOM.integers(0, 7, 500)
BANK = (RANDOM.normal(size=(500, 16)) + np.eye(16)[LABEL]).astype(np.float32)
QUERIES = (RANDOM.normal(size=(130, 16)) + np.eye(16)[RANDOM.integers(0, 7, 130)]).astype("f4")
LABELLED, ASKED = np.flatnonzero(RANDOM.random(500) < 0.8), np.arange(0, 130, 2)


def oracle(k: int, temperature: float = 0.07) -> np.ndarray:
    classifier = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / temperature),
    )
    classifier.fit(BANK[LABELLED], LABEL[LABELLED])
    predicted: np.ndarray = classifier.predict(QUERIES[ASKED])
    return predicted


@pytest.mark.parametrize("blocks", [(2048, 8192), (7, 33)])
def test_predictions_are_those_of_scikit_learn(
    blocks: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", blocks[0])
    monkeypatch.setattr(neighbours, "BANK_BLOCK", blocks[1])
    np.save(tmp_path / "bank.npy", BANK)
    for bank in (BANK, FileRows(tmp_path / "bank.npy")):
        predicted = classify_by_neighbours(
            bank, LABELLED, LABEL[LABELLED], QUERIES, ASKED, ks=(1, 10, 20, 100)
        )
        for k, row in zip((1, 10, 20, 100), predicted, strict=True):
            assert np.array_equal(row, oracle(k)), k
    unweighted = KNeighborsClassifier(100, metric="cosine", algorithm="brute")
    unweighted.fit(BANK[LABELLED], LABEL[LABELLED])
    assert not np.array_equal(predicted[3], unweighted.predict(QUERIES[ASKED]))


def test_a_k_beyond_the_bank_is_refused() -> None:
    rows = np.arange(5)
    with pytest.raises(ValueError, match=r"k: expected values in 1\.\.5, got \[6\]"):
        classify_by_neighbours(BANK, rows, LABEL[:5], QUERIES, rows, ks=(6,))
    with pytest.raises(ValueError, match="temperature: expected > 0, got 0"):
        classify_by_neighbours(BANK, rows, LABEL[:5], QUERIES, rows, ks=(2,), temperature=0)
