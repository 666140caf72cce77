"""Draws of the arms' means; oracles: scipy's t, least squares, textbook variances, a jackknife."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from m3i_fast.benchmarks.one_stage.resampling import (
    ClusterCounts,
    Noise,
    accuracy,
    balanced_seeds,
    miou,
    resample,
)

Floats = npt.NDArray[np.float64]
ARMS = ("m3i", "siameseim", "slip")
CLUSTERS = 40  # of a fold


def _runs(counts: Mapping[str, Mapping[int, Any]], *, folds: int = 5) -> Any:
    """Counts [C, ...] of each arm and seed, with the clusters of fold seed mod folds."""
    return {
        arm: {
            seed: ClusterCounts(
                cluster=1000 * (seed % folds) + np.arange(len(each)), counts=np.asarray(each)
            )
            for seed, each in of_seed.items()
        }
        for arm, of_seed in counts.items()
    }


def _hits(rng: np.random.Generator, seeds: int = 5, sizes: Any = 1) -> Any:
    """Random hits of items, with a cluster's and an arm's own part."""
    ease = rng.normal(0, 0.15, (5, CLUSTERS))
    return {
        arm: {
            seed: np.stack(
                [
                    sizes * (0.5 + 0.02 * place + ease[seed % 5] + rng.normal(0, 0.1, CLUSTERS))
                    + rng.normal(0, 0.02),
                    np.broadcast_to(np.asarray(sizes, float), CLUSTERS),
                ],
                1,
            )
            for seed in range(seeds)
        }
        for place, arm in enumerate(ARMS)
    }


# ---- Runs ----------------------------------------------------------------------------------------


def _flat(figures: Floats) -> Any:  # [S, A], in percent
    """Runs whose clusters are all alike, so that drawing them anew changes nothing."""
    return _runs(
        {
            arm: {
                seed: np.tile([figures[seed, place], 100.0], (7, 1)) for seed in range(len(figures))
            }
            for place, arm in enumerate(ARMS)
        }
    )


def test_without_noise_of_clusters_a_difference_is_the_paired_t_of_a_pooled_variance() -> None:
    figures = np.random.default_rng(0).normal(50, 4, (5, 3))
    drawn = resample(_flat(figures), accuracy, num_draws=400_000)
    assert drawn.figures == pytest.approx(figures) and drawn.means == pytest.approx(figures.mean(0))

    rows, columns = np.indices(figures.shape).reshape(2, -1)
    design = np.concatenate([np.eye(5)[rows], np.eye(3)[columns]], 1)
    fitted = design @ np.linalg.lstsq(design, figures.ravel(), rcond=None)[0]
    square = float(((figures.ravel() - fitted) ** 2).sum()) / 8
    assert drawn.noise.residual == pytest.approx(square, rel=1e-9)
    assert drawn.noise.clusters == pytest.approx(0, abs=1e-20) and drawn.noise.df == 8

    error = np.sqrt(2 * square / 5)
    assert drawn.noise.standard_error == pytest.approx(error)
    assert drawn.noise.detectable == pytest.approx(
        error * (stats.t.isf(0.025, 8) + stats.t.isf(0.2, 8))
    )
    tails = np.array([0.005, 0.025, 0.2, 0.5, 0.8, 0.975, 0.995])
    for one, other in itertools.combinations(range(3), 2):
        found = np.quantile(drawn.draws[:, one] - drawn.draws[:, other], tails)
        lead = figures[:, one].mean() - figures[:, other].mean()
        expected = lead + error * stats.t.ppf(tails, 8)
        assert found == pytest.approx(expected, abs=0.03 * error)


def test_two_arms_are_the_paired_t_test_of_scipy() -> None:
    figures = np.random.default_rng(1).normal(50, 4, (5, 3))
    runs = {arm: seeds for arm, seeds in _flat(figures).items() if arm != "slip"}
    drawn = resample(runs, accuracy, num_draws=400_000)
    test = stats.ttest_rel(figures[:, 0], figures[:, 1])
    low, high = test.confidence_interval(0.95)
    found = np.quantile(drawn.draws[:, 0] - drawn.draws[:, 1], (0.025, 0.975))
    assert found == pytest.approx([low, high], abs=0.02 * (high - low))


def test_what_clusters_make_is_taken_off_the_runs_and_is_the_least_that_is_left() -> None:
    rng = np.random.default_rng(0)
    noise = Noise(residual=9.0, clusters=4.0, num_arms=5, num_folds=5)
    runs = noise.draw_runs(400_000, rng)
    whole = 9.0 * 16 / rng.chisquare(16, 4_000_000)
    expected = np.maximum(whole - 4.0, 0).mean() / 5
    assert runs.var(0) == pytest.approx(expected, rel=0.02)
    assert np.corrcoef(runs.T) == pytest.approx(np.eye(5), abs=0.01)
    small = replace(noise, residual=0.1)
    assert not small.draw_runs(1000, rng).any()
    assert small.standard_error == pytest.approx(np.sqrt(2 * 4.0 / 5))


# ---- Clusters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [4, CLUSTERS])  # of few a plain bootstrap has 3/4 of it
def test_the_variance_of_clusters_is_that_of_a_mean(clusters: int) -> None:
    every = _hits(np.random.default_rng(2))
    hits = {arm: {s: each[:clusters] for s, each in of.items()} for arm, of in every.items()}
    drawn = resample(_runs(hits), accuracy, num_draws=20_000)
    assert drawn.num_clusters == 5 * clusters
    y = np.array([[100 * hits[arm][seed][:, 0] for arm in ARMS] for seed in range(5)])  # [S, A, C]
    beside = y - y.mean(1, keepdims=True)
    expected = (beside.var(2, ddof=1) / clusters).sum(1).mean() / 2
    assert drawn.noise.clusters == pytest.approx(expected, rel=0.03)


def test_the_variance_of_a_ratio_is_the_linearised_one() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 9, CLUSTERS)
    hits = _hits(rng, sizes=sizes)
    drawn = resample(_runs(hits), accuracy, num_draws=20_000)
    parts = []
    for seed in range(5):
        total = np.array([hits[arm][seed][:, 0] for arm in ARMS])  # [A, C]
        share = total.sum(1, keepdims=True) / sizes.sum()
        apart = 100 * (total - share * sizes) / sizes.mean()
        parts.append(((apart - apart.mean(0)).var(1, ddof=1) / CLUSTERS).sum() / 2)
    assert drawn.noise.clusters == pytest.approx(np.mean(parts), rel=0.08)


def _overlaps(rng: np.random.Generator, clusters: int = 60, classes: int = 6) -> Floats:
    """[C, 3, K] of a confusion matrix a cluster."""
    counts = []
    for _ in range(clusters):
        label = rng.choice(classes, 50, p=rng.dirichlet(np.full(classes, 0.5)))
        wrong = rng.integers(0, classes, 50)
        predicted = np.where(rng.random(50) < rng.beta(4, 4), label, wrong)
        right = label[predicted == label]
        counts.append([np.bincount(each, minlength=classes) for each in (right, label, predicted)])
    return np.array(counts, dtype=np.float64)


def test_the_variance_of_mean_iou_is_a_jackknifes() -> None:
    rng = np.random.default_rng(4)
    counts = {arm: {seed: _overlaps(rng) for seed in range(2)} for arm in ("m3i", "slip")}
    drawn = resample(_runs(counts), miou, num_draws=20_000)
    variances = []
    for seed in range(2):
        left_out = [
            miou(each.sum(0) - each) for each in (counts["m3i"][seed], counts["slip"][seed])
        ]
        pseudo = 59 * (left_out[0] - left_out[1])
        variances.append(pseudo.var(ddof=1) / 60)
    assert 2 * drawn.noise.clusters == pytest.approx(np.mean(variances), rel=0.15)


def test_arms_are_drawn_with_the_same_clusters() -> None:
    hits = _hits(np.random.default_rng(5))
    alike = dict.fromkeys(ARMS, hits["m3i"])
    drawn = resample(_runs(alike), accuracy, num_draws=500)
    assert drawn.draws.std(0) == pytest.approx(drawn.draws.std(0)[0]) and drawn.draws.std() > 0.1
    assert np.ptp(drawn.draws, axis=1) == pytest.approx(0, abs=1e-6)


def test_seeds_of_a_fold_are_drawn_with_the_same_clusters() -> None:
    hits = _hits(np.random.default_rng(6))
    twice = {arm: {**seeds, **{s + 5: v for s, v in seeds.items()}} for arm, seeds in hits.items()}
    once, again = (resample(_runs(each), accuracy, num_draws=500) for each in (hits, twice))
    assert again.seeds == tuple(range(10)) and again.num_clusters == once.num_clusters
    assert again.draws == pytest.approx(once.draws)
    # Clusters that the second seed has not: half the variance is left.
    other = _hits(np.random.default_rng(7))
    apart = {arm: {**hits[arm], **{s + 5: other[arm][s] for s in range(5)}} for arm in ARMS}
    both = resample(_runs(apart), accuracy, num_draws=5000)
    assert both.noise.clusters < 0.7 * once.noise.clusters


def test_draws_are_those_of_their_seed() -> None:
    runs = _runs(_hits(np.random.default_rng(8)))
    first, again, other = (
        resample(runs, accuracy, num_draws=700, random_seed=seed).draws for seed in (0, 0, 1)
    )
    assert first.shape == (700, 3)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    whole = resample(runs, accuracy)
    assert whole.draws.shape == (10_000, 3)
    assert whole.draws.mean(0) == pytest.approx(whole.means, abs=0.1)


def test_hits_of_items_are_counted_by_cluster() -> None:
    found = ClusterCounts.of_hits(np.array([1, 0, 0.5, 1.0]), np.array([7, 3, 7, 3]))
    assert found.cluster.tolist() == [3, 7] and found.counts.tolist() == [[1, 2], [1.5, 2]]
    assert accuracy(found.counts.sum(0)[None]).tolist() == [62.5]
    with pytest.raises(ValueError):
        ClusterCounts.of_hits(np.ones(3), np.array([1, 2]))


# ---- Requests ------------------------------------------------------------------------------------


def test_the_seeds_that_all_arms_have_are_found() -> None:
    runs = _runs(_hits(np.random.default_rng(0), seeds=8))
    assert balanced_seeds(runs) == (0, 1, 2, 3, 4)
    for gone in (6, 3, 1):
        del runs["slip"][gone]
    assert balanced_seeds(runs) == (0, 2, 4)
    assert balanced_seeds({arm: {} for arm in ARMS}) == balanced_seeds({}) == ()
    chosen = {arm: {s: runs[arm][s] for s in balanced_seeds(runs)} for arm in ARMS}
    assert resample(chosen, accuracy, num_draws=10).seeds == balanced_seeds(runs)


def test_what_is_no_paired_and_crossed_design_is_refused() -> None:
    hits = _hits(np.random.default_rng(0), seeds=6)
    runs = _runs(hits)
    with pytest.raises(ValueError, match=r"as many seeds each, got seeds \[\[0, 5\], \[1\]"):
        resample(runs, accuracy)
    with pytest.raises(ValueError, match="two arms or more, got \\['m3i'\\]"):
        resample({"m3i": runs["m3i"]}, accuracy)
    with pytest.raises(ValueError, match="expected seeds .* of slip, as of m3i, got"):
        resample({"m3i": runs["m3i"], "slip": {0: runs["slip"][0]}}, accuracy)
    with pytest.raises(ValueError, match="two folds or more"):
        resample({arm: {0: runs[arm][0], 5: runs[arm][5]} for arm in ARMS}, accuracy)
    moved = {arm: dict(seeds) for arm, seeds in _runs(_hits(np.random.default_rng(0))).items()}
    moved["slip"][2] = replace(moved["slip"][2], cluster=moved["slip"][2].cluster + 1)
    with pytest.raises(ValueError, match="seed 2: slip was measured on other clusters than m3i"):
        resample(moved, accuracy)
    for arm in ARMS:
        moved[arm][2] = replace(moved[arm][2], cluster=moved[arm][1].cluster + 1)
    with pytest.raises(ValueError, match="39 clusters are in more than one fold"):
        resample(moved, accuracy)


@pytest.mark.parametrize(
    ("cluster", "counts", "message"),
    [
        ([1, 1, 2], np.ones((3, 2)), "got 3 of 2 kinds"),
        ([1], np.ones((1, 2)), "got 1 of 1 kinds"),
        ([1, 2], np.ones((3, 2)), "and 3 counts"),
        ([1, 2], np.full((2, 2), np.nan), "counts: expected finite values"),
    ],
)
def test_what_are_no_counts_of_clusters_is_refused(
    cluster: list[int], counts: Floats, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterCounts(cluster=np.array(cluster), counts=counts)


def test_a_figure_that_is_not_finite_is_refused() -> None:
    empty = {arm: {seed: np.zeros((4, 2)) for seed in range(2)} for arm in ARMS}
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="expected a finite one"):
        resample(_runs(empty), accuracy)
    rare = {arm: {seed: np.eye(4, 2) for seed in range(2)} for arm in ARMS}
    rare = {arm: {s: each[:, ::-1] * [0, 1] for s, each in of.items()} for arm, of in rare.items()}
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="redrawn clusters"):
        resample(_runs(rare), accuracy)
