"""Trackers by their own libraries, offline: a resume goes on with the same run."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from mlflow import MlflowClient

from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.observe.metrics import Ended
from m3i_fast.observe.sinks import live, trackers
from m3i_fast.observe.sinks.live import LiveSinks, expect_live_sinks, open_live_sinks
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


def _mlflow_run(uri: str, run_dir: Path) -> str:
    run_id: str = json.loads((run_dir / "tracking.json").read_text())["mlflow"]
    assert MlflowClient(tracking_uri=uri).get_run(run_id).info.run_name == run_dir.name
    return run_id


def test_mlflow_is_told_how_a_run_ended(tmp_path: Path, mlflow_uri: str) -> None:
    found: dict[str, Ended] = {}
    for ended in get_args(Ended):
        MlflowSink(mlflow_uri, tmp_path, CONFIG).close(ended)
        run = MlflowClient(tracking_uri=mlflow_uri).get_run(_mlflow_run(mlflow_uri, tmp_path))
        found[run.info.status] = ended
    assert found == {"FINISHED": "complete", "KILLED": "stopped", "FAILED": "failed"}


def test_another_mlflow_server_gets_a_run_of_its_own(
    tmp_path: Path, mlflow_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    MlflowSink(mlflow_uri, tmp_path, CONFIG).close()
    first = _mlflow_run(mlflow_uri, tmp_path)
    other = f"{mlflow_uri}-2"
    MlflowSink(other, tmp_path, CONFIG).close()
    assert _mlflow_run(other, tmp_path) != first
    assert f"the run was at {mlflow_uri} before" in caplog.text
    (folder,) = tmp_path.glob(f"store-2/*/{_mlflow_run(other, tmp_path)}")
    shutil.rmtree(folder)
    MlflowSink(other, tmp_path, CONFIG).close()
    assert f"{other} has no run" in caplog.text
    assert _mlflow_run(other, tmp_path)


def test_mlflow_that_takes_no_rows_costs_one_warning(
    tmp_path: Path, mlflow_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = LiveSinks({"MLflow": lambda: MlflowSink(mlflow_uri, tmp_path, CONFIG)})
    shutil.rmtree(tmp_path / "store")
    deadline = time.monotonic() + 60  # its thread sends, the next row tells
    while "MLflow: " not in caplog.text:
        assert time.monotonic() < deadline
        sinks.log(5, {"loss/total": 1.0})
        time.sleep(0.02)
    sinks.log(10, {"loss/total": 1.0})
    sinks.close()
    told = [text for text in caplog.messages if "MLflow" in text]
    assert len(told) == 1 and "metrics.jsonl has them all" in told[0]


def test_the_end_of_a_run_waits_for_mlflow_within_limits(
    tmp_path: Path,
    mlflow_uri: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 5)
    sinks = LiveSinks({"MLflow": lambda: MlflowSink(mlflow_uri, tmp_path, CONFIG)})
    answers = threading.Event()
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: answers.wait(120))
    try:
        sinks.log(5, {"loss/total": 1.0})
        began = time.monotonic()
        sinks.close()
        assert time.monotonic() - began < 60  # far from the 120 s of the server
        assert "MLflow: no answer within 5 s; this part" in caplog.text
    finally:
        answers.set()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_mlflow_that_does_not_answer_is_refused_before_a_run(
    silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_CHECK_SECONDS", 2)
    cfg = TelemetryConfig(mlflow_uri=silent_server)
    told = rf"telemetry\.mlflow_uri: .*{silent_server}.*no answer within 2 s"
    with pytest.raises(ValueError, match=told):
        expect_live_sinks(cfg)
    expect_live_sinks(cfg, is_new=False)  # a resume is not kept from going on


def test_mlflow_s_own_refusal_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"telemetry\.mlflow_uri: .*'no-such-scheme://x': .+"):
        expect_live_sinks(TelemetryConfig(mlflow_uri="no-such-scheme://x"))


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


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once
    yield
    with suppress(ConnectionError):  # of a process that a test has killed
        wandb.teardown()


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_offline_keeps_the_parts_of_a_resumed_run_apart(tmp_path: Path) -> None:
    expect_live_sinks(TelemetryConfig(wandb_project="m3i"))  # offline needs no login
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    groups, ids = set(), set()
    for step in (5, 10):
        sink = WandbSink("m3i", run_dir, CONFIG)
        sink.log(step, {"loss/total": 1.0 / step})
        groups.add(sink._run.group)
        ids.add(sink._run.id)
        sink.close()
    assert groups == {json.loads((run_dir / "tracking.json").read_text())["wandb"]}
    files = [run_dir.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb") for name in ids]
    (first,), (second,) = files
    deadline = time.monotonic() + 60  # another process writes them
    while not all(b"loss/total" in file.read_bytes() for file in (first, second)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _wandb_records(file: Path) -> dict[str, Any]:
    """The last record of each kind in a file of W&B's: LevelDB's log of one block, in protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, content, at = {}, file.read_bytes(), 7  # behind the file's own header
    while at + 7 <= len(content):
        length, kind = struct.unpack("<4xHB", content[at : at + 7])
        assert kind == 1  # whole
        record = Record.FromString(content[at + 7 : at + 7 + length])
        found[record.WhichOneof("record_type")] = record
        at += 7 + length
    return found


@pytest.mark.usefixtures("wandb_offline")
@pytest.mark.parametrize("ended", get_args(Ended))
def test_wandb_is_told_how_a_run_ended(tmp_path: Path, ended: Ended) -> None:
    sink = WandbSink("m3i", tmp_path, CONFIG)
    sink.close(ended)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # another process writes them
    while "exit" not in (records := _wandb_records(file)):
        assert time.monotonic() < deadline, records
        time.sleep(0.05)
    assert records["exit"].exit.exit_code == (0 if ended == "complete" else 1)
    assert ("preempting" in records) == (ended == "stopped")


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_s_process_that_is_killed_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch system signals every process of a job, wandb's own among them."""
    sinks = LiveSinks({"Weights & Biases": lambda: WandbSink("m3i", tmp_path, CONFIG)})
    for child in psutil.Process().children(recursive=True):
        if "wandb" in child.name():
            child.kill()
            child.wait(60)
    sinks.log(5, {"loss/total": 1.0})
    sinks.log(10, {"loss/total": 1.0})
    sinks.close()
    assert len([text for text in caplog.messages if "Weights & Biases: " in text]) == 1


def test_wandb_without_a_login_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    cfg = TelemetryConfig(wandb_project="m3i")
    told = r"telemetry\.wandb_project: .*wandb login.*WANDB_MODE=offline"
    with pytest.raises(ValueError, match=told):
        expect_live_sinks(cfg)
    expect_live_sinks(cfg, is_new=False)
    wandb.teardown()


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
    sinks = open_live_sinks(TelemetryConfig(), tmp_path, recipe="demo", rank=0, config={})
    sinks.log(5, {"loss/total": 1.0})
    sinks.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(port: int) -> None:
    with pytest.raises(ValueError, match="telemetry.prometheus_port: expected 0 to 65535"):
        TelemetryConfig(prometheus_port=port)
