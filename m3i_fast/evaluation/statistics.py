"""Uncertainty of the figures we publish: paired bootstrap of a difference, spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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
    ours: Any,  # [N] hits in 0..1 (array, tensor or sequence), one an item
    theirs: Any,  # [N] of the same items, in the same order
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of mean(ours) - mean(theirs), resampling items.

    Pairing takes out the items' own difficulty, which both sides share. Two items are added before
    resampling, one that only ours gets and one that only theirs gets (Agresti and Min 2005 add as
    many): a plain bootstrap of hits that are all alike is certain of what it has not seen, and
    calls 4 hits against 0 a difference. The same hits and seed give the same interval. Average
    repetitions of an item first: they are no further items. Raises ValueError when the two are
    empty, of different lengths or outside 0..1.
    """
    observed = _hits("ours", ours) - _hits("theirs", theirs, like=np.shape(ours))
    delta = np.append(observed, [1.0, -1.0])
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            delta[rng.integers(0, len(delta), (count, len(delta)))].mean(1)
            for count in _chunks(num_resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(observed.mean()), float(low), float(high))


def difference_intervals(
    hits: Mapping[str, Mapping[str, Any]],  # measure -> source -> [N] hits, one an item
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


def _hits(
    name: str, values: Any, like: tuple[int, ...] | None = None
) -> npt.NDArray[np.float64]:  # [N]
    hits = np.asarray(values, dtype=np.float64)
    if hits.ndim != 1 or hits.size == 0 or hits.shape != (like or hits.shape):
        raise ValueError(f"{name}: expected {like or '[N]'}, one number an item, got {hits.shape}")
    if not bool(((hits >= 0) & (hits <= 1)).all()):
        raise ValueError(f"{name}: expected hits in 0..1, got {hits.min():g} to {hits.max():g}")
    return hits


def _chunks(total: int) -> list[int]:
    whole, rest = divmod(total, _RESAMPLES_A_CHUNK)
    return [_RESAMPLES_A_CHUNK] * whole + [rest] * (rest > 0)
