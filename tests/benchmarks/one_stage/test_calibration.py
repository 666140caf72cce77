"""Intervals and verdicts of simulated experiments, whose components and differences are known.

Every share has a band of three binomial standard errors about what it is to be. The components are
those of a pilot: of the linear probe on a hard half the seed's standard deviation of a difference
is 5.9 points, the clusters' 17, the rest's 47, with 168 clusters a fold.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from m3i_fast.benchmarks.one_stage.power import Design
from m3i_fast.benchmarks.one_stage.resampling import ClusterCounts, accuracy, miou, resample
from m3i_fast.benchmarks.one_stage.verdict import Comparison, compare

Floats = npt.NDArray[np.float64]
ARMS = ("m3i", "siameseim", "category + caption", "slip", "two stages")
LINEAR = Design(seed=5.9, cluster=17.0, rest=47.4, clusters_a_fold=168)
PATCHES = Design(seed=0.7, cluster=7.7, rest=9.9, clusters_a_fold=168)
NO_SEEDS = Design(seed=0.0, cluster=17.0, rest=47.4, clusters_a_fold=168)


def _band(share: float, num: int) -> float:
    return 3 * math.sqrt(share * (1 - share) / num)


# ---- Experiments ---------------------------------------------------------------------------------


def _hits(design: Design, means: Floats, rng: np.random.Generator) -> Any:
    """[F, n, A, C, 2] of hits and items, of clusters of 1 to 3 items, components as told."""
    folds, seeds, arms, clusters = (
        design.num_folds,
        design.seeds_a_fold,
        design.num_arms,
        design.clusters_a_fold,
    )
    shared = rng.normal(0, 20, (folds, 1, 1, clusters)) + rng.normal(0, 5, (folds, seeds, 1, 1))
    value = 50 + means[:, None] + shared
    value = value + rng.normal(0, design.seed / math.sqrt(2), (folds, seeds, arms, 1))
    value = value + rng.normal(0, design.cluster / math.sqrt(2), (folds, 1, arms, clusters))
    value = value + rng.normal(0, design.rest / math.sqrt(2), (folds, seeds, arms, clusters))
    items = np.broadcast_to(rng.integers(1, 4, (folds, 1, 1, clusters)), value.shape)
    return np.stack([items * value / 100, items], -1)


def _overlaps(design: Design, means: Floats, rng: np.random.Generator) -> Any:
    """[F, n, A, C, 3, K] of blocks of 40 patches with few of seven classes each.

    A patch is told right with a probability that has a part of the seed, of the block and of both
    with the arm; else it is taken for any class.
    """
    folds, seeds, clusters, classes = design.num_folds, design.seeds_a_fold, 50, 7
    rarity = np.array([8.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5])
    patches = 40
    share = rng.dirichlet(rarity / 6, (folds, clusters))
    labelled = rng.multinomial(patches, share)[:, None, None]  # [F, 1, 1, C, K]
    size = (folds, seeds, len(means), clusters)
    logit = (
        means[:, None]
        + rng.normal(0, 0.5, (folds, 1, 1, clusters))
        + rng.normal(0, design.seed, (*size[:3], 1))
        + rng.normal(0, design.cluster, (folds, 1, len(means), clusters))
        + rng.normal(0, design.rest, size)
    )
    right = rng.binomial(np.broadcast_to(labelled, (*size, classes)), _share(logit)[..., None])
    wrong = rng.multinomial(patches - right.sum(-1), rarity / rarity.sum())
    return np.stack([right, np.broadcast_to(labelled, right.shape), right + wrong], -2)


def _share(logit: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-logit)))


def _compared(
    counts: Any,  # [F, n, A, C, ...]
    figure: Callable[[Floats], Floats],
    index: int,
) -> Comparison:
    folds, seeds = counts.shape[:2]
    runs = {
        arm: {
            fold + folds * repeat: ClusterCounts(
                cluster=1000 * fold + np.arange(counts.shape[3]),
                counts=counts[fold, repeat, place],
            )
            for fold in range(folds)
            for repeat in range(seeds)
        }
        for place, arm in enumerate(ARMS)
    }
    return compare("it", resample(runs, figure, num_draws=500, random_seed=index))


def _rates(
    design: Design,
    means: Floats,
    num: int,
    *,
    figure: Callable[[Floats], Floats] = accuracy,
    make: Callable[..., Any] = _hits,
) -> tuple[float, float, float]:
    """Return the shares of intervals that cover, of `holds` and of `refuted`."""
    covered, said = [], []
    for index in range(num):
        each = _compared(make(design, means, np.random.default_rng([index, 7])), figure, index)
        for arm, mean in zip(ARMS[1:], means[1:], strict=True):
            lead = means[0] - mean
            covered.append(each.minus[arm].low <= lead <= each.minus[arm].high)
        said.append(each.outcome)
    return float(np.mean(covered)), said.count("holds") / num, said.count("refuted") / num


# ---- Coverage and false claims -------------------------------------------------------------------


@pytest.mark.parametrize("design", [LINEAR, PATCHES], ids=["linear", "patches"])
def test_intervals_cover_in_a_few_experiments(design: Design) -> None:
    covered, holds, _ = _rates(design, np.array([3.0, 0, 0, 0, -2]), 250)
    assert covered == pytest.approx(0.95, abs=_band(0.95, 250))


@pytest.mark.nightly
@pytest.mark.parametrize("seeds_a_fold", [1, 3])
@pytest.mark.parametrize("design", [LINEAR, PATCHES], ids=["linear", "patches"])
def test_intervals_cover_as_often_as_they_say(design: Design, seeds_a_fold: int) -> None:
    each = design.longer(seeds_a_fold)
    covered, holds, _ = _rates(each, np.zeros(5), 3000)
    # What is drawn of runs is not below 0, so that intervals are wider by a little where runs make
    # less of the variance.
    assert 0.95 - _band(0.95, 3000) <= covered <= 0.96 + _band(0.96, 3000)
    assert holds <= 0.025


def test_one_rival_is_beaten_by_luck_no_more_often_than_said() -> None:
    _, holds, _ = _rates(LINEAR, np.array([0.0, 0, -40, -40, -40]), 3000)
    assert holds <= 0.025 + _band(0.025, 3000)


@pytest.mark.nightly
def test_intervals_are_wide_where_seeds_make_no_variance() -> None:
    covered, _, _ = _rates(NO_SEEDS, np.zeros(5), 2000)
    assert 0.95 - _band(0.95, 2000) <= covered <= 0.98


@pytest.mark.nightly
def test_an_arm_that_varies_more_than_the_others_is_covered_less_often() -> None:
    """Runs' variance is pooled over arms, which the module says the price of."""

    def unequal(design: Design, means: Floats, rng: np.random.Generator) -> Any:
        counts = _hits(design, means, rng)
        more = design.seed / math.sqrt(2) * math.sqrt(1.5**2 - 1)
        extra = rng.normal(0, more, (design.num_folds, design.seeds_a_fold, 1))
        counts[:, :, 0, :, 0] += counts[:, :, 0, :, 1] * extra / 100  # of M3I alone
        return counts

    covered, holds, _ = _rates(LINEAR, np.zeros(5), 2000, make=unequal)
    assert covered == pytest.approx(0.935, abs=_band(0.935, 2000))
    assert holds <= 0.025


@pytest.mark.nightly
@pytest.mark.parametrize("seeds_a_fold", [1, 3])
def test_intervals_of_mean_iou_cover(seeds_a_fold: int) -> None:
    """Five arms that are alike, so that the true differences of a ratio are known: 0."""
    design = Design(seed=0.1, cluster=0.3, rest=0.3, clusters_a_fold=50, seeds_a_fold=seeds_a_fold)
    covered, holds, _ = _rates(design, np.full(5, 0.5), 2000, figure=miou, make=_overlaps)
    assert 0.95 - _band(0.95, 2000) <= covered <= 0.97
    assert holds <= 0.025
