"""A signal finds a run in any of its parts: it saves what it has done, and says with what code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.saver import HostCopy, Saver
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.observe.metrics import DeviceMeans, JsonlSink
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.small_run import TEXT

AT = 3  # the call in which the signal comes
# What is being done then: where, steps that are saved at the end, options.
PARTS: dict[str, tuple[type, str, int, dict[str, Any]]] = {
    "data": (Loader, "__next__", AT, {}),
    "forward": (MutualInformation, "encode_inputs", AT, {}),
    "log": (DeviceMeans, "read", AT, {}),
    "metrics file": (JsonlSink, "log", AT, {}),
    "save": (Saver, "_write", 2 * AT, {"async_checkpoint": False}),
    "copy": (HostCopy, "copy", 2 * AT, {}),
    "writing thread": (Saver, "_write", 2 * AT, {}),
}


def _config(dataset: Path, **overrides: object) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    return replace(cfg, num_steps=60, num_threads=1, keep_checkpoints=99, **overrides)  # type: ignore[arg-type]


def _strike(
    monkeypatch: pytest.MonkeyPatch, where: type, method: str, act: Callable[[], None]
) -> None:
    """`act` in the middle of call AT of a method."""
    function, calls = getattr(where, method), [0]

    def struck(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == AT:
            act()
        return function(*arguments, **options)

    monkeypatch.setattr(where, method, struck)


def _send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def _run(cfg: TrainConfig, out: Path, *arguments: str) -> int:
    config = out.with_suffix(".json")
    cfg.save(config)
    return main(["train", "--config", str(config), "--out", str(out), *arguments])


@pytest.mark.parametrize("part", PARTS)
def test_sigterm_saves_whatever_is_being_done(
    part: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, method, steps, options = PARTS[part]
    with monkeypatch.context() as patch:
        _strike(patch, where, method, lambda: _send(signal.SIGTERM, times=3))
        cfg = _config(dataset, **options)
        assert _run(cfg, tmp_path / "run") == os.EX_TEMPFAIL == 75
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert steps <= newest.step <= steps + 2
    assert all(c.damage() is None for c in checkpoint.checkpoints(tmp_path / "run" / "checkpoints"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer = Trainer(cfg, tmp_path / "run", resume=True)
    assert trainer.step == newest.step
    trainer.run.close()


def test_a_signal_as_the_run_ends_is_a_run_that_is_done(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its last save: there is nothing to start the job again for."""
    cfg = replace(_config(dataset, async_checkpoint=False), num_steps=2 * AT)
    _strike(monkeypatch, Saver, "_write", lambda: _send(signal.SIGTERM))
    assert _run(cfg, tmp_path / "run") == 0
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").step == cfg.num_steps


def test_a_second_ctrl_c_stops_at_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _strike(monkeypatch, Loader, "__next__", lambda: _send(signal.SIGINT, times=2))
    assert _run(_config(dataset), tmp_path / "run") == 130
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").step == AT - 1


def test_a_signal_that_ends_the_tracker_too_saves_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slurm signals every process of a job: that of Weights & Biases ends before the run does."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def signal_all() -> None:
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("wandb"):
                child.kill()
                child.wait(60)
                ended.append(child.pid)
        _send(signal.SIGTERM)

    ended: list[int] = []
    _strike(monkeypatch, JsonlSink, "log", signal_all)
    cfg = replace(_config(dataset), telemetry=TelemetryConfig(wandb_project="m3i"), log_every=2)
    assert _run(cfg, tmp_path / "run") == 75
    assert ended and checkpoint.latest(tmp_path / "run" / "checkpoints").step >= 2 * AT
    assert len([text for text in caplog.messages if text.startswith("Weights & Biases: ")]) == 1
    with suppress(ConnectionError):
        wandb.teardown()  # or it complains where this process ends


def test_a_run_trains_on_a_thread(dataset: Path, tmp_path: Path) -> None:
    """As a notebook or a web service starts one; Python hands its signals to the main thread."""
    before = signal.getsignal(signal.SIGTERM)
    cfg = replace(_config(dataset), num_steps=2)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(lambda: Trainer(cfg, tmp_path / "run").train()).result(300)
    assert outcome.step == 2 and outcome.signal is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_cannot_be_built_leaves_its_directory_free(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(_config(dataset), num_steps=2)
    Trainer(cfg, tmp_path / "run").train()
    kept = []

    def fails(self: Trainer, saved: object) -> None:
        kept.append(self)  # as the traceback of a notebook keeps it
        raise ValueError("not as it was")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_restore", fails)
        with pytest.raises(ValueError, match="not as it was"):
            Trainer(cfg, tmp_path / "run", resume=True)
    Trainer(cfg, tmp_path / "run", resume=True).close()
