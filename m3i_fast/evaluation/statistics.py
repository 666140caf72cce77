"""Uncertainty of the figures we publish: paired bootstrap of a difference, spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "no difference found"]
_RESAMPLES_A_CHUNK = 1000  # bounds the [chunk, N] indices, not the result


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference of figures, ours minus theirs, with its 95 % interval."""

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
    means = np.concatenate(
        [delta[drawn].mean(1) for drawn in _resamples(len(delta), num_resamples, seed)]
    )
    return _interval(float(observed.mean()), means, confidence)


def paired_bootstrap_of_sums(
    ours: Any,  # [N, ...] (array or tensor), one an item
    theirs: Any,  # [N, ...] of the same items, in the same order
    figure: Callable[[Floats], Floats],
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of figure(sum of ours) - figure(sum of theirs), over items.

    `figure` maps sums over N items [R, ...] to their values [R], such as a mean of values without
    bounds or a ratio of counts; no items are added. Raises ValueError when the two are empty, not
    finite or of different shapes.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (ours, theirs)]
    shape = sides[0].shape
    for name, side in zip(("ours", "theirs"), sides, strict=True):
        if side.shape != shape or side.size == 0:
            raise ValueError(f"{name}: expected {shape}, at least one item, got {side.shape}")
        if not bool(np.isfinite(side).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    differences = []
    for drawn in _resamples(shape[0], num_resamples, seed):
        cells = drawn + shape[0] * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=drawn.size).reshape(drawn.shape)  # [R, N]
        sums = [(times @ side.reshape(shape[0], -1)).reshape(-1, *shape[1:]) for side in sides]
        differences.append(figure(sums[0]) - figure(sums[1]))
    observed = [figure(side.sum(0, keepdims=True)) for side in sides]
    difference = float((observed[0] - observed[1])[0])
    return _interval(difference, np.concatenate(differences), confidence)


def difference_intervals(
    items: Mapping[str, Mapping[str, Any]],  # measure -> source -> [N, ...], one an item
    interval: Callable[[Any, Any], Interval] = paired_bootstrap,
    *,
    ours: str = "trained",
) -> dict[str, dict[str, Interval]]:
    """Interval of `ours` minus each other source of a measure: {measure: {source: interval}}."""
    return {
        measure: {
            source: interval(sources[ours], values)
            for source, values in sources.items()
            if source != ours
        }
        for measure, sources in items.items()
    }


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and range over repetitions. Raises ValueError when empty."""
    if len(values) == 0:
        raise ValueError("values: expected at least one run, got none")
    runs = np.asarray(values, dtype=np.float64)
    std = float(runs.std(ddof=1)) if len(runs) > 1 else 0.0
    return Spread(float(runs.mean()), std, float(runs.min()), float(runs.max()), len(runs))


def _hits(name: str, values: Any, like: tuple[int, ...] | None = None) -> Floats:  # [N]
    hits = np.asarray(values, dtype=np.float64)
    if hits.ndim != 1 or hits.size == 0 or hits.shape != (like or hits.shape):
        raise ValueError(f"{name}: expected {like or '[N]'}, one number an item, got {hits.shape}")
    if not bool(((hits >= 0) & (hits <= 1)).all()):
        raise ValueError(f"{name}: expected hits in 0..1, got {hits.min():g} to {hits.max():g}")
    return hits


def _resamples(
    num_items: int, num_resamples: int, seed: int
) -> Iterator[npt.NDArray[np.int64]]:  # chunks of [R, N] items drawn with replacement
    rng = np.random.default_rng(seed)
    for done in range(0, num_resamples, _RESAMPLES_A_CHUNK):
        count = min(_RESAMPLES_A_CHUNK, num_resamples - done)
        yield rng.integers(0, num_items, (count, num_items))


def _interval(difference: float, resampled: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(difference, float(low), float(high))
