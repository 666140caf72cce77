"""Trackers by their own libraries, offline: a resume goes on with the same run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.observe.sinks import live
from m3i_fast.observe.sinks.live import expect_live_sinks, open_live_sinks
from m3i_fast.observe.sinks.trackers import MlflowSink, WandbSink

CONFIG = {"seed": 3, "vision": {"dim": 64, "name": "x" * 900}}


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more packages
    return f"file://{tmp_path}/store"


def test_mlflow_keeps_one_run_over_a_resume(tmp_path: Path, mlflow_uri: str) -> None:
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    for step, loss in ((5, 4.0), (10, 3.0)):
        sink = MlflowSink(mlflow_uri, run_dir, CONFIG)
        sink.log(step, {"loss/total": loss, "loss/a+b": 1.0})
        sink.close()
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("m3i-fast")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "demo" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(5, 4.0), (10, 3.0)]
    assert run.data.metrics["loss/a_b"] == 1.0
    assert run.data.params["seed"] == "3" and run.data.params["vision.name"] == "x" * 500


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"mlflow": {}}', "\0"])
def test_a_damaged_record_of_runs_is_said_and_written_anew(
    tmp_path: Path, mlflow_uri: str, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "tracking.json").write_text(text)
    sink = MlflowSink(mlflow_uri, tmp_path, CONFIG)
    sink.close()
    assert "tracking.json: damaged: " in caplog.text and "starts as a new one" in caplog.text
    found = json.loads((tmp_path / "tracking.json").read_text())
    assert MlflowClient(tracking_uri=mlflow_uri).get_run(found["mlflow"]).info.run_name


def test_wandb_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    for step in (5, 10):
        sink = WandbSink("m3i", run_dir, CONFIG)
        sink.log(step, {"loss/total": 1.0 / step})
        sink.close()
    run_id = json.loads((run_dir / "tracking.json").read_text())["wandb"]
    files = list((run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    deadline = time.monotonic() + 60  # another process writes them
    while not all(file.stat().st_size > 200 for file in files):
        assert time.monotonic() < deadline, [file.stat().st_size for file in files]
        time.sleep(0.05)
    assert files
    assert b"loss/total" in files[0].read_bytes()


@pytest.mark.parametrize(
    ("field", "value", "package"),
    [
        ("prometheus_port", 9100, "prometheus-client"),
        ("wandb_project", "p", "wandb"),
        ("mlflow_uri", "sqlite:///x.db", "mlflow"),
    ],
)
def test_a_library_that_is_missing_is_refused(
    field: str, value: object, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_live_sinks(TelemetryConfig())  # nothing is asked for
    monkeypatch.setattr(live.importlib.util, "find_spec", lambda name: None)
    told = rf"telemetry\.{field}: expected .*, not installed: pip install {package}"
    with pytest.raises(ValueError, match=told):
        expect_live_sinks(TelemetryConfig(**{field: value}))  # type: ignore[arg-type]


def test_nothing_is_opened_that_is_not_asked_for(tmp_path: Path) -> None:
    assert open_live_sinks(TelemetryConfig(), tmp_path, recipe="demo", rank=0, config={}) == []


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(port: int) -> None:
    with pytest.raises(ValueError, match="telemetry.prometheus_port: expected 0 to 65535"):
        TelemetryConfig(prometheus_port=port)
