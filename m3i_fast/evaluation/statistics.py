"""Uncertainty of the figures we publish: paired bootstrap of a difference, spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Verdict = Literal["better", "worse", "no difference found"]
_RESAMPLES_A_CHUNK = 1000  # bounds the [chunk, N] indices, not the result


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference of means, ours minus theirs, with its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Better or worse only where the interval leaves out zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference found"


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean over repetitions and their sample standard deviation (0 for a single one)."""

    mean: float
    std: float
    lowest: float
    highest: float
    num_runs: int


def paired_bootstrap(
    ours: Any,  # [N] numbers (array, tensor or sequence), one an item
    theirs: Any,  # [N] the same items, in the same order
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of mean(ours) - mean(theirs), resampling items.

    Pairing takes out the items' own difficulty, which both sides share. The same numbers and seed
    give the same interval. Raises ValueError when the two are empty or of different lengths.
    """
    delta = np.asarray(ours, dtype=np.float64) - _matching(ours, theirs)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            delta[rng.integers(0, len(delta), (count, len(delta)))].mean(1)
            for count in _chunks(num_resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(delta.mean()), float(low), float(high))


def difference_intervals(
    hits: Mapping[str, Mapping[str, Any]],  # measure -> source -> [N] numbers, one an item
    *,
    ours: str = "trained",
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Interval of `ours` minus each other source of a measure: {measure: {source: interval}}."""
    return {
        measure: {
            source: paired_bootstrap(sources[ours], values, seed=seed)
            for source, values in sources.items()
            if source != ours
        }
        for measure, sources in hits.items()
    }


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and range over repetitions. Raises ValueError when empty."""
    if len(values) == 0:
        raise ValueError("values: expected at least one run, got none")
    runs = np.asarray(values, dtype=np.float64)
    std = float(runs.std(ddof=1)) if len(runs) > 1 else 0.0
    return Spread(float(runs.mean()), std, float(runs.min()), float(runs.max()), len(runs))


def _matching(ours: Any, theirs: Any) -> np.ndarray:  # [N] fp64
    left, right = np.shape(ours), np.shape(theirs)
    if left != right or len(left) != 1 or left[0] == 0:
        raise ValueError(f"theirs: expected one number for each of ours, got {right} for {left}")
    return np.asarray(theirs, dtype=np.float64)


def _chunks(total: int) -> list[int]:
    whole, rest = divmod(total, _RESAMPLES_A_CHUNK)
    return [_RESAMPLES_A_CHUNK] * whole + [rest] * (rest > 0)
