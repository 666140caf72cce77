"""Uncertainty of published figures: intervals of differences, Holm's correction, spread.

Legend: S seeds, N items, K clusters of items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from m3i_fast.evaluation.student_t import student_quantile, student_tail

Floats = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "no difference found"]
Key = TypeVar("Key")
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference of figures, ours minus theirs, with its 95 % interval."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided p-value of no difference, which `holm` corrects for a family of comparisons."""

    @property
    def verdict(self) -> Verdict:
        """Return better or worse where the p-value is below 0.05, else no difference found."""
        if self.p_value >= 1 - CONFIDENCE:
            return "no difference found"
        return "better" if self.difference > 0 else "worse"

    def scaled(self, factor: float) -> Interval:
        """Return the interval in another unit."""
        ends = (factor * self.low, factor * self.high)
        return Interval(factor * self.difference, *ends, self.p_value)


@dataclass(frozen=True, slots=True)
class VarianceComponents:
    """Components of the variance of a mean difference; of one seed `seeds` and `both` are 0."""

    seeds: float
    """Variance of the S means over items: what another set of seeds would change."""
    items: float
    """Variance of the N means over seeds: what another set of items would change."""
    both: float
    """Variance of the residual, which `seeds` and `items` each contain once."""
    df: float
    """Degrees of freedom of `total`, by Satterthwaite."""

    @property
    def total(self) -> float:
        """Return the variance of the mean difference."""
        return max(self.seeds + self.items - self.both, self.items)


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean over repetitions, and their sample standard deviation (0 for a single one)."""

    mean: float
    std: float
    lowest: float
    highest: float
    num_runs: int


# ---- Intervals -----------------------------------------------------------------------------------


def hits_interval(
    ours: Any,  # [N] or [S, N] hits in 0..1 (array, tensor or sequence)
    theirs: Any,  # of the same seeds and items, in the same order
    cluster: Any = None,  # [N] int64; None: every item is one
) -> Interval:
    """Return the interval of mean(ours) - mean(theirs) of hits, by `variance_components`.

    Two items are added for the width of the interval, one that only ours gets right and one that
    only theirs does (Agresti and Min 2005 add as many). Without them hits that are all equal would
    have no variance, and 4 hits against 0 would be a difference. Raises ValueError when the two are
    empty, of different shapes or outside 0..1.
    """
    first, second = _sides(ours, theirs)
    _expect_hits(ours=first, theirs=second)
    delta = first - second
    added = np.broadcast_to([1.0, -1.0], (len(delta), 2))
    labels = _labels(cluster, delta.shape[1])
    labels = np.append(labels, [labels.max() + 1, labels.max() + 2])
    return _interval(float(delta.mean()), np.concatenate([delta, added], 1), labels)


def mean_interval(
    hits: Any,  # [N] hits in 0..1 (array, tensor or sequence)
    cluster: Any = None,  # [N] int64; None: every item is one
) -> tuple[float, float]:
    """Return the 95 % interval of mean(hits), cut to 0..1, by `variance_components`.

    Two hits and two misses are added to the items (Agresti and Coull 1998), without which hits that
    are all equal would have no variance. Raises ValueError as `hits_interval`.
    """
    first, _ = _sides(hits, hits)
    _expect_hits(hits=first)
    labels = _labels(cluster, first.shape[1])
    labels = np.append(labels, labels.max() + 1 + np.arange(4))
    added = np.broadcast_to([1.0, 1.0, 0.0, 0.0], (len(first), 4))
    found = _interval(float(first.mean()), np.concatenate([first, added], 1), labels)
    return max(found.low, 0.0), min(found.high, 1.0)


def values_interval(
    ours: Any,  # [N] or [S, N]
    theirs: Any,  # of the same seeds and items, in the same order
    cluster: Any = None,  # [N] int64; None: every item is one
) -> Interval:
    """Return the interval of mean(ours) - mean(theirs) of unbounded values.

    It is that of `variance_components`. Raises ValueError when the two are not finite, of different
    shapes or of less than two clusters.
    """
    first, second = _sides(ours, theirs)
    delta = first - second
    return _interval(float(delta.mean()), delta, _labels(cluster, delta.shape[1]))


def figure_interval(
    ours: Any,  # [N, ...], one an item
    theirs: Any,  # [N, ...] of the same items, in the same order
    figure: Callable[[Floats], Floats],
    cluster: Any = None,  # [N] int64; None: every item is one
) -> Interval:
    """Return the interval of figure(sum of ours) - figure(sum of theirs), such as ratios of counts.

    `figure` maps sums over items [R, ...] to values [R], for any number of items. An item
    contributes its pseudo-value (Tukey's jackknife), N times the figure minus N - 1 times that of
    all other items; their mean is shifted to the difference itself. Raises ValueError as
    `values_interval` does.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (ours, theirs)]
    _expect_alike(sides)
    num = len(sides[0])
    whole = [float(figure(side.sum(0, keepdims=True))[0]) for side in sides]
    others = [figure(side.sum(0) - side) for side in sides]
    difference, pseudo = whole[0] - whole[1], (1 - num) * (others[0] - others[1])
    delta = (pseudo - pseudo.mean() + difference)[None]
    return _interval(difference, delta, _labels(cluster, num))


def variance_components(
    delta: Floats,  # [S, N], ours minus theirs
    labels: npt.NDArray[np.int64],  # [N], the cluster of each item
) -> VarianceComponents:
    """Estimate the variance of the mean of differences that share seeds and items.

    A difference is modelled as mean + seed + item + residual, all drawn at random: seeds are
    independent repetitions, the same for both sides and all items, and items are independent
    between clusters. The variance is that of two-way clustering (Cameron, Gelbach and Miller 2011):
    over the seeds' means, plus over the clusters' sums, minus over both at once, which the other
    two contain. Each is unbiased for independent residuals; with clusters of different sizes K is
    N^2 / sum n_k^2. Satterthwaite's degrees of freedom say how well it is known. Of one seed there
    is the items' component alone, which does not cover other seeds. With three seeds the seeds'
    component has two degrees of freedom and is coarse.

    A bootstrap over seeds and items was measured too: with three seeds its 95 % interval covered 77
    % where seeds make most of the variance and 99.5 % where they make none, since it sees no spread
    beyond the three, and counts the residual three times.
    """
    num_seeds, num_items = delta.shape
    sizes = np.bincount(labels)
    num_clusters = num_items**2 / float((sizes.astype(np.float64) ** 2).sum())
    if num_clusters <= 1:
        raise ValueError("items: expected at least two clusters, got one")

    def of_clusters(rows: Floats) -> float:  # [R, N] -> sum over rows of the variance of their mean
        sums = np.stack([np.bincount(labels, row) for row in rows])
        return float((sums**2).sum()) / num_items**2 * num_clusters / (num_clusters - 1)

    mean = delta.mean()
    by_seed, by_item = delta.mean(1, keepdims=True) - mean, delta.mean(0, keepdims=True) - mean
    items, seeds, both, df_seeds = of_clusters(by_item), 0.0, 0.0, math.inf
    if num_seeds > 1:
        df_seeds = num_seeds - 1
        seeds = float((by_seed**2).sum()) / num_seeds / df_seeds
        both = of_clusters(delta - mean - by_seed - by_item) / num_seeds / df_seeds
    df_items = num_clusters - 1
    of_estimate = seeds**2 / df_seeds + items**2 / df_items + both**2 / df_seeds / df_items
    total = VarianceComponents(seeds, items, both, math.inf).total
    df = total**2 / of_estimate if of_estimate > 0 else math.inf
    return VarianceComponents(seeds, items, both, max(df, min(df_seeds, df_items), 1.0))


def holm(family: Mapping[Key, Interval]) -> dict[Key, Interval]:
    """Correct the p-values of comparisons that are read together (Holm 1979).

    The probability that any of them is called a difference where there is none is then at most 5 %,
    however they depend on each other. The intervals stay uncorrected.
    """
    largest, corrected = 0.0, {}
    for place, key in enumerate(sorted(family, key=lambda key: family[key].p_value)):
        largest = max(largest, min((len(family) - place) * family[key].p_value, 1.0))
        corrected[key] = replace(family[key], p_value=largest)
    return {key: corrected[key] for key in family}


def spread(values: Sequence[float]) -> Spread:
    """Return mean, sample standard deviation and range over repetitions; ValueError when empty."""
    if len(values) == 0:
        raise ValueError("values: expected at least one run, got none")
    runs = np.asarray(values, dtype=np.float64)
    std = float(runs.std(ddof=1)) if len(runs) > 1 else 0.0
    return Spread(float(runs.mean()), std, float(runs.min()), float(runs.max()), len(runs))


# ---- Helpers -------------------------------------------------------------------------------------


def _interval(difference: float, delta: Floats, labels: npt.NDArray[np.int64]) -> Interval:
    components = variance_components(delta, labels)
    centre, error = float(delta.mean()), math.sqrt(components.total)
    if error == 0:
        return Interval(difference, centre, centre, float(centre == 0))
    df = min(components.df, 1e4)  # beyond it the distribution is normal
    half = error * student_quantile((1 - CONFIDENCE) / 2, df)
    p_value = min(2 * student_tail(abs(centre) / error, df), 1.0)
    return Interval(difference, centre - half, centre + half, p_value)


def _sides(ours: Any, theirs: Any) -> tuple[Floats, Floats]:  # [S, N] each
    sides = [np.atleast_1d(np.asarray(side, dtype=np.float64)) for side in (ours, theirs)]
    _expect_alike(sides)
    if sides[0].ndim > 2:
        raise ValueError(f"ours: expected [N] or [seeds, N], got {sides[0].shape}")
    first, second = (np.atleast_2d(side) for side in sides)
    return first, second


def _expect_hits(**sides: Floats) -> None:
    for name, side in sides.items():
        if not bool(((side >= 0) & (side <= 1)).all()):
            raise ValueError(f"{name}: expected hits in 0..1, got {side.min():g} to {side.max():g}")


def _expect_alike(sides: Sequence[Floats]) -> None:
    for name, side in zip(("ours", "theirs"), sides, strict=True):
        if side.shape != sides[0].shape or side.size == 0:
            raise ValueError(
                f"{name}: expected {sides[0].shape}, at least one item, got {side.shape}"
            )
        if not bool(np.isfinite(side).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _labels(cluster: Any, num_items: int) -> npt.NDArray[np.int64]:  # [N], 0 to K - 1
    if cluster is None:
        return np.arange(num_items)
    labels = np.unique(np.asarray(cluster), return_inverse=True)[1].reshape(-1)
    if len(labels) != num_items:
        raise ValueError(f"cluster: expected {num_items}, one an item, got {len(labels)}")
    return labels
