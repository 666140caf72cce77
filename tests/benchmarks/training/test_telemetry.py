"""The cost of logging and telemetry: what is measured is what was spent."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.training import telemetry
from m3i_fast.benchmarks.training.telemetry import Config, Cpu, figures_of, main, train_config
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.observe.metrics import JsonlSink
from m3i_fast.observe.telemetry.host import Host
from m3i_fast.recipes import shrink

TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
QUICK = ["--no-record", "--device", "cpu", "--rounds", "2", "--steps", "3", "--hz", "10"]


def burn(seconds: float) -> None:
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


def small(config: Config) -> TrainConfig:
    cfg = train_config(config)
    tiny = shrink(cfg, path=Path("nowhere"), num_classes=9, text=TEXT)
    return replace(tiny, num_steps=cfg.num_steps, log_every=cfg.log_every)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows of the benchmark run with tiny steps."""
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(telemetry, "train_config", small)
    monkeypatch.setattr(telemetry, "figures_of", lambda *a: rows.append(figures_of(*a)) or rows[-1])
    return rows


def test_a_row(measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    main([*QUICK, "--seconds", "0.5"])
    (row,) = measured
    assert row["recipe"] == "demo" and row["log_every"] == 3 and row["hz"] == 10
    assert row["ratio"]["num_samples"] == 2 and row["step_ms"]["with"]["median"] > 0
    cpu = row["cpu"]
    assert 0 < cpu["sample_ms"] < 100 and 0 < cpu["add_ms"] < 100 and 0 < cpu["row_ms"] < 1000
    log = (cpu["add_ms"] + cpu["row_ms"] / 3) / row["step_ms"]["without"]["median"]
    assert cpu["log_share"] == pytest.approx(log)
    assert cpu["share_of_a_step"] == pytest.approx(log + 10 * cpu["sample_ms"] / 1e3)
    assert "a step with, beside without" in capsys.readouterr().out


def test_what_is_spent_is_seen(
    measured: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 ms more a sample and 60 ms more a row."""
    read, log = Host.read, JsonlSink.log
    monkeypatch.setattr(Host, "read", lambda self: burn(0.03) or read(self))
    monkeypatch.setattr(JsonlSink, "log", lambda *arguments: burn(0.06) or log(*arguments))
    main([*QUICK, "--seconds", "0.5"])
    (row,) = measured
    assert row["cpu"]["sample_ms"] >= 30 and row["cpu"]["row_ms"] >= 60
    assert row["step_ms"]["with"]["median"] > row["step_ms"]["without"]["median"] + 10


def test_time_asleep_is_no_processor_time() -> None:
    cpu = Cpu()
    assert cpu.of(lambda x: time.sleep(0.2) or x, 3) == 3
    cpu.of(burn, 0.02)
    assert cpu.calls == 2 and 0.01 < cpu.per < 0.1


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="recipe: expected one of demo"):
        Config(recipe="demmo")
    with pytest.raises(ValueError, match="got 0, 0 and 10"):
        Config(rounds=0)
