"""Experiment trackers that receive the logged rows, each through its own library.

A resumed run continues the same run at a tracker: its id is in tracking.json in the run's
directory.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json

logger = logging.getLogger(__name__)

_FILE = "tracking.json"


class WandbSink:
    """Sends rows to Weights & Biases, with their step, so that those after a rollback are kept."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        run_id = _run_id(run_dir, "wandb") or uuid.uuid4().hex[:16]
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            resume="allow",
        )
        _save_run_id(run_dir, "wandb", run_id)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the row to wandb's own process, which sends it."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is pending and finish the run there."""
        self._run.finish()


class MlflowSink:
    """Sends rows to MLflow, to the experiment m3i-fast, from MLflow's own thread."""

    EXPERIMENT = "m3i-fast"
    PARAM_LENGTH = 500  # longest value; some servers refuse longer ones

    def __init__(self, uri: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._pending: list[Any] = []
        run_id = _run_id(run_dir, "mlflow")
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return
        experiment = self._client.get_experiment_by_name(self.EXPERIMENT)
        number = (
            self._client.create_experiment(self.EXPERIMENT)
            if experiment is None
            else experiment.experiment_id
        )
        self._id = str(self._client.create_run(number, run_name=run_dir.name).info.run_id)
        _save_run_id(run_dir, "mlflow", self._id)
        for name, value in _flat("", config).items():
            self._client.log_param(self._id, name, str(value)[: self.PARAM_LENGTH])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the row of a step for sending."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_allowed(name), value, now, step) for name, value in values.items()]
        self._pending.append(self._client.log_batch(self._id, metrics=metrics, synchronous=False))

    def close(self) -> None:
        """Wait until all rows are sent; log those that cannot be, without an error."""
        for sent in self._pending:
            try:
                sent.wait()
            except Exception as error:
                logger.warning("mlflow: rows are missing there: %s", error)
                break
        self._pending = []
        self._client.set_terminated(self._id)


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


def _run_id(run_dir: Path, tracker: str) -> str | None:
    return _ids(run_dir).get(tracker)


def _save_run_id(run_dir: Path, tracker: str, run_id: str) -> None:
    text = json.dumps(_ids(run_dir) | {tracker: run_id}) + "\n"
    write_atomically(run_dir / _FILE, text.encode())


def _ids(run_dir: Path) -> dict[str, str]:
    """Return the run's id by tracker; a damaged file is reported and its ids are lost."""
    try:
        ids: dict[str, str] = read_json(run_dir / _FILE, {str: str})
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s; the run starts as a new one at its trackers", error)
        return {}
    return ids
