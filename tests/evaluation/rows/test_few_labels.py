"""A share of the labels of each class, and the logistic regression that scikit-learn fits to it."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from m3i_fast.evaluation.rows.few_labels import (
    UNCHOSEN_L2,
    classify_with_few_labels,
    draw_share,
)

RANDOM = np.random.default_rng(5)
# Of class 3 there are four rows, of class 2 none.
LABEL = np.concatenate([np.repeat([0, 1, 4], 80), np.repeat([3], 4)])
MEANS = RANDOM.normal(size=(5, 12))
BANK = (RANDOM.normal(size=(244, 12)) + MEANS[LABEL]).astype(np.float32)
ASKED_LABEL = RANDOM.choice([0, 1, 3, 4], 90)
QUERIES = (RANDOM.normal(size=(90, 12)) + MEANS[ASKED_LABEL]).astype(np.float32)


def test_a_draw_has_the_share_of_each_class_and_at_least_one_row() -> None:
    drawn = draw_share(LABEL, 0.1, seed=0)
    assert dict(zip(*np.unique(LABEL[drawn], return_counts=True), strict=True)) == {
        0: 8,
        1: 8,
        3: 1,
        4: 8,
    }
    assert np.array_equal(drawn, draw_share(LABEL, 0.1, seed=0))
    assert not np.array_equal(drawn, draw_share(LABEL, 0.1, seed=1))
    assert np.array_equal(draw_share(LABEL, 1.0, seed=2), np.arange(len(LABEL)))
    with pytest.raises(ValueError, match=r"share: expected a number in \(0, 1\], got 0"):
        draw_share(LABEL, 0, seed=0)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_classifier_is_that_of_scikit_learn(share: float) -> None:
    rows = np.arange(len(LABEL))
    asked = np.arange(len(QUERIES))
    found = classify_with_few_labels(BANK, rows, LABEL, QUERIES, asked, share=share, seed=4)
    scaler = StandardScaler().fit(BANK[found.rows].astype(np.float64))
    oracle = LogisticRegression(C=1 / (len(found.rows) * found.l2), tol=1e-10, max_iter=10_000)
    oracle.fit(scaler.transform(BANK[found.rows].astype(np.float64)), LABEL[found.rows])
    probability = oracle.predict_proba(scaler.transform(QUERIES.astype(np.float64)))
    assert np.array_equal(found.predicted, oracle.classes_[probability.argmax(1)])
    np.testing.assert_allclose(found.confidence, probability.max(1), atol=1e-4)
    assert (found.predicted == ASKED_LABEL).mean() > 0.6


def test_the_strength_is_chosen_on_the_drawn_rows_alone() -> None:
    """Other rows and the queries may be anything: nothing of the fit changes."""
    rows, asked = np.arange(len(LABEL)), np.arange(len(QUERIES))
    found = classify_with_few_labels(BANK, rows, LABEL, QUERIES, asked, share=0.3, seed=0)
    others = BANK.copy()
    others[np.setdiff1d(rows, found.rows)] = 1e6
    again = classify_with_few_labels(others, rows, LABEL, QUERIES, asked[:10], share=0.3, seed=0)
    assert again.l2 == found.l2
    assert np.array_equal(again.predicted, found.predicted[:10])


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_does() -> None:
    asked = (BANK, np.arange(len(LABEL)), LABEL, QUERIES, np.arange(len(QUERIES)))
    cpu = classify_with_few_labels(*asked, share=0.5, seed=4)
    gpu = classify_with_few_labels(*asked, share=0.5, seed=4, device="cuda")
    assert gpu.l2 == cpu.l2 and np.array_equal(gpu.predicted, cpu.predicted)
    np.testing.assert_allclose(gpu.confidence, cpu.confidence, atol=1e-6)


def test_one_row_a_class_leaves_nothing_to_choose() -> None:
    rows, asked = np.arange(len(LABEL)), np.arange(len(QUERIES))
    found = classify_with_few_labels(BANK, rows, LABEL, QUERIES, asked, share=0.01, seed=0)
    assert (len(found.rows), found.l2) == (4, UNCHOSEN_L2)
    assert set(found.predicted) <= {0, 1, 3, 4}
