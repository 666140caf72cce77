"""Sinks that receive a run's rows while it trains, beside its files, as `telemetry` configures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.observe.metrics import Sink

# The config's field, the module that it needs, and what to install.
_NEEDS = {
    "prometheus_port": ("prometheus_client", "prometheus-client"),
    "wandb_project": ("wandb", "wandb"),
    "mlflow_uri": ("mlflow", "mlflow"),
}


def expect_live_sinks(cfg: TelemetryConfig) -> None:
    """Raise ValueError for a missing library, OSError for a port in use, before a run begins."""
    for field, (module, package) in _NEEDS.items():
        if getattr(cfg, field) and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"telemetry.{field}: expected {module}, not installed: pip install {package}"
            )
    if cfg.prometheus_port:
        from m3i_fast.observe.sinks.prometheus import expect_free

        expect_free(cfg.prometheus_address, cfg.prometheus_port)


def open_live_sinks(
    cfg: TelemetryConfig, run_dir: Path, *, recipe: str, rank: int, config: Mapping[str, Any]
) -> list[Sink]:
    """Open the configured sinks; each library is imported only where it is used.

    config: of the run, for the trackers.
    """
    sinks: list[Sink] = []
    if cfg.prometheus_port:
        from m3i_fast.observe.sinks.prometheus import PrometheusSink

        address, port = cfg.prometheus_address, cfg.prometheus_port
        sinks.append(PrometheusSink(address, port, run=run_dir.name, recipe=recipe, rank=rank))
    if cfg.wandb_project or cfg.mlflow_uri:
        from m3i_fast.observe.sinks.trackers import MlflowSink, WandbSink

        if cfg.wandb_project:
            sinks.append(WandbSink(cfg.wandb_project, run_dir, config))
        if cfg.mlflow_uri:
            sinks.append(MlflowSink(cfg.mlflow_uri, run_dir, config))
    return sinks
