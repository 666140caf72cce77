"""Rates of the rule by simulation; oracles: noncentral t of scipy, and what ties must say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from m3i_fast.benchmarks.one_stage.power import Design, Rates, power_table, simulate

LINEAR = Design(seed=5.9, cluster=17.0, rest=47.4, clusters_a_fold=168)
FEW = 400


def _band(share: float, num: int) -> float:
    return 3 * math.sqrt(share * (1 - share) / num)


def test_a_design_has_the_variances_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    longer = replace(LINEAR, clusters_a_fold=10).longer(3)
    assert longer.seeds_a_fold == 3
    # Of one arm: half the variance of a difference.
    seed = rng.normal(0, 5.9 / math.sqrt(2), (20_000, 3, 1))
    cluster = rng.normal(0, 17.0 / math.sqrt(2), (20_000, 1, 10))
    rest = rng.normal(0, 47.4 / math.sqrt(2), (20_000, 3, 10))
    assert longer.of_runs == pytest.approx(seed.mean((1, 2)).var(), rel=0.05)
    assert longer.of_clusters == pytest.approx((cluster + rest).mean((1, 2)).var(), rel=0.05)


@pytest.mark.parametrize("points", [0.0, 5.0, 10.0])
def test_a_single_difference_is_found_as_often_as_by_the_t_test(points: float) -> None:
    runs = replace(LINEAR, cluster=0.0, rest=0.0)
    rates = simulate(runs, points, num_experiments=2000, num_draws=500)
    shift = points / (5.9 / math.sqrt(5))
    expected = stats.nct.sf(stats.t.isf(0.025, 16), 16, shift)
    assert rates.found == pytest.approx(expected, abs=_band(expected, 2000) + 0.005)
    assert rates.covered == pytest.approx(0.95, abs=_band(0.95, 2000) + 0.005)


def test_the_best_of_four_is_beaten_by_luck_no_more_often_than_one() -> None:
    tied, one = (simulate(LINEAR, 0.0, behind=away, num_experiments=1500) for away in (0.0, 100.0))
    assert one.holds <= 0.025 + _band(0.025, 1500) and one.holds == one.found
    assert tied.holds <= 0.005 < 0.2 < tied.refuted
    assert one.refuted < 0.1


def test_a_wrong_refuted_is_as_rare_as_the_module_says() -> None:
    tied = simulate(LINEAR, 1.0, num_experiments=1500)
    assert tied.refuted == pytest.approx(0.18, abs=_band(0.18, 1500))
    assert tied.refuted**2 < 0.05
    one = simulate(LINEAR, 1.0, behind=100.0, num_experiments=1500)
    assert one.refuted <= 0.025 + _band(0.025, 1500)


def test_more_seeds_find_more() -> None:
    rates = [simulate(LINEAR.longer(n), 8.0, num_experiments=FEW) for n in (1, 3)]
    assert rates[0].found < rates[1].found and rates[0].holds < rates[1].holds
    assert rates == [simulate(LINEAR.longer(n), 8.0, num_experiments=FEW) for n in (1, 3)]


def test_the_table_has_every_rate_and_their_products() -> None:
    patches = Design(seed=0.7, cluster=7.7, rest=9.9, clusters_a_fold=168)
    designs = {"styles": LINEAR, "earth": patches}
    text = power_table(designs, points=(0.0, 3.0), longer=(1, 2), num_experiments=50)
    head, rule, *lines = text.splitlines()
    assert head == "| data set | seeds | said | +0 | +3 |" and set(rule) == set("|-")
    cells = [tuple(line.strip("| ").split(" | ")) for line in lines]
    told = {each[:3]: each[3:] for each in cells}
    assert len(told) == len(cells) == 2 * (3 + 3 + 2)

    def rates(name: str, times: int) -> list[Rates]:
        return [
            simulate(designs[name].longer(times), points, num_experiments=50)
            for points in (0.0, 3.0)
        ]

    for times, seeds in ((1, "5"), (2, "10")):
        styles, earth = rates("styles", times), rates("earth", times)
        assert told["earth", seeds, "one difference above 0"] == tuple(
            f"{100 * each.found:.1f}" for each in earth
        )
        assert told["styles", seeds, "refuted"] == tuple(f"{100 * e.refuted:.1f}" for e in styles)
        assert told["all sets", seeds, "holds"] == tuple(
            f"{100 * a.holds * b.holds:.1f}" for a, b in zip(styles, earth, strict=True)
        )
