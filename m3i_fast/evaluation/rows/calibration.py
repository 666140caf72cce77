"""Whether probabilities are those of being right: the expected calibration error.

Legend: N predictions, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3i_fast.evaluation.feature_rows import Index

NUM_BINS = 15
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence and accuracy by bin of confidence."""

    error: float
    """sum over bins of (rows of the bin / N) * |accuracy - mean confidence|, in 0..1."""
    count: Index  # [B]
    confidence: Floats  # [B] mean of the bin, 0 where it is empty
    accuracy: Floats  # [B]


def calibrate(
    confidence: Floats,  # [N] in 0..1, of the predicted class
    hit: NDArray[np.bool_],  # [N] whether it is right
    *,
    num_bins: int = NUM_BINS,
) -> Calibration:
    """Compute the calibration error of Guo et al. (arXiv 1706.04599, equation 3).

    Bins are of equal width, and bin b holds the confidences in (b / B, (b + 1) / B]. Raises
    ValueError without predictions, or with a confidence outside 0..1.
    """
    if len(confidence) == 0 or len(confidence) != len(hit):
        raise ValueError(
            f"confidence: expected one a prediction, got {len(confidence)} of {len(hit)}"
        )
    if not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("confidence: expected values in 0..1, got others")
    place = np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence)
    count = np.bincount(place, minlength=num_bins)
    filled = np.maximum(count, 1)
    mean = np.bincount(place, confidence, minlength=num_bins) / filled
    accuracy = np.bincount(place, hit.astype(np.float64), minlength=num_bins) / filled
    error = float((count / len(hit) * np.abs(accuracy - mean)).sum())
    return Calibration(error, count, mean, accuracy)


def accuracy_by_class(
    hit: NDArray[np.bool_] | Floats,  # [N] hits in 0..1
    label: Index,  # [N]
    num_classes: int,
) -> Floats:  # [num_classes], NaN for a class without rows
    """Return the mean of the hits of each class."""
    count = np.bincount(label, minlength=num_classes)
    sums = np.bincount(label, np.asarray(hit, dtype=np.float64), minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return sums / count
