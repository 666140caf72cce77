"""Intervals and corrections; oracles: scipy's tests, analysis of variance, closed testing."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from scipy import stats

from m3i_fast.evaluation.statistics import (
    Interval,
    figure_interval,
    hits_interval,
    holm,
    mean_interval,
    spread,
    values_interval,
    variance_components,
)
from m3i_fast.evaluation.student_t import student_quantile, student_tail


def _hits(num: int = 240) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    difficulty = rng.random(num)
    return (difficulty < 0.62).astype(float), (difficulty + 0.1 * rng.random(num) < 0.6).astype(
        float
    )


# ---- Student's distribution ----------------------------------------------------------------------


@pytest.mark.parametrize("df", [1.0, 1.3, 2.0, 2.5, 7.0, 335.0, 1e4])
def test_students_distribution_is_scipys(df: float) -> None:
    for t in (0.0, 0.5, 2.0, 5.0, 10.0):
        assert student_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-6)
    for tail in (0.4, 0.025, 1e-5):
        assert student_quantile(tail, df) == pytest.approx(stats.t.isf(tail, df), rel=1e-5)


# ---- One seed ------------------------------------------------------------------------------------


def test_the_interval_of_one_seed_is_that_of_the_paired_t_test() -> None:
    ours, theirs = _hits()
    delta = np.append(ours - theirs, [1, -1])
    oracle = stats.ttest_1samp(delta, 0)
    bounds = oracle.confidence_interval(0.95)
    got = hits_interval(ours, theirs)
    assert got.difference == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    assert (got.low, got.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    assert got.p_value == pytest.approx(oracle.pvalue, rel=1e-9)

    rng = np.random.default_rng(2)
    theirs = rng.normal(-3, 5, 400)
    ours = theirs + rng.normal(0.2, 0.7, 400)
    got, oracle = values_interval(ours, theirs), stats.ttest_rel(ours, theirs)
    bounds = oracle.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    assert got.p_value == pytest.approx(oracle.pvalue, rel=1e-9)


def test_pairing_is_narrower_than_treating_the_sides_as_independent() -> None:
    ours, theirs = _hits()
    shuffled = np.random.default_rng(0).permutation(theirs)
    paired, independent = hits_interval(ours, theirs), hits_interval(ours, shuffled)
    assert paired.high - paired.low < 0.7 * (independent.high - independent.low)


@pytest.mark.parametrize("num_hits", range(9))
def test_few_hits_are_judged_as_the_exact_sign_test_does(num_hits: int) -> None:
    ours, theirs = np.arange(336) < num_hits, np.zeros(336)
    significant = stats.binomtest(num_hits, num_hits).pvalue < 0.05 if num_hits else False
    assert (hits_interval(ours, theirs).verdict == "better") == significant


def test_no_hit_where_chance_expects_one_is_no_difference() -> None:
    assert hits_interval(np.zeros(336), np.full(336, 1 / 336)).verdict == "no difference found"


def _counts(num: int = 200) -> tuple[np.ndarray, np.ndarray]:  # 2 x [num, 2]: right, asked
    rng = np.random.default_rng(5)
    asked = rng.integers(1, 30, num)
    return tuple(np.stack([rng.binomial(asked, p), asked], 1) for p in (0.6, 0.5))  # type: ignore[return-value]


def test_a_ratio_of_sums_has_the_interval_of_scipys_bootstrap() -> None:
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
    got = figure_interval(torch.tensor(ours), theirs, lambda s: s[:, 0] / s[:, 1])
    expected = ours[:, 0].sum() / ours[:, 1].sum() - theirs[:, 0].sum() / theirs[:, 1].sum()
    assert got.difference == pytest.approx(expected, abs=1e-12)
    assert got.low == pytest.approx(oracle.low, abs=2e-3)
    assert got.high == pytest.approx(oracle.high, abs=2e-3)
    assert got.high - got.low > 0.02
    ours[:, 1] = theirs[:, 1] = 1  # the ratio is a mean
    mean = figure_interval(ours, theirs, lambda s: s[:, 0] / s[:, 1], np.arange(200) // 4)
    plain = values_interval(ours[:, 0], theirs[:, 0], np.arange(200) // 4)
    assert (mean.low, mean.high) == pytest.approx((plain.low, plain.high), rel=1e-9)


# ---- Seeds and items -----------------------------------------------------------------------------


def _drawn(
    rng: np.random.Generator, shape: tuple[int, int], seeds: float, items: float, rest: float
) -> np.ndarray:  # [S, N] of these variances about 0
    of_seeds, of_items = rng.normal(0, seeds**0.5, (shape[0], 1)), rng.normal(size=shape[1])
    return of_seeds + items**0.5 * of_items + rest**0.5 * rng.normal(size=shape)


def test_parts_are_the_mean_squares_of_an_analysis_of_variance() -> None:
    delta = _drawn(np.random.default_rng(4), (4, 50), 0.3, 0.5, 1.0)
    rows, columns, mean = delta.mean(1), delta.mean(0), delta.mean()
    rest = delta - rows[:, None] - columns + mean
    squares = np.array(
        [50 * rows.var(ddof=1), 4 * columns.var(ddof=1), (rest**2).sum() / (3 * 49)]
    ) / (4 * 50)
    got = variance_components(delta, np.arange(50))
    assert (got.seeds, got.items, got.both) == pytest.approx(tuple(squares), rel=1e-9)
    total = squares[0] + squares[1] - squares[2]
    assert got.total == pytest.approx(total)
    satterthwaite = total**2 / (squares**2 / [3, 49, 3 * 49]).sum()
    assert got.df == pytest.approx(satterthwaite)
    interval = values_interval(delta, np.zeros((4, 50)))
    half = stats.t.ppf(0.975, satterthwaite) * total**0.5
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), rel=1e-5)


def test_clusters_of_one_size_are_items_of_their_mean() -> None:
    delta = _drawn(np.random.default_rng(4), (3, 120), 0.3, 0.5, 1.0)
    means = delta.reshape(3, 40, 3).mean(2)
    turned = np.random.default_rng(1).permutation(120)
    got = values_interval(delta[:, turned], 0 * delta, cluster=turned // 3 * 7)
    expected = values_interval(means, 0 * means)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


# Variances of seeds, items and the rest: kNN of two methods, their probes, scenes, seeds above all.
VARIANCES = [(0.0, 0.02, 0.17), (3e-4, 0.02, 0.18), (1e-4, 7e-3, 0.013), (0.002, 0.01, 0.05)]


@pytest.mark.parametrize("variances", VARIANCES)
@pytest.mark.parametrize("num_seeds", [3, 8])
def test_the_interval_covers_seeds_and_items(
    num_seeds: int, variances: tuple[float, float, float]
) -> None:
    """As often as it says, and one of the seeds' mean over items alone does not."""
    rng, covered, of_items = np.random.default_rng(11), 0, 0
    for _ in range(400):
        delta = _drawn(rng, (num_seeds, 336), *variances)
        both, alone = (
            values_interval(delta, 0 * delta),
            values_interval(delta.mean(0), np.zeros(336)),
        )
        covered += both.low <= 0 <= both.high
        of_items += alone.low <= 0 <= alone.high
    assert 0.91 <= covered / 400  # 95 %, and three standard errors
    assert covered / 400 <= (
        0.985 if variances[0] and num_seeds > 3 else 1
    )  # else on the safe side
    if variances[0]:
        assert of_items < covered - 10
    if variances[0] == 0.002:
        assert of_items < 0.65 * 400


def test_the_interval_covers_clusters_of_all_sizes() -> None:
    sizes = [*(1,) * 200, *(2,) * 20, *(5,) * 6, *(12,) * 3, 30]
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    rng, covered, plain = np.random.default_rng(5), 0, 0
    for _ in range(400):
        shared = rng.normal(size=len(sizes))[cluster] * 0.5
        delta = shared + rng.normal(size=(1, len(cluster)))
        of_clusters, of_items = (values_interval(delta, 0 * delta, of) for of in (cluster, None))
        covered += of_clusters.low <= 0 <= of_clusters.high
        plain += of_items.low <= 0 <= of_items.high
    assert 0.91 <= covered / 400 <= 0.98
    assert plain < covered - 15


def test_one_seed_twice_is_one_seed() -> None:
    ours, theirs = _hits()
    once = hits_interval(ours, theirs)
    twice = hits_interval(np.stack([ours, ours]), np.stack([theirs, theirs]))
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_what_never_differs_has_no_width() -> None:
    values = np.arange(5.0)
    assert values_interval(values, values) == Interval(0, 0, 0, 1)
    assert values_interval(values + 2, values) == Interval(2, 2, 2, 0)


def test_same_interval_whatever_holds_the_numbers() -> None:
    ours, theirs = _hits()
    assert hits_interval(ours, theirs) == hits_interval(torch.tensor(ours), list(theirs))


# ---- Verdicts ------------------------------------------------------------------------------------


def test_a_verdict_needs_an_interval_without_zero() -> None:
    ours, theirs = _hits()
    for shift in np.linspace(-0.2, 0.2, 41):
        got = values_interval(ours + shift, theirs)
        expected = "better" if got.low > 0 else "worse" if got.high < 0 else "no difference found"
        assert got.verdict == expected


def test_holm_is_the_closed_test_of_all_subsets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        p_values = dict(enumerate((rng.random(6) ** 3).tolist()))
        got = holm({key: Interval(1.0, 0.5, 1.5, p) for key, p in p_values.items()})
        subsets = list(chain.from_iterable(combinations(p_values, n) for n in range(1, 7)))
        for key in p_values:  # rejected where each subset that contains it is, by Bonferroni
            worst = max(
                min(len(of) * min(p_values[k] for k in of), 1.0) for of in subsets if key in of
            )
            assert got[key].p_value == pytest.approx(worst, rel=1e-12)
            assert (got[key].low, got[key].high) == (0.5, 1.5)
        assert list(got) == list(p_values)


def test_holm_takes_a_difference_back() -> None:
    family = {name: Interval(1.0, 0.1, 1.9, p) for name, p in (("a", 0.001), ("b", 0.04))}
    assert [x.verdict for x in family.values()] == ["better", "better"]
    family["c"] = Interval(-1.0, -2.5, 0.5, 0.2)
    assert [x.verdict for x in holm(family).values()] == ["better", *2 * ["no difference found"]]
    assert holm({}) == {}


def test_spread_over_runs() -> None:
    got = spread([0.5, 0.6, 0.58])
    assert got.mean == pytest.approx(np.mean([0.5, 0.6, 0.58]))
    assert got.std == pytest.approx(stats.tstd([0.5, 0.6, 0.58]))
    assert (got.lowest, got.highest, got.num_runs) == (0.5, 0.6, 3)
    assert spread([0.5]).std == 0.0


def test_another_unit_scales_all_but_the_p_value() -> None:
    assert Interval(0.1, -0.2, 0.3, 0.4).scaled(10) == Interval(1.0, -2.0, 3.0, 0.4)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"theirs: expected \(3,\), at least one item, got \(2,\)"):
        hits_interval([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match=r"ours: expected \(0,\), at least one item, got \(0,\)"):
        hits_interval([], [])
    with pytest.raises(ValueError, match=r"ours: expected hits in 0\.\.1, got 0 to 7"):
        hits_interval([0, 7], [0, 1])
    with pytest.raises(ValueError, match=r"ours: expected \[N\] or \[seeds, N\], got \(1, 1, 2\)"):
        hits_interval([[[0, 1]]], [[[0, 1]]])
    with pytest.raises(ValueError, match="values: expected at least one run"):
        spread([])
    for wrong, message in (
        ([[1.0], [2.0]], r"theirs: expected \(2,\), at least one item, got \(2, 1\)"),
        ([1.0, np.nan], "theirs: expected finite values"),
    ):
        for interval in (values_interval, lambda a, b: figure_interval(a, b, lambda sums: sums)):
            with pytest.raises(ValueError, match=message):
                interval([1.0, 2.0], wrong)
    with pytest.raises(ValueError, match="items: expected at least two clusters, got one"):
        values_interval([1.0, 2.0], [0.0, 0.0], [5, 5])
    with pytest.raises(ValueError, match="cluster: expected 2, one an item, got 3"):
        values_interval([1.0, 2.0], [0.0, 0.0], [1, 2, 3])


# ---- The interval of one mean --------------------------------------------------------------------


@pytest.mark.parametrize(("right", "number"), [(0, 5), (9, 10), (40, 200), (336, 336)])
def test_the_interval_of_a_share_is_agresti_and_coulls(right: int, number: int) -> None:
    """Two hits and two misses more, with Student's quantile in place of 1.96."""
    hits = np.arange(number) < right
    low, high = mean_interval(hits)
    padded = np.concatenate([hits, [1, 1, 0, 0]])
    oracle = stats.ttest_1samp(padded, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((max(oracle.low, 0), min(oracle.high, 1)))
    assert high - low > 0


def test_items_of_one_group_count_as_one() -> None:
    rng = np.random.default_rng(5)
    hits, group = rng.random(60) < 0.7, np.arange(60)
    alone = mean_interval(hits)
    together = mean_interval(np.repeat(hits, 4), np.repeat(group, 4))
    as_many_items = mean_interval(np.repeat(hits, 4))
    width = [high - low for low, high in (alone, together, as_many_items)]
    assert width[1] == pytest.approx(width[0], rel=0.1) and width[2] < 0.6 * width[1]


def test_the_interval_of_a_share_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    for share in (0.05, 0.5, 0.9):
        ends = [mean_interval(rng.random(60) < share) for _ in range(400)]
        assert 0.93 < np.mean([low <= share <= high for low, high in ends]) <= 1


def test_hits_outside_of_0_to_1_have_no_interval() -> None:
    with pytest.raises(ValueError, match=r"hits: expected hits in 0\.\.1"):
        mean_interval([0.5, 2.0])
