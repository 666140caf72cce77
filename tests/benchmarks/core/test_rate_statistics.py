"""Percentiles are numpy's; the interval is scipy's, and holds the median as often as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from m3i_fast.benchmarks.core.rate_statistics import summarise_rates


@pytest.mark.parametrize("count", [1, 2, 3, 10, 57])
def test_percentiles_are_those_of_numpy(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(3.0, 0.4, count)
    rates = summarise_rates(samples.tolist())
    expected = np.percentile(samples, [5, 50, 95]).tolist()
    assert [rates.p5, rates.median, rates.p95] == pytest.approx(expected, rel=1e-12)
    assert rates.mean == pytest.approx(samples.mean(), rel=1e-12)
    assert rates.num_samples == count
    assert min(samples) <= rates.ci_low <= rates.median <= rates.ci_high <= max(samples)


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    samples = np.random.default_rng(5).gamma(4.0, 25.0, 40)
    rates = summarise_rates(samples.tolist())
    theirs = scipy.stats.bootstrap(
        (samples,), np.median, n_resamples=20_000, method="percentile", random_state=1
    ).confidence_interval
    # Two draws of resamples: their ends differ by a step between neighbouring samples, not more.
    assert rates.ci_low == pytest.approx(theirs.low, rel=0.02)
    assert rates.ci_high == pytest.approx(theirs.high, rel=0.02)
    assert summarise_rates(samples.tolist()) == rates


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    rng, trials, median = np.random.default_rng(0), 150, math.exp(2.0)
    held = 0
    for _ in range(trials):
        rates = summarise_rates(rng.lognormal(2.0, 0.5, 15).tolist())
        held += rates.ci_low <= median <= rates.ci_high
    # 95 % of 150, less three deviations of the binomial; no interval that is always right either.
    assert 0.95 * trials - 3 * math.sqrt(trials * 0.95 * 0.05) <= held < trials


def test_of_three_the_interval_is_their_range() -> None:
    rates = summarise_rates([90.0, 100.0, 130.0])
    assert (rates.ci_low, rates.median, rates.ci_high) == (90.0, 100.0, 130.0)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_what_is_no_sample_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples: expected at least one, all finite"):
        summarise_rates(samples)
