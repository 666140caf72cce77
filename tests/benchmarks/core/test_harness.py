"""The harness times what it is given, and keeps what it has measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table

from m3i_fast.benchmarks.core import harness
from m3i_fast.benchmarks.core.harness import measure
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.rows import read_rows


class _Clock:
    """Clock that calls of `spend` move on, and nothing else does."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> None:
        self.now_s += seconds


def test_measure_finds_the_time_of_a_call() -> None:
    """After a first call, which compiles, and a warm-up of two."""
    clock, times_s = _Clock(), iter([9.0, 0.25, 0.75, 1.0, 4.0, 2.0, 5.0, 3.0])
    functions = {"work": lambda: clock.spend(next(times_s))}
    timing = measure(functions, num_samples=5, warmup_s=1.0, clock=clock)["work"]
    assert timing.samples_ms == (1000.0, 4000.0, 2000.0, 5000.0, 3000.0)
    assert (timing.p20_ms, timing.median_ms, timing.p80_ms) == (1800.0, 3000.0, 4200.0)
    assert timing.num_samples == 5 and next(times_s, None) is None


def test_measure_repeats_short_calls_until_a_sample_is_long() -> None:
    clock, call_s, calls = _Clock(), 2.0**-14, 0  # sums of it are exact

    def count() -> None:
        nonlocal calls
        calls += 1
        clock.spend(call_s)

    timing = measure({"count": count}, num_samples=3, warmup_s=2.0**-10, clock=clock)["count"]
    assert calls == 1 + 16 + 3 * round(harness.MIN_SAMPLE_S / call_s)
    assert timing.median_ms == 1000 * call_s


def test_measure_takes_turns_at_going_first() -> None:
    clock, order = _Clock(), ""

    def slow(name: str) -> None:
        nonlocal order
        clock.spend(2 * harness.MIN_SAMPLE_S)
        order += name

    functions = {name: (lambda name=name: slow(name)) for name in "abc"}
    measure(functions, num_samples=3, warmup_s=0.0, clock=clock)
    assert order == "aabbcc" + "abcbcacab"


def test_measure_reads_the_clock_of_the_host() -> None:
    """A sample is no longer than all of the calls took, by the clock that a person has."""
    begun = time.perf_counter()
    timing = measure({"sum": lambda: sum(range(1000))}, num_samples=1, warmup_s=0.0)["sum"]
    assert 0 < timing.median_ms < 1000 * (time.perf_counter() - begun)


def test_measure_wants_a_sample() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        measure({"nothing": lambda: None}, num_samples=0)


@pytest.mark.gpu
def test_measure_waits_for_the_gpu() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    timing = measure({"matmul": lambda: a @ a, "add": lambda: a + a}, device="cuda", num_samples=5)
    # No card does 1e15 products and sums of fp32 a second, or moves 2e13 bytes.
    assert timing["matmul"].median_ms > 1000 * 2 * 4096**3 / 1e15
    assert timing["add"].median_ms > 1000 * 3 * 4 * 4096**2 / 2e13


def test_rows_measured_before_an_interruption_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)

    def rows() -> Iterator[dict[str, Any]]:
        yield {"ms": 1.0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.publish("speed", rows(), lambda _: Table(), record=True)
    assert [row["figures"] for row in read_rows("speed", folder=tmp_path)] == [{"ms": 1.0}]


def test_ranks_are_parsed() -> None:
    assert harness.parse_counts("1,2,4") == [1, 2, 4]
