"""Where a run's rows go while it lasts, beside its files, as `telemetry` asks."""

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


def expect_live(cfg: TelemetryConfig) -> None:
    """Before a run begins: ValueError for a library that is missing, OSError for a taken port."""
    for field, (module, package) in _NEEDS.items():
        if getattr(cfg, field) and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"telemetry.{field}: expected {module}, not installed: pip install {package}"
            )
    if cfg.prometheus_port:
        from m3i_fast.observe.sinks.prometheus import expect_free

        expect_free(cfg.prometheus_address, cfg.prometheus_port)


def open_live(
    cfg: TelemetryConfig, run_dir: Path, *, recipe: str, rank: int, config: Mapping[str, Any]
) -> list[Sink]:
    """config: of the run, for the trackers. Libraries are imported where they are asked for."""
    found: list[Sink] = []
    if cfg.prometheus_port:
        from m3i_fast.observe.sinks.prometheus import PrometheusSink

        place = cfg.prometheus_address, cfg.prometheus_port
        found.append(PrometheusSink(*place, run=run_dir.name, recipe=recipe, rank=rank))
    if cfg.wandb_project or cfg.mlflow_uri:
        from m3i_fast.observe.sinks.trackers import MlflowSink, WandbSink

        if cfg.wandb_project:
            found.append(WandbSink(cfg.wandb_project, run_dir, config))
        if cfg.mlflow_uri:
            found.append(MlflowSink(cfg.mlflow_uri, run_dir, config))
    return found
