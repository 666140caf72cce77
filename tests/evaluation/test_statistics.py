import numpy as np
import pytest
import torch
from scipy import stats

from m3i_fast.evaluation.statistics import (
    Interval,
    difference_intervals,
    paired_bootstrap,
    paired_bootstrap_of_sums,
    spread,
)


def _hits(num: int = 240) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    difficulty = rng.random(num)
    return (difficulty < 0.62).astype(float), (difficulty + 0.1 * rng.random(num) < 0.6).astype(
        float
    )


def test_interval_equals_scipys_paired_percentile_bootstrap() -> None:
    ours, theirs = _hits()
    oracle = stats.bootstrap(
        (np.append(ours, [1, 0]), np.append(theirs, [0, 1])),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=50_000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    got = paired_bootstrap(ours, theirs, num_resamples=50_000)
    assert got.difference == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    # one item is 1 / 240 of the difference; the ends may fall on neighbouring steps
    assert got.low == pytest.approx(oracle.low, abs=1.01 / 240)
    assert got.high == pytest.approx(oracle.high, abs=1.01 / 240)


def test_pairing_is_narrower_than_treating_the_sides_as_independent() -> None:
    ours, theirs = _hits()
    shuffled = np.random.default_rng(0).permutation(theirs)
    paired, independent = paired_bootstrap(ours, theirs), paired_bootstrap(ours, shuffled)
    assert paired.high - paired.low < 0.7 * (independent.high - independent.low)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for seed in range(200):
        ours, theirs = rng.random(150) < 0.6, rng.random(150) < 0.5
        got = paired_bootstrap(ours, theirs, num_resamples=500, seed=seed)
        covered += got.low <= 0.1 <= got.high
    assert 180 <= covered <= 199  # 95 % of 200, and three standard errors


@pytest.mark.parametrize("num_hits", range(9))
def test_few_hits_are_judged_as_the_exact_sign_test_does(num_hits: int) -> None:
    ours, theirs = np.arange(336) < num_hits, np.zeros(336)
    significant = stats.binomtest(num_hits, num_hits).pvalue < 0.05 if num_hits else False
    assert (paired_bootstrap(ours, theirs).verdict == "better") == significant


def test_no_hit_where_chance_expects_one_is_no_difference() -> None:
    assert paired_bootstrap(np.zeros(336), np.full(336, 1 / 336)).verdict == "no difference found"


def _counts(num: int = 200) -> tuple[np.ndarray, np.ndarray]:  # 2 x [num, 2]: right, asked
    rng = np.random.default_rng(5)
    asked = rng.integers(1, 30, num)
    return tuple(np.stack([rng.binomial(asked, p), asked], 1) for p in (0.6, 0.5))  # type: ignore[return-value]


def test_a_ratio_of_sums_has_scipys_interval() -> None:
    ours, theirs = _counts()

    def difference(rows: np.ndarray, axis: int) -> np.ndarray:
        a, b = (side[rows].sum(-2) for side in (ours, theirs))
        return a[..., 0] / a[..., 1] - b[..., 0] / b[..., 1]

    oracle = stats.bootstrap(
        (np.arange(200),),
        difference,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    got = paired_bootstrap_of_sums(
        torch.tensor(ours), theirs, lambda s: s[:, 0] / s[:, 1], num_resamples=20_000
    )
    expected = ours[:, 0].sum() / ours[:, 1].sum() - theirs[:, 0].sum() / theirs[:, 1].sum()
    assert got.difference == pytest.approx(expected, abs=1e-12)
    assert got.low == pytest.approx(oracle.low, abs=1e-3)
    assert got.high == pytest.approx(oracle.high, abs=1e-3)
    assert got.high - got.low > 0.02


def test_the_interval_of_values_without_bounds_has_students_width() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.normal(-3, 5, 400)
    ours = theirs + rng.normal(0.2, 0.7, 400)
    got = paired_bootstrap_of_sums(ours, theirs, lambda sums: sums / 400)
    half = stats.t.ppf(0.975, 399) * stats.sem(ours - theirs)
    assert got.difference == pytest.approx((ours - theirs).mean(), abs=1e-12)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.05)


def test_same_seed_same_interval_whatever_holds_the_numbers() -> None:
    ours, theirs = _hits()
    first = paired_bootstrap(ours, theirs, seed=5)
    assert first == paired_bootstrap(torch.tensor(ours), list(theirs), seed=5)
    few = [paired_bootstrap(ours, theirs, num_resamples=51, seed=seed) for seed in (5, 6)]
    assert few[0] != few[1]


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(0.1, 0.01, 0.2), "better"),
        (Interval(0.1, 0.0, 0.2), "no difference found"),
        (Interval(-0.1, -0.2, 0.0), "no difference found"),
        (Interval(-0.1, -0.2, -0.01), "worse"),
    ],
)
def test_verdict_needs_an_interval_without_zero(interval: Interval, verdict: str) -> None:
    assert interval.verdict == verdict


def test_every_source_is_compared_with_ours() -> None:
    ours, theirs = _hits()
    got = difference_intervals(
        {
            "knn_top1": {"trained": ours, "untrained": theirs, "chance": np.full(240, 0.5)},
            "linear_top1": {"trained": theirs, "untrained": theirs},
        }
    )
    assert set(got["knn_top1"]) == {"untrained", "chance"}
    assert got["knn_top1"]["untrained"] == paired_bootstrap(ours, theirs)
    same = got["linear_top1"]["untrained"]
    assert same.difference == 0 and same.verdict == "no difference found"


def test_spread_over_runs() -> None:
    got = spread([0.5, 0.6, 0.58])
    assert got.mean == pytest.approx(np.mean([0.5, 0.6, 0.58]))
    assert got.std == pytest.approx(stats.tstd([0.5, 0.6, 0.58]))
    assert (got.lowest, got.highest, got.num_runs) == (0.5, 0.6, 3)
    assert spread([0.5]).std == 0.0


def test_unusable_input_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"theirs: expected \(3,\), one number an item, got \(2,\)"
    ):
        paired_bootstrap([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match=r"ours: expected \[N\], one number an item, got \(0,\)"):
        paired_bootstrap([], [])
    with pytest.raises(ValueError, match=r"ours: expected hits in 0\.\.1, got 0 to 7"):
        paired_bootstrap([0, 7], [0, 1])
    with pytest.raises(ValueError, match="values: expected at least one run"):
        spread([])
    for wrong, message in (
        ([[1.0], [2.0]], r"theirs: expected \(2,\), at least one item, got \(2, 1\)"),
        ([1.0, np.nan], "theirs: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            paired_bootstrap_of_sums([1.0, 2.0], wrong, lambda sums: sums)
    with pytest.raises(ValueError, match=r"ours: expected \(0,\), at least one item"):
        paired_bootstrap_of_sums([], [], lambda sums: sums)
