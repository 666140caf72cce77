"""Calibration takes the steps it says, on the threads of the config, and leaves nothing behind."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.planning import step_budget as calibration
from m3i_fast.planning.step_budget import calibrate
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)


@pytest.fixture
def cfg(dataset: Path) -> Iterator[TrainConfig]:
    before = torch.get_num_threads()
    yield replace(shrink(demo(), path=dataset, num_classes=9, text=TEXT), num_threads=2)
    torch.set_num_threads(before)


def test_steps_are_seconds_over_those_of_a_step(
    cfg: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(calibration, "NUM_WARM", 3)
    monkeypatch.setattr(calibration, "NUM_TIMED", 5)
    taken: list[int] = []  # threads, by step
    step = TrainStep.__call__

    def count(train_step: TrainStep, *arguments: object) -> object:
        taken.append(torch.get_num_threads())
        return step(train_step, *arguments)  # type: ignore[arg-type]

    def clock() -> float:  # 0.1 s a step, but 5 s the sixth
        return 100.0 + len(taken) / 10 + 4.9 * (len(taken) >= 6)

    monkeypatch.setattr(TrainStep, "__call__", count)
    timer = SimpleNamespace(perf_counter=clock, thread_time=clock)
    monkeypatch.setattr(calibration, "time", timer)
    told: list[tuple[int, int]] = []
    assert calibrate(cfg, 9.0, lambda done, total: told.append((done, total))) == 90
    assert taken == [2] * 8 and told == [(done, 8) for done in range(1, 9)]
    assert list(tmp_path.iterdir()) == []
    assert calibrate(cfg, 0.1) == 5  # never fewer than were timed


@pytest.mark.parametrize(("cpu", "warned"), [(0.7, False), (0.5, True)])
def test_steps_are_timed_again_on_a_busy_machine(
    cpu: float,
    warned: bool,
    cfg: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = 0
    step = TrainStep.__call__

    def count(train_step: TrainStep, *arguments: object) -> object:
        nonlocal taken
        taken += 1
        return step(train_step, *arguments)  # type: ignore[arg-type]

    def clock() -> float:  # 1 s a step, and 0.25 s when they are timed again
        return min(taken, 20) + 0.25 * max(taken - 20, 0)

    monkeypatch.setattr(TrainStep, "__call__", count)
    timer = SimpleNamespace(perf_counter=clock, thread_time=lambda: cpu * clock())
    monkeypatch.setattr(calibration, "time", timer)
    assert calibrate(cfg, 100.0) == (400 if warned else 100)
    assert taken == (32 if warned else 20)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warned


@pytest.mark.parametrize("seconds", [0.0, math.nan, math.inf])
def test_a_time_is_positive_and_finite(cfg: TrainConfig, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"seconds: expected a finite number > 0, got {seconds}"):
        calibrate(cfg, seconds)
