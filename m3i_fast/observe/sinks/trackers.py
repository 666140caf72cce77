"""Experiment trackers that receive the logged rows, each through its own library.

A resumed run continues the same run at a tracker: its id is in tracking.json in the run's
directory.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json
from m3i_fast.observe.metrics import Ended

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_SECONDS = 60  # a tracker's, to open a run and to send what is pending at its end
_CHECK_SECONDS = 20  # to answer before a run begins
_FILE = "tracking.json"


class WandbSink:
    """Sends rows to Weights & Biases, with their step, so that those after a rollback are kept.

    Offline, every part of a resumed run is a run of its own, in a group: W&B cannot append to a run
    that lies in files, and uploading two parts under one id keeps the rows of one of them.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        run_id = _ids(run_dir).get("wandb") or uuid.uuid4().hex[:16]
        is_offline = wandb.setup().settings.mode in ("offline", "dryrun")
        self._run = wandb.init(
            project=project,
            id=uuid.uuid4().hex[:16] if is_offline else run_id,
            group=run_id if is_offline else None,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            resume=None if is_offline else "allow",
            settings=wandb.Settings(finish_timeout=CLOSE_SECONDS),
        )
        _save_ids(run_dir, wandb=run_id)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the row to wandb's own process, which sends it."""
        self._run.log({"step": step, **values})

    def close(self, ended: Ended = "complete") -> None:
        """Send what is pending, for at most a minute, and finish the run there."""
        if ended == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ended == "complete" else 1)


def expect_wandb() -> None:
    """Raise ValueError where W&B is online and cannot be reached or takes no key from here."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        viewer = wandb.Api(timeout=_CHECK_SECONDS).viewer
    except Exception as error:
        raise ValueError(
            f"telemetry.wandb_project: expected a login at Weights & Biases, got: {error}; type "
            "wandb login or set WANDB_API_KEY, or set WANDB_MODE=offline to keep the rows in the "
            "run's directory"
        ) from error
    logger.debug("Weights & Biases: logged in as %r", viewer)


class MlflowSink:
    """Sends rows to MLflow, to the experiment m3i-fast, from a thread of its own.

    Raises MLflow's errors where the server refuses the run.
    """

    EXPERIMENT = "m3i-fast"
    PARAM_LENGTH = 500  # longest value; some servers refuse longer ones
    _STATUS: Mapping[Ended, str] = {
        "complete": "FINISHED",
        "stopped": "KILLED",
        "failed": "FAILED",
    }

    def __init__(self, uri: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        opened = _in_background(
            lambda: self._continued(uri, run_dir) or self._created(uri, run_dir, config)
        )
        self._id = _within(CLOSE_SECONDS, opened)
        self._rows: queue.SimpleQueue[tuple[int, int, dict[str, float]] | None]
        self._rows = queue.SimpleQueue()
        self._ended: Ended = "complete"
        self._sent = _in_background(self._send)

    def _continued(self, uri: str, run_dir: Path) -> str | None:
        """Return the id of the run that tracking.json names, if this server has it."""
        from mlflow.exceptions import MlflowException

        ids = _ids(run_dir)
        if "mlflow" not in ids:
            return None
        if ids.get("mlflow_uri", uri) != uri:
            logger.warning(
                "mlflow: the run was at %s before; it starts as a new one at %s",
                ids["mlflow_uri"],
                uri,
            )
            return None
        try:
            self._client.update_run(ids["mlflow"], status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("mlflow: %s has no run %s any more; it starts anew", uri, ids["mlflow"])
            return None
        return ids["mlflow"]

    def _created(self, uri: str, run_dir: Path, config: Mapping[str, Any]) -> str:
        experiment = self._client.get_experiment_by_name(self.EXPERIMENT)
        number = (
            self._client.create_experiment(self.EXPERIMENT)
            if experiment is None
            else experiment.experiment_id
        )
        run_id = str(self._client.create_run(number, run_name=run_dir.name).info.run_id)
        _save_ids(run_dir, mlflow=run_id, mlflow_uri=uri)
        for name, value in _flat("", config).items():
            self._client.log_param(run_id, name, str(value)[: self.PARAM_LENGTH])
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the row of a step for sending; raise the error of a row that could not be sent."""
        if self._sent.done():
            self._sent.result()
        self._rows.put((step, int(1000 * time.time()), dict(values)))

    def close(self, ended: Ended = "complete") -> None:
        """Wait until all rows are sent, for at most a minute; raise where some are missing."""
        self._ended = ended
        self._rows.put(None)
        _within(CLOSE_SECONDS, self._sent)

    def _send(self) -> None:
        """Send rows in their order until `close`, then set how the run ended."""
        from mlflow.entities import Metric

        while (row := self._rows.get()) is not None:
            step, now, values = row
            metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
            self._client.log_batch(self._id, metrics=metrics)
        self._client.set_terminated(self._id, status=self._STATUS[self._ended])


def expect_mlflow(uri: str) -> None:
    """Raise ValueError where no MLflow server answers at `uri`."""
    from mlflow import MlflowClient

    def ask() -> None:
        MlflowClient(tracking_uri=uri).get_experiment_by_name(MlflowSink.EXPERIMENT)

    try:
        _within(_CHECK_SECONDS, _in_background(ask))
    except Exception as error:
        raise ValueError(
            f"telemetry.mlflow_uri: expected an MLflow server that answers, got {uri!r}: {error}"
        ) from error


def _within(seconds: float, future: Future[T]) -> T:
    """Return the result, or raise the error, of what has so many seconds left; or TimeoutError."""
    wait([future], seconds)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` on a thread that the end of the process does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="m3i-tracker", daemon=True).start()
    return future


def _allowed(name: str) -> str:
    """Return a name that MLflow takes: letters, digits, _ - . / and spaces."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _flat(path: str, config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        return {path: config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(f"{path}.{name}" if path else name, value)
    return flat


def _save_ids(run_dir: Path, **ids: str) -> None:
    text = json.dumps(_ids(run_dir) | ids) + "\n"
    write_atomically(run_dir / _FILE, text.encode())


def _ids(run_dir: Path) -> dict[str, str]:
    """Return the ids of the run, and its MLflow server; those of a damaged file are lost, told."""
    try:
        ids: dict[str, str] = read_json(run_dir / _FILE, {str: str})
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s; the run starts as a new one at its trackers", error)
        return {}
    return ids
