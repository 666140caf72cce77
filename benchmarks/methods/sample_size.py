"""How many seeds and held-out clusters a difference needs, worked out from a pilot's rows.

A difference of two methods, item by item, is mean + seed + cluster + rest, of which seed (one
initialisation and order, the same for both) and cluster (items that are alike) are drawn anew in
another experiment. Their variances are estimated by the method of moments of a crossed design
(Searle, Casella and McCulloch 1992); an experiment of other sizes then has a standard error of

    sqrt(var_seed / S + var_cluster / C + var_rest / (S C)).

Power is that of the t test of the mean with Satterthwaite's degrees of freedom, two-sided, which
must estimate its own variance. Of three seeds var_seed has two degrees of freedom and is coarse:
plan by the mean over comparisons.
Legend: S seeds, I items, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from m3i_fast.evaluation.student_t import student_quantile

Floats = npt.NDArray[np.float64]

ALPHA, POWER = 0.05, 0.8
MOST_SEEDS, MOST_CLUSTERS = 1000, 1_000_000  # beyond these a design is none
NUM_NODES = 24  # for each of the two mean squares that power is integrated over


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The mean of a difference and the variances it is made of, as estimated: below 0, too."""

    mean: float
    seed: float
    cluster: float
    rest: float
    """Of a seed with a cluster."""

    def _mean_squares(self, num_seeds: int, num_clusters: int) -> tuple[float, float, float]:
        """Expect them over seeds, over clusters and of the rest; a variance below 0 is none."""
        rest = max(self.rest, 0.0)
        by_seed = rest + num_clusters * max(self.seed, 0.0)
        return by_seed, rest + num_seeds * max(self.cluster, 0.0), rest

    def standard_error(self, num_seeds: int, num_clusters: int) -> float:
        by_seed, by_cluster, rest = self._mean_squares(num_seeds, num_clusters)
        return math.sqrt((by_seed + by_cluster - rest) / (num_seeds * num_clusters))

    def power(
        self, difference: float, num_seeds: int, num_clusters: int, *, alpha: float = ALPHA
    ) -> float:
        """Return the probability that the test finds a true difference of that size.

        The test has only estimates of the mean squares: those over seeds and over clusters are
        integrated over, that of the rest, which is known best, is taken for known.
        """
        error = self.standard_error(num_seeds, num_clusters)
        if error == 0:
            return 1.0
        df_seed, df_cluster = num_seeds - 1, num_clusters - 1
        by_seed, by_cluster, rest = self._mean_squares(num_seeds, num_clusters)
        of_seed, weight_of_seed = _mean_square(df_seed)
        of_cluster, weight_of_cluster = _mean_square(df_cluster)
        seeds, clusters = by_seed * of_seed[:, None], by_cluster * of_cluster
        total = np.maximum(seeds + clusters - rest, clusters)
        squares = seeds**2 / df_seed + clusters**2 / df_cluster + rest**2 / (df_seed * df_cluster)
        df = np.maximum(total**2 / squares, min(df_seed, df_cluster))
        bound = critical(alpha, df) * np.sqrt(total / (num_seeds * num_clusters)) / error
        shift = difference / error
        chances = _normal(shift - bound) + _normal(-shift - bound)
        return float(weight_of_seed @ chances @ weight_of_cluster)


def mean_components(estimates: Iterable[Components]) -> Components:
    """Components of a typical comparison: each the mean of several, which is less coarse."""
    names = ("mean", "seed", "cluster", "rest")
    rows = [[getattr(each, name) for name in names] for each in estimates]
    means = map(fmean, zip(*rows, strict=True))
    return Components(**dict(zip(names, means, strict=True)))


# ---- Estimates -----------------------------------------------------------------------------------


def components(differences: Any) -> Components:  # [S, C], of each seed and cluster
    """Estimate the variances by the method of moments, unbiased and hence below 0 at times.

    Raises ValueError unless there are two seeds and two clusters or more, all of them finite.
    """
    y = np.asarray(differences, dtype=np.float64)
    if y.ndim != 2 or min(y.shape) < 2 or not bool(np.isfinite(y).all()):
        raise ValueError(
            f"differences: expected finite [seeds, clusters], at least 2 of both, got {y.shape}"
        )
    num_seeds, num_clusters = y.shape
    of_seed, of_cluster = y.mean(1, keepdims=True), y.mean(0, keepdims=True)
    rests = y - of_seed - of_cluster + y.mean()
    rest = float((rests**2).sum()) / ((num_seeds - 1) * (num_clusters - 1))
    by_seed = num_clusters * float(of_seed.var(ddof=1))
    by_cluster = num_seeds * float(of_cluster.var(ddof=1))
    return Components(
        mean=float(y.mean()),
        seed=(by_seed - rest) / num_clusters,
        cluster=(by_cluster - rest) / num_seeds,
        rest=rest,
    )


def cluster_means(differences: Any, cluster: Any) -> Floats:  # [S, I], [I] -> [S, C]
    """Bring items to clusters so that the mean over clusters is that over items.

    What a cluster of n items departs from the mean of all counts n over the mean size, as in the
    linearised variance of a mean over clusters of unequal sizes.
    """
    y, labels = np.asarray(differences, np.float64), np.unique(cluster, return_inverse=True)[1]
    sizes = np.bincount(labels)
    sums = np.stack([np.bincount(labels, row) for row in y - y.mean()])
    return np.asarray(y.mean() + sums / sizes.mean())


# ---- Sizes ---------------------------------------------------------------------------------------


def clusters_needed(
    variances: Components, difference: float, num_seeds: int, *, alpha: float = ALPHA
) -> int | None:
    """Return the fewest clusters that give POWER with so many seeds; None above MOST_CLUSTERS."""
    return _fewest(
        lambda clusters: variances.power(difference, num_seeds, clusters, alpha=alpha),
        MOST_CLUSTERS,
    )


def seeds_needed(
    variances: Components, difference: float, num_clusters: int, *, alpha: float = ALPHA
) -> int | None:
    """Return the fewest seeds that give POWER with so many clusters; None above MOST_SEEDS."""
    return _fewest(
        lambda seeds: variances.power(difference, seeds, num_clusters, alpha=alpha), MOST_SEEDS
    )


def _fewest(power: Callable[[int], float], most: int) -> int | None:
    """Return the least size from 2 on, of a power that grows with it."""
    if power(most) < POWER:
        return None
    low, high = 1, most  # power(high) is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


# ---- Distributions -------------------------------------------------------------------------------


def critical(alpha: float, df: Floats) -> Floats:
    """Return the bound that |t| of Student exceeds with probability alpha; df >= 1, any shape."""
    return np.interp(1 / df, *_bounds(alpha))


@cache
def _bounds(alpha: float) -> tuple[Floats, Floats]:
    """1 / df in ascending order, and the bound of each."""
    inverse = np.linspace(0, 1, 2001)
    bounds = [student_quantile(alpha / 2, 1 / each) for each in inverse[1:]]
    normal = NormalDist().inv_cdf(1 - alpha / 2)
    return inverse, np.array([normal, *bounds])


@cache
def _mean_square(df: int) -> tuple[Floats, Floats]:
    """Nodes and weights of chi2 / df, of which an estimated mean square is a multiple.

    Gauss and Laguerre's rule, from the recurrence of its polynomials (Golub and Welsch 1969).
    """
    shape, k = df / 2, np.arange(NUM_NODES)
    beside = np.diag(np.sqrt(k[1:] * (k[1:] + shape - 1)), 1)
    nodes, vectors = np.linalg.eigh(np.diag(2 * k + shape) + beside + beside.T)
    return nodes / shape, vectors[0] ** 2


def _normal(x: Floats) -> Floats:
    """Cumulative distribution function."""
    return np.asarray(torch.special.ndtr(torch.from_numpy(x)).numpy())


def holm_alpha(num_comparisons: int) -> float:
    """Return the level of the first step of Holm's procedure, which finds each of these."""
    return ALPHA / num_comparisons
