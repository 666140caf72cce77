"""Stage times: nested stages are not counted twice, on the clock and on CUDA's events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from m3i_fast.observe import stages
from m3i_fast.observe.nvtx import NvtxRange
from m3i_fast.observe.stages import StageTimer, family_of


def test_times_of_nested_stages_sum_to_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 3.0, 7.0, 8.0, 8.5])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(seconds))
    timer = StageTimer(torch.device("cpu"))
    with timer.stage("loss.caption"), timer.stage("fwd.text"):  # 0 to 7, 1 to 3
        pass
    with timer.stage("optim"):  # 8 to 8.5
        pass
    timer.count_step()
    timer.count_step()
    assert timer.read() == {
        "time/fwd.text_ms": 1000.0,
        "time/loss.caption_ms": 2500.0,
        "time/optim_ms": 250.0,
    }
    assert timer.read() == {}


def test_an_open_stage_counts_at_the_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(seconds))
    timer = StageTimer(torch.device("cpu"))
    with timer.stage("log"):
        with timer.stage("ckpt"):
            pass
        timer.count_step()
        assert timer.read() == {"time/ckpt_ms": 1000.0}
    timer.count_step()
    assert timer.read() == {"time/log_ms": 3000.0}


def test_totals_are_of_what_was_read_and_of_what_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 2.0, 4.0, 5.0, 8.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(seconds))
    timer = StageTimer(torch.device("cpu"))
    assert timer.totals() == {}
    with timer.stage("bwd"):
        pass
    assert timer.totals() == {"bwd": 1.0}
    timer.read()
    with timer.stage("optim"):
        pass
    with timer.stage("bwd"):
        assert timer.totals() == {"bwd": 1.0, "optim": 2.0}
    assert timer.totals() == timer.totals() == {"bwd": 4.0, "optim": 2.0}


def test_a_stage_that_fails_is_closed() -> None:
    timer = StageTimer(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="inside"), timer.stage("bwd"):
        raise RuntimeError("inside")
    with timer.stage("optim"):
        time.sleep(0.001)
    times = timer.read()
    assert set(times) == {"time/optim_ms"} and times["time/optim_ms"] >= 1


def test_a_profiler_is_told_of_every_stage() -> None:
    told = []

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        told.append(f"begin {name}")
        yield
        told.append(f"end {name}")

    timer = StageTimer(torch.device("cpu"))
    timer.mark = mark
    with timer.stage("bwd"), timer.stage("comm"):
        pass
    assert told == ["begin bwd", "begin comm", "end comm", "end bwd"]


class _Event:
    """A CUDA event of a device whose clock is `now`, in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.recorded: float | None = None
        self.waited_for = False

    def record(self) -> None:
        self.recorded = _Event.now

    def synchronize(self) -> None:
        self.waited_for = True

    def elapsed_time(self, end: _Event) -> float:
        assert end.waited_for and end.recorded is not None and self.recorded is not None
        return end.recorded - self.recorded


def test_on_a_gpu_events_are_read_when_logging_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    timer = StageTimer(torch.device("cuda"))
    assert timer.mark is NvtxRange
    timer.mark = lambda name: contextmanager(lambda: iter([None]))()
    with timer.stage("bwd"):
        _Event.now += 5
        with timer.stage("comm"):
            _Event.now += 2
    timer.count_step()
    assert not any(span.end.waited_for for span in timer._spans)
    assert timer.read() == {"time/comm_ms": 2.0, "time/bwd_ms": 5.0}


def test_every_term_belongs_to_the_loss() -> None:
    assert [family_of(name) for name in ("loss.total", "loss.intra", "bwd")] == [
        "loss",
        "loss",
        "bwd",
    ]
