"""Sinks that receive a run's rows while it trains, beside its files, as `telemetry` configures."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.observe.metrics import Ended

logger = logging.getLogger(__name__)

# The config's field, the module that it needs, and what to install.
_NEEDS = {
    "prometheus_port": ("prometheus_client", "prometheus-client"),
    "wandb_project": ("wandb", "wandb"),
    "mlflow_uri": ("mlflow", "mlflow"),
}


class LiveSink(Protocol):
    """A service that logged rows are sent to; any of its methods may raise what it likes."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the row of a step."""

    def close(self, ended: Ended = "complete") -> None:
        """Send what is pending, and how the run ended."""


class LiveSinks:
    """The services of a run. One that fails costs a warning and its later rows, never the run."""

    def __init__(self, openers: Mapping[str, Callable[[], LiveSink]]) -> None:
        """Open each service by its name."""
        self._sinks: dict[str, LiveSink] = {}
        for name, opener in openers.items():
            try:
                self._sinks[name] = opener()
            except Exception as error:
                _warn(name, error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the row of a step to all services that have not failed."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.log(step, values)
            except Exception as error:
                _warn(name, error)
                del self._sinks[name]

    def close(self, ended: Ended = "complete") -> None:
        """Close them, each within `CLOSE_SECONDS` of its tracker."""
        sinks, self._sinks = self._sinks, {}
        for name, sink in sinks.items():
            try:
                sink.close(ended)
            except Exception as error:
                _warn(name, error)


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "%s: %s; this part of the run sends it no more rows, metrics.jsonl has them all",
        name,
        str(error) or repr(error),
    )


def expect_live_sinks(cfg: TelemetryConfig, *, is_new: bool = True) -> None:
    """Raise before a run begins: ValueError for a missing library, OSError for a port in use.

    is_new: whether the run begins. Then its trackers have to answer, or ValueError is raised; a run
    that is resumed goes on without one that does not, as it does where one fails later.
    """
    for field, (module, package) in _NEEDS.items():
        if getattr(cfg, field) and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"telemetry.{field}: expected {module}, not installed: pip install {package}"
            )
    if cfg.prometheus_port:
        from m3i_fast.observe.sinks.prometheus import expect_free

        expect_free(cfg.prometheus_address, cfg.prometheus_port)
    if is_new and (cfg.wandb_project or cfg.mlflow_uri):
        from m3i_fast.observe.sinks.trackers import expect_mlflow, expect_wandb

        if cfg.wandb_project:
            expect_wandb()
        if cfg.mlflow_uri:
            expect_mlflow(cfg.mlflow_uri)


def open_live_sinks(
    cfg: TelemetryConfig, run_dir: Path, *, recipe: str, rank: int, config: Mapping[str, Any]
) -> LiveSinks:
    """Open the configured sinks; each library is imported only where it is used.

    config: of the run, for the trackers.
    """

    def prometheus() -> LiveSink:
        from m3i_fast.observe.sinks.prometheus import PrometheusSink

        address, port = cfg.prometheus_address, cfg.prometheus_port
        return PrometheusSink(address, port, run=run_dir.name, recipe=recipe, rank=rank)

    def wandb() -> LiveSink:
        from m3i_fast.observe.sinks.trackers import WandbSink

        return WandbSink(cfg.wandb_project, run_dir, config)

    def mlflow() -> LiveSink:
        from m3i_fast.observe.sinks.trackers import MlflowSink

        return MlflowSink(cfg.mlflow_uri, run_dir, config)

    asked = {
        "Prometheus": (cfg.prometheus_port, prometheus),
        "Weights & Biases": (cfg.wandb_project, wandb),
        "MLflow": (cfg.mlflow_uri, mlflow),
    }
    return LiveSinks({name: opener for name, (value, opener) in asked.items() if value})
