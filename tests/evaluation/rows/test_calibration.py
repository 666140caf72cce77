"""The calibration error is that of scikit-learn's calibration curve, weighed by the bins' rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from m3i_fast.evaluation.rows.calibration import accuracy_by_class, calibrate

RANDOM = np.random.default_rng(2)
CONFIDENCE = RANDOM.beta(5, 2, 1000)
HIT = RANDOM.random(1000) < CONFIDENCE**2


@pytest.mark.parametrize("num_bins", [15, 4])
def test_the_error_is_that_of_the_calibration_curve(num_bins: int) -> None:
    found = calibrate(CONFIDENCE, HIT, num_bins=num_bins)
    accuracy, confidence = calibration_curve(HIT, CONFIDENCE, n_bins=num_bins, strategy="uniform")
    count, _ = np.histogram(CONFIDENCE, bins=num_bins, range=(0, 1))
    assert np.array_equal(found.count, count)
    filled = count > 0
    np.testing.assert_allclose(found.accuracy[filled], accuracy)
    np.testing.assert_allclose(found.confidence[filled], confidence)
    error = (count[filled] / 1000 * np.abs(accuracy - confidence)).sum()
    assert found.error == pytest.approx(error)
    assert found.error > 0.1


def test_a_confidence_between_two_bins_is_in_the_lower_one() -> None:
    edges = np.linspace(0, 1, 16)
    hit = np.arange(16) % 3 == 0
    found = calibrate(edges, hit)
    accuracy, confidence = calibration_curve(hit, edges, n_bins=15)
    assert found.count.tolist() == [2, *[1] * 14]  # 0 and 1 / 15, then each alone
    np.testing.assert_allclose(found.accuracy, accuracy)
    np.testing.assert_allclose(found.confidence, confidence)


def test_sure_and_right_is_calibrated_and_wrong_confidences_are_refused() -> None:
    assert calibrate(np.ones(5), np.ones(5, dtype=bool)).error == 0
    assert calibrate(np.ones(5), np.zeros(5, dtype=bool)).error == 1
    with pytest.raises(ValueError, match=r"expected values in 0\.\.1"):
        calibrate(np.array([0.5, 1.1]), np.ones(2, dtype=bool))
    with pytest.raises(ValueError, match="expected one a prediction, got 0 of 0"):
        calibrate(np.empty(0), np.empty(0, dtype=bool))


def test_accuracy_by_class_leaves_absent_classes_open() -> None:
    found = accuracy_by_class(np.array([1.0, 0, 1, 1]), np.array([0, 0, 2, 2]), 4)
    assert np.array_equal(found, [0.5, np.nan, 1, np.nan], equal_nan=True)
