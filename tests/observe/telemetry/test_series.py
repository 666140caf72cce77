from __future__ import annotations

import numpy as np
import pytest

from m3i_fast.observe.telemetry.series import gauge_statistics, growth, integral

METER = [(float(t), 100.0 * t) for t in range(0, 11, 2)]  # a counter of 100 a second


def test_spread() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 19, 20, 21, 100, 333):
        values = rng.normal(size=count).tolist()
        found = gauge_statistics(values)
        expected = {
            "mean": np.mean(values),
            "min": np.min(values),
            "max": np.max(values),
            "p95": np.quantile(values, 0.95, method="inverted_cdf"),
        }
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("begin_s", "end_s"), [(0, 10), (0, 3), (1, 3), (3.5, 3.75), (9, 10), (-2, 4), (8, 11), (6, 12)]
)
def test_growth_of_a_window(begin_s: float, end_s: float) -> None:
    """Between samples, at them, and a little beyond them."""
    assert growth(METER, begin_s, end_s) == pytest.approx(100 * (end_s - begin_s))


@pytest.mark.parametrize(("begin_s", "end_s"), [(8, 13), (-3, 2), (20, 30), (4, 4), (5, 4)])
def test_growth_that_was_hardly_seen(begin_s: float, end_s: float) -> None:
    assert growth(METER, begin_s, end_s) is None


def test_a_counter_that_begins_anew() -> None:
    points = [(0.0, 900.0), (1.0, 1000.0), (2.0, 50.0), (3.0, 150.0)]
    assert growth(points, 0, 3) == 100 + 50 + 100
    assert growth(points[1:3], 1, 2) == 50


def test_integral() -> None:
    points = [(0.0, 2.0), (1.0, 4.0), (3.0, 4.0)]
    assert integral(points) == [(0.0, 0.0), (1.0, 3.0), (3.0, 11.0)]
    assert growth(integral(points), 0, 3) == 11
    assert growth(integral(points[:1]), 0, 3) is None
