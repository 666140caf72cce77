"""The gate's statistics are scipy's; its alarms are rare on noise and sure on what is slower."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import signal, stats

from m3i_fast.benchmarks.compare import gate
from m3i_fast.benchmarks.compare.gate import judge, judge_in_looks, mann_whitney, ratio_interval

Groups = list[list[float]]


@pytest.mark.parametrize("counts", [(1, 1), (7, 9), (40, 25), (200, 200)])
@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_mann_whitney_is_scipys(counts: tuple[int, int], decimals: int) -> None:
    rng = np.random.default_rng(sum(counts))
    a, b = (
        np.round(rng.lognormal(0.2 * i, 0.5, count), decimals) for i, count in enumerate(counts)
    )
    if len(np.unique(np.concatenate([a, b]))) == 1:
        assert mann_whitney(a, b) == 1.0
        return
    expected = stats.mannwhitneyu(a, b, alternative="two-sided", method="asymptotic").pvalue
    assert mann_whitney(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("in_turns", [True, False])
def test_interval_is_scipys_where_samples_are_independent(in_turns: bool) -> None:
    rng = np.random.default_rng(3)
    shared = rng.lognormal(0.0, 0.3, 60) if in_turns else 1.0
    a, b = shared * rng.lognormal(0.0, 0.1, 60), shared * rng.lognormal(0.1, 0.1, 60)

    def ratio(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        if in_turns:
            return np.asarray(np.median(y / x, axis=axis))
        return np.asarray(np.median(y, axis=axis) / np.median(x, axis=axis))

    expected = stats.bootstrap(
        (a, b), ratio, paired=in_turns, vectorized=True, confidence_level=0.95,
        n_resamples=6000, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = ratio_interval(
        [a], [b], alpha=0.05, in_turns=in_turns, num_resamples=6000, seed=1, block=1
    )
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.08 * width)
    assert high == pytest.approx(expected.high, abs=0.08 * width)


def _autocorrelated(rng: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """Standard normal, each value `memory` times the one before and something new."""
    new = rng.standard_normal(count + 100) * np.sqrt(1 - memory**2)
    return np.asarray(signal.lfilter([1.0], [1.0, -memory], new)[100:])


def simulate(
    rng: np.random.Generator, slowdown: float, *, drift: float = 0.1, own: float = 0.04
) -> tuple[Groups, Groups]:
    """Times of a busy machine: a drift that both feel, own noise with a memory, hits by others.

    Three pairs of processes, each process 0.5 % faster or slower than its like all its life.
    """
    baseline: Groups = []
    candidate: Groups = []
    for _ in range(3):
        felt = drift * _autocorrelated(rng, 120, 0.9)
        for groups, factor in ((baseline, 1.0), (candidate, 1.0 + slowdown)):
            own_noise = own * _autocorrelated(rng, 120, 0.5) + 0.005 * rng.standard_normal()
            hit = 1 + rng.exponential(1.0, 120) * (rng.random(120) < 0.08)
            groups.append(list(factor * np.exp(felt + own_noise) * hit))
    return baseline, candidate


def _alarms(slowdown: float, trials: int, **how: float) -> list[gate.Alarm | None]:
    found: list[gate.Alarm | None] = []
    for trial in range(trials):
        pair = simulate(np.random.default_rng([trial, round(1000 * slowdown) + 500]), slowdown)
        found.append(judge(*pair, num_resamples=200, **how).alarm)  # type: ignore[arg-type]
    return found


def test_unchanged_code_raises_no_alarm_and_a_tenth_is_found() -> None:
    assert _alarms(0.0, 60) == [None] * 60
    slower = _alarms(0.10, 40)
    assert slower.count("slower") >= 38 and "faster" not in slower
    faster = _alarms(1 / 1.10 - 1, 40)
    assert faster.count("faster") >= 38 and "slower" not in faster


def test_a_difference_that_just_does_not_count_alarms_no_more_than_alpha_says() -> None:
    """At the threshold itself, the worst case, with alpha wide enough to be counted."""
    alarms = _alarms(0.05, 150, alpha=0.2)
    assert "faster" not in alarms
    # Half of alpha lies on this side; 24 of 150 is beyond it by 2.5 deviations.
    assert alarms.count("slower") <= 24


def _in_looks(slowdown: float, trial: int, looks: int, **how: float) -> gate.Verdict:
    rng = np.random.default_rng([trial, round(1000 * slowdown) + 500])
    take = functools.partial(simulate, rng, slowdown, own=0.15)
    return judge_in_looks(take, looks=looks, num_resamples=600, **how)


def test_looks_find_what_one_look_is_too_noisy_for() -> None:
    once, often = ([_in_looks(0.10, trial, looks) for trial in range(20)] for looks in (1, 8))
    assert sum(verdict.alarm == "slower" for verdict in once) <= 10
    assert sum(verdict.alarm == "slower" for verdict in often) >= 19
    assert {verdict.num_groups for verdict in once} == {3}
    assert len({verdict.num_groups for verdict in often}) > 2
    assert all(verdict.num_groups <= 24 for verdict in often)


def test_looks_share_alpha() -> None:
    """At the threshold itself, the worst case: unshared, four looks alarm in 14 of 100."""
    alarms = [_in_looks(0.05, trial, looks=4, alpha=0.2).alarm for trial in range(100)]
    assert "faster" not in alarms
    assert alarms.count("slower") <= 10


def test_looks_end_as_soon_as_the_interval_keeps_within_or_clears_the_threshold() -> None:
    rng = np.random.default_rng(0)

    def take(level: float) -> tuple[Groups, Groups]:
        a, b = (list(rng.normal(x, 0.01, 50)) for x in (1.0, level))
        return [a] * 3, [b] * 3

    for level, alarm in ((1.0, None), (1.2, "slower"), (0.8, "faster")):
        verdict = judge_in_looks(functools.partial(take, level), looks=5)
        assert (verdict.alarm, verdict.settled, verdict.num_groups) == (alarm, True, 3)
    verdict = judge_in_looks(functools.partial(take, 1.05), looks=5)
    assert (verdict.alarm, verdict.settled, verdict.num_groups) == (None, False, 15)
    with pytest.raises(ValueError, match="looks: expected at least 1, got 0"):
        judge_in_looks(functools.partial(take, 1.0), looks=0)


def test_taking_turns_removes_what_both_feel() -> None:
    widths = []
    for in_turns in (True, False):
        pair = simulate(np.random.default_rng(5), 0.0, drift=0.3, own=0.01)
        verdict = judge(*pair, in_turns=in_turns, num_resamples=300)
        widths.append(verdict.high - verdict.low)
    assert widths[0] < widths[1] / 2


def test_one_slow_process_is_no_alarm() -> None:
    rng = np.random.default_rng(0)
    baseline = [list(rng.normal(1.0, 0.01, 50)) for _ in range(3)]
    candidate = [list(rng.normal(level, 0.01, 50)) for level in (1.0, 1.0, 1.3)]
    assert judge(baseline, candidate).alarm is None
    assert judge(baseline, [candidate[2]] * 3).alarm == "slower"


def test_what_a_process_of_three_does_not_show_is_no_alarm() -> None:
    rng = np.random.default_rng(0)
    baseline = [list(rng.normal(1.0, 0.01, 50)) for _ in range(3)]
    candidate = [list(rng.normal(level, 0.01, 50)) for level in (1.0, 1.1, 1.1)]
    verdict = judge(baseline, candidate)
    assert verdict.ratio > 1.05 and verdict.p_value < 1e-6
    assert verdict.alarm is None and verdict.low < 1.02


def test_interval_holds_what_it_says_where_noise_has_a_memory() -> None:
    """Resampling single samples would take them for independent, and miss far more often."""
    rng, covered = np.random.default_rng(7), {None: 0, 1: 0}
    for _ in range(120):
        a, b = (np.exp(0.05 * _autocorrelated(rng, 120, 0.7)) for _ in range(2))
        for block in covered:
            low, high = ratio_interval(
                [a], [b], alpha=0.1, in_turns=False, num_resamples=150, seed=1, block=block
            )
            covered[block] += low <= 1 <= high
    assert covered[None] >= 94 and covered[1] <= 80, covered


def test_a_small_difference_is_told_apart_and_does_not_count() -> None:
    rng = np.random.default_rng(0)
    baseline = [list(rng.normal(1.0, 0.001, 100))]
    candidate = [list(rng.normal(1.02, 0.001, 100))]
    verdict = judge(baseline, candidate)
    assert verdict.alarm is None and verdict.p_value < 1e-9 and verdict.low > 1.01
    assert judge(baseline, candidate, threshold=0.01).alarm == "slower"


@pytest.mark.parametrize(
    ("baseline", "candidate", "how", "message"),
    [
        ([[1.0]], [[1.0]], {"alpha": 0.0}, "alpha: expected a probability"),
        ([[1.0]], [[1.0]], {"threshold": -0.1}, "threshold: expected at least 0"),
        ([], [[1.0]], {}, "baseline: expected groups"),
        ([[1.0]], [[]], {}, "candidate: expected groups"),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]], {}, "baseline: expected groups of one size"),
        ([[1.0]], [[0.0]], {}, "candidate: expected times above 0"),
        ([[1.0]], [[1.0, 2.0]], {}, r"groups of \[1\] samples, got \[2\]"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    baseline: Sequence[Sequence[float]],
    candidate: Sequence[Sequence[float]],
    how: dict[str, float],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        judge(baseline, candidate, **how)  # type: ignore[arg-type]
