"""The verdict is right on nodes of which is known what is slow, by the loop that measures all."""

from __future__ import annotations

from dataclasses import replace

import pynvml
import pytest

from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.benchmarks.core.timed_windows import Schedule, Series, Window
from m3i_fast.benchmarks.node.bottleneck import Findings, Throttling, verdict
from m3i_fast.benchmarks.node.figures import (
    joules_per_image,
    kept_windows,
    summarise_ranks,
    throttling,
)
from m3i_fast.benchmarks.node.workloads import BOTH, LOADER, NO_EXCHANGE, SYNTHETIC
from tests.benchmarks.node.planted_node import BATCH, FULL_MHZ, SCHEDULE, Node, found_of, run
from tests.shared.observe.recorded_nvml import Recorded, hopper
from tests.shared.observe.sampled import sampled

PLANTED = {
    "loader": Node(load_s=0.1, model_s=0.04, exchange_s=0.01),
    "model": Node(load_s=0.02, model_s=0.1, exchange_s=0.01),
    "communication": Node(load_s=0.02, model_s=0.05, exchange_s=0.04),
    "throttled clock": Node(load_s=0.02, model_s=0.06, exchange_s=0.01, slow_from_s=100.0),
    "balanced": Node(load_s=0.06, model_s=0.05, exchange_s=0.01),
}
HEADROOM = {
    "loader": 0.1 / 0.05,  # up to the model with its exchange
    "model": 0.11 / 0.02,  # up to the loader
    "communication": 0.09 / 0.05,
    "throttled clock": 1.0,  # the full clock was never seen
    "balanced": 1.0,
}


@pytest.mark.parametrize("expected", PLANTED)
def test_the_verdict_is_what_was_planted(expected: str) -> None:
    found = found_of(run(replace(PLANTED[expected])))
    said = verdict(found)
    assert said.bottleneck == expected
    assert said.headroom == pytest.approx(HEADROOM[expected], rel=0.03)


def test_rates_and_shares_are_those_of_the_planted_times() -> None:
    node = Node(load_s=0.1, model_s=0.06, exchange_s=0.02)
    series = run(node)
    found = found_of(series)
    assert found.loader.median == pytest.approx(BATCH / 0.1, rel=0.01)
    assert found.synthetic.median == pytest.approx(BATCH / 0.08, rel=0.01)
    assert found.both.median == pytest.approx(BATCH / 0.1, rel=0.01)
    assert found.exchange_share == pytest.approx(0.02 / 0.08, rel=0.05)
    assert found.data_wait == pytest.approx(0.02 / 0.1, rel=0.1)
    assert {name: len(each.windows) for name, each in series.items()} == dict.fromkeys(
        (LOADER, SYNTHETIC, BOTH, NO_EXCHANGE), SCHEDULE.num_windows
    )
    # A window has the steps that fill it, and slow first ones are in none.
    assert series[SYNTHETIC].windows[0].num_steps == round(SCHEDULE.window_s / 0.08)
    assert series[SYNTHETIC].is_settled and series[SYNTHETIC].num_warmup_steps > node.first_steps


def test_what_an_earlier_window_left_prepared_is_in_no_window() -> None:
    """Two batches lie ready when the loader's turn comes; in four steps they would be half."""
    node = Node(load_s=0.5, model_s=0.1)
    series = run(node, replace(SCHEDULE, window_s=1.0))
    for name in (LOADER, BOTH):
        for window in series[name].windows:
            assert window.num_steps == 2
            assert window.images_s == pytest.approx(BATCH / 0.5, rel=0.01)


def test_a_throttled_window_is_marked_and_left_out() -> None:
    whole = run(Node(load_s=0.02, model_s=0.06))
    lasts = sum(each.windows[0].seconds for each in whole.values())
    begun = run_begins(Node(load_s=0.02, model_s=0.06))
    node = Node(
        load_s=0.02,
        model_s=0.06,
        slow_from_s=begun + lasts,
        slow_until_s=begun + 2 * lasts,
    )
    series = run(node)
    measured = summarise_ranks([series[SYNTHETIC]] * 2, num_nodes=1)
    assert 1 <= measured.num_throttled == measured.num_left_out <= 2
    assert measured.per_gpu.median == pytest.approx(BATCH / 0.06, rel=0.02)
    assert measured.per_gpu.p5 > 0.9 * BATCH / 0.06
    assert measured.per_node.median == pytest.approx(2 * measured.per_gpu.median)
    found = found_of(series)
    assert verdict(found).bottleneck == "model"
    assert found.throttling.max_mhz == FULL_MHZ
    assert any(
        "windows throttled (sw_thermal_slowdown)" in line for line in verdict(found).evidence
    )


def test_throttling_is_read_from_what_telemetry_tells_of_cards() -> None:
    slow = hopper(
        0,
        nvmlDeviceGetCurrentClocksEventReasons=pynvml.nvmlClocksEventReasonHwSlowdown,
        nvmlDeviceGetClockInfo={pynvml.NVML_CLOCK_SM: 1200, pynvml.NVML_CLOCK_MEM: 2619},
    )
    windows = [
        Window(seconds=1.0, num_steps=1, num_images=1, telemetry=sampled(Recorded(card))[0])
        for card in (slow, hopper(0))
    ]
    found = throttling([Series(windows=windows, num_warmup_steps=1, is_settled=True)])
    assert found == Throttling(
        num_windows=2,
        num_throttled=1,
        reasons=["hw_slowdown"],
        mean_mhz=1200.0,
        max_mhz=1755.0,
    )


def run_begins(node: Node) -> float:
    """When the first window does."""
    first: list[float] = []
    summary = node.summary

    def noted(begin_s: float, end_s: float) -> dict[str, object]:
        first.append(begin_s)
        return summary(begin_s, end_s)

    node.summary = noted  # type: ignore[method-assign]
    run(node)
    return first[0]


def test_windows_are_kept_where_too_few_others_remain() -> None:
    slow = Window(seconds=1.0, num_steps=1, num_images=1, telemetry={"throttled": True})
    good = Window(seconds=1.0, num_steps=1, num_images=1)
    assert kept_windows([(good,)] * 3 + [(slow,)] * 2) == [(good,)] * 3
    assert kept_windows([(good,)] * 2 + [(slow,)]) == [(good,)] * 2 + [(slow,)]  # too few
    assert len(kept_windows([(good,)] * 3 + [(slow,)] * 3)) == 6  # not the rule, but the half
    assert kept_windows([(good, slow), *[(good, good)] * 4]) == [(good, good)] * 4  # any rank


def test_energy_is_that_of_training_with_the_loader() -> None:
    series = run(Node(load_s=0.02, model_s=0.06, exchange_s=0.02))
    joules = joules_per_image([series])
    assert joules == pytest.approx(300.0 * 0.08 / BATCH, rel=0.01)
    silent = {name: replace(each, windows=[]) for name, each in series.items()}
    # The second rank of a node takes no telemetry, and its images count.
    unread = replace(series[BOTH], windows=[replace(w, telemetry={}) for w in series[BOTH].windows])
    assert joules_per_image([series, {**silent, BOTH: unread}]) == pytest.approx(joules / 2)
    assert joules_per_image([{**silent, BOTH: unread}]) is None


FOUND = Findings(
    loader=summarise_rates([99.0, 100.0, 101.0]),
    synthetic=summarise_rates([199.0, 200.0, 201.0]),
    both=summarise_rates([98.0, 99.0, 100.0]),
    data_wait=0.5,
)


def test_rates_whose_intervals_meet_are_not_told_apart() -> None:
    wide = summarise_rates([90.0, 170.0, 220.0])
    assert verdict(FOUND).bottleneck == "loader"
    assert verdict(replace(FOUND, loader=wide)).bottleneck == "balanced"
    near = summarise_rates([193.0, 194.0, 195.0])
    assert verdict(replace(FOUND, loader=near)).bottleneck == "balanced"


def test_a_slow_loader_is_the_bottleneck_whatever_the_clock_and_the_exchange() -> None:
    hot = Throttling(num_windows=5, num_throttled=5, reasons=("hw_slowdown",))
    fast = summarise_rates([399.0, 400.0, 401.0])
    slow_all = replace(FOUND, throttling=hot, without_exchange=fast, num_ranks=2)
    assert verdict(slow_all).bottleneck == "loader"
    of_step = replace(slow_all, loader=summarise_rates([799.0, 800.0, 801.0]))
    assert verdict(of_step).bottleneck == "communication"
    noisy = replace(of_step, without_exchange=summarise_rates([190.0, 400.0, 410.0]))
    assert noisy.exchange_share == 0.5 and verdict(noisy).bottleneck == "throttled clock"
    assert verdict(replace(of_step, without_exchange=None)).bottleneck == "throttled clock"


def test_the_evidence_says_what_is_not_known_and_what_the_parts_take_from_each_other() -> None:
    said = verdict(replace(FOUND, both=summarise_rates([69.0, 70.0, 71.0]))).evidence
    assert "loader alone 100 (99 to 101)" in said[0] and "both together 70 (69 to 71)" in said[0]
    assert said[1:4] == (
        "50% of a step waits for data",
        "one rank: nothing is exchanged",
        "clocks were not read",
    )
    assert said[4].startswith("together they are 30% slower than the slower of the two alone")
    spread = verdict(replace(FOUND, num_ranks=4)).evidence
    assert "--parallel.shard 1" in spread[2] and len(spread) == 4


def test_a_headroom_of_the_clock_is_what_the_full_clock_would_give() -> None:
    hot = Throttling(num_windows=6, num_throttled=3, mean_mhz=1200.0, max_mhz=1800.0)
    found = replace(
        FOUND,
        loader=summarise_rates([900.0] * 3),
        both=summarise_rates([200.0] * 3),
        throttling=hot,
    )
    said = verdict(found)
    assert said.bottleneck == "throttled clock" and said.headroom == pytest.approx(1.5)
    assert "3 of 6 windows throttled: 1,200 MHz in them, 1,800 at most" in said.evidence


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_windows": 2}, "--windows: expected at least 3, got 2"),
        ({"window_s": 0.0}, "--window-seconds: expected > 0, got 0.0"),
        ({"warmup_steps": 0}, "--warmup-steps: expected at least 1, got 0"),
    ],
)
def test_a_schedule_that_tells_nothing_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)  # type: ignore[arg-type]
