"""Components, power and sizes of crossed designs; oracles: scipy, least squares, simulation."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from m3i_fast.benchmarks.methods.sample_size import (
    Components,
    _mean_square,
    cluster_means,
    clusters_needed,
    components,
    critical,
    mean_components,
    seeds_needed,
)

Floats = npt.NDArray[np.float64]
KNOWN = Components(mean=0.02, seed=0.0004, cluster=0.05, rest=0.12)


def _simulated(known: Components, seeds: int, clusters: int, rng: np.random.Generator) -> Floats:
    """[seeds, clusters] of mean + seed + cluster + rest."""
    parts = (
        rng.normal(0, math.sqrt(known.seed), (seeds, 1)),
        rng.normal(0, math.sqrt(known.cluster), (1, clusters)),
        rng.normal(0, math.sqrt(known.rest), (seeds, clusters)),
    )
    return np.asarray(known.mean + sum(parts))


# ---- Estimates -----------------------------------------------------------------------------------


def test_mean_squares_are_those_of_nested_least_squares() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(4, 7)) + rng.normal(size=(4, 1)) + rng.normal(size=(1, 7))
    row, column = np.indices(y.shape).reshape(2, -1)
    seed, cluster = np.eye(4)[row], np.eye(7)[column]

    def residual(*parts: Floats) -> float:
        design = np.concatenate([np.ones((28, 1)), *parts], 1)
        fitted = design @ np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
        return float(((y.ravel() - fitted) ** 2).sum())

    both = residual(seed, cluster)
    rest = both / 18
    by_seed, by_cluster = (residual(cluster) - both) / 3, (residual(seed) - both) / 6
    found = components(y)
    assert found.rest == pytest.approx(rest, rel=1e-12)
    assert found.seed == pytest.approx((by_seed - rest) / 7, rel=1e-12)
    assert found.cluster == pytest.approx((by_cluster - rest) / 4, rel=1e-12)
    assert found.mean == pytest.approx(y.mean(), rel=1e-12)


def test_known_components_are_found() -> None:
    rng = np.random.default_rng(1)
    each = [components(_simulated(KNOWN, 4, 60, rng)) for _ in range(2000)]
    for name in ("mean", "seed", "cluster", "rest"):
        values = np.array([getattr(found, name) for found in each])
        error = values.std() / math.sqrt(len(values))
        assert values.mean() == pytest.approx(getattr(KNOWN, name), abs=4 * error), name
    means = np.array([found.mean for found in each])
    assert means.std() == pytest.approx(KNOWN.standard_error(4, 60), rel=4 / math.sqrt(4000))
    typical = mean_components(each)
    assert typical.seed == pytest.approx(np.mean([found.seed for found in each]))


def test_estimates_below_zero_stay_and_are_none_in_a_design() -> None:
    y = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = components(y)
    assert (found.seed, found.cluster, found.rest) == (-0.5, -0.5, 1.0)
    assert found.standard_error(4, 25) == pytest.approx(0.1)


def test_clusters_of_unequal_sizes_keep_the_mean_of_the_items() -> None:
    rng = np.random.default_rng(2)
    y, cluster = rng.normal(1.0, 1.0, (3, 50)), rng.integers(0, 9, 50) * 10
    found = cluster_means(y, cluster)
    assert found.shape == (3, 9)
    assert found.mean(1) == pytest.approx(y.mean(1), rel=1e-12)
    alone = cluster_means(y, np.arange(50)[::-1])
    assert alone == pytest.approx(y[:, ::-1], rel=1e-12)
    # Drawing clusters with all their items varies the mean over items as the variance says.
    sizes = rng.integers(1, 12, 4000)
    labels = np.repeat(np.arange(4000), sizes)
    items = rng.normal(0, 1, 4000)[labels] + rng.normal(0, 0.5, len(labels))
    linear = float(cluster_means(items[None], labels).std()) / math.sqrt(4000)
    sums, drawn = np.bincount(labels, items), rng.integers(0, 4000, (1000, 4000))
    resampled = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert linear == pytest.approx(resampled.std(), rel=0.1)


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], [[1.0], [2.0]], [1.0, 2.0], [[1, math.nan]] * 2])
def test_what_has_no_components_is_refused(wrong: list[object]) -> None:
    with pytest.raises(ValueError, match=r"differences: expected finite \[seeds, clusters\]"):
        components(wrong)


# ---- Power ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.05 / 7])
def test_bounds_are_those_of_students_distribution(alpha: float) -> None:
    df = np.array([1.0, 1.7, 2.0, 5.5, 40.0, 3000.0, 2e5])
    assert critical(alpha, df) == pytest.approx(stats.t.isf(alpha / 2, df), rel=1e-4)


@pytest.mark.parametrize("df", [1, 2, 9, 400])
def test_a_mean_square_is_distributed_as_scipys_chi2(df: int) -> None:
    nodes, weights = _mean_square(df)
    for power in range(6):
        expected = stats.chi2.moment(power, df) / df**power
        assert weights @ nodes**power == pytest.approx(expected, rel=1e-9)


def test_power_without_seeds_and_rest_is_that_of_the_paired_t_test() -> None:
    found = Components(mean=0.0, seed=0.0, cluster=1.0, rest=0.0)
    shift, df = 0.5 * math.sqrt(30), 29
    bound = stats.t.isf(0.025, df)
    expected = stats.nct.sf(bound, df, shift) + stats.nct.cdf(-bound, df, shift)
    assert found.power(0.5, 3, 30) == pytest.approx(expected, abs=1e-5)
    needed = clusters_needed(found, 0.5, 3)
    assert needed == 34  # as G*Power and textbooks have it for a paired test of d = 0.5


def _finds(y: Floats, alpha: float) -> bool:
    """The t test of the mean of crossed differences."""
    seeds, clusters = y.shape
    by_seed, by_cluster = clusters * y.mean(1).var(ddof=1), seeds * y.mean(0).var(ddof=1)
    rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    by_both = (rest**2).sum() / ((seeds - 1) * (clusters - 1))
    total = max(by_seed + by_cluster - by_both, by_cluster)
    noise = by_seed**2 / (seeds - 1) + by_cluster**2 / (clusters - 1)
    df = total**2 / (noise + by_both**2 / ((seeds - 1) * (clusters - 1)))
    df = max(df, min(seeds, clusters) - 1)
    error = math.sqrt(total / (seeds * clusters))
    return bool(abs(y.mean()) / error > stats.t.isf(alpha / 2, df))


@pytest.mark.parametrize(
    ("known", "seeds", "alpha"),
    [
        (KNOWN, 5, 0.05),
        (KNOWN, 10, 0.01),
        (Components(mean=0.0, seed=0.0, cluster=0.05, rest=0.12), 3, 0.05),
    ],
)
def test_simulated_power_at_the_calculated_size_is_what_was_asked_for(
    known: Components, seeds: int, alpha: float
) -> None:
    difference = 0.05
    clusters = clusters_needed(known, difference, seeds, alpha=alpha)
    assert clusters is not None
    moved = Components(mean=difference, seed=known.seed, cluster=known.cluster, rest=known.rest)
    rng = np.random.default_rng(3)
    found = np.mean([_finds(_simulated(moved, seeds, clusters, rng), alpha) for _ in range(2000)])
    assert found == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 2000))


def test_sizes_are_the_least_that_suffice() -> None:
    for seeds in (5, 12):
        clusters = clusters_needed(KNOWN, 0.05, seeds)
        assert clusters is not None
        assert KNOWN.power(0.05, seeds, clusters) >= 0.8 > KNOWN.power(0.05, seeds, clusters - 1)
    seeds_of = seeds_needed(KNOWN, 0.05, 336)
    assert seeds_of is not None
    assert KNOWN.power(0.05, seeds_of, 336) >= 0.8 > KNOWN.power(0.05, seeds_of - 1, 336)
    # Seeds alone leave more than the difference: no number of clusters is enough, and vice versa.
    assert clusters_needed(KNOWN, 0.02, 3) is None
    assert seeds_needed(KNOWN, 0.01, 50) is None
