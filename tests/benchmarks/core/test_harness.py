"""The harness times what it is given, and keeps what it has measured."""

from __future__ import annotations

import statistics
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


def test_measure_finds_the_time_of_a_call() -> None:
    timing = measure({"sleep": lambda: time.sleep(0.01)}, num_samples=5, warmup_s=0.0)["sleep"]
    assert timing.num_samples == 5
    assert 10.0 <= timing.p20_ms <= timing.median_ms <= timing.p80_ms < 100.0
    assert len(timing.samples_ms) == 5
    assert statistics.median(timing.samples_ms) == pytest.approx(timing.median_ms, rel=1e-3)


def test_measure_repeats_short_calls_until_a_sample_is_long() -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    timing = measure({"count": count}, num_samples=3, warmup_s=0.001)["count"]
    assert calls > 300
    assert timing.median_ms < 0.1


def test_measure_takes_turns_at_going_first() -> None:
    order: list[str] = []

    def slow(name: str) -> None:
        time.sleep(2 * harness.MIN_SAMPLE_S)
        order.append(name)

    functions = {name: (lambda name=name: slow(name)) for name in "abc"}
    measure(functions, num_samples=3, warmup_s=0.0)
    assert "".join(order[-9:]) == "abcbcacab"


def test_measure_wants_a_sample() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        measure({"nothing": lambda: None}, num_samples=0)


@pytest.mark.gpu
def test_measure_waits_for_the_gpu() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    timing = measure({"matmul": lambda: a @ a, "add": lambda: a + a}, device="cuda", num_samples=5)
    assert timing["matmul"].median_ms > timing["add"].median_ms > 0


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
