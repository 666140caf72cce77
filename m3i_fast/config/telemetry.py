"""What a run measures of its machine, and where its rows are sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated

from m3i_fast.config.fields import Checked, Conflict


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig(Checked):
    """Measure the machine and send rows on.

    None of it changes the result of a run: a resume may have other values.
    """

    hz: float = 1.0
    """Samples a second of the GPUs and the processor of the first rank's node, 0.1 to 10, whose
    means are logged; 0: none."""
    prometheus_port: Annotated[int, range(2**16)] = 0
    """Port at which the first rank serves the last logged row to Prometheus; 0: none.
    launch/grafana.json shows it."""
    prometheus_address: str = "127.0.0.1"
    """IPv4 or IPv6 address that prometheus_port is opened on. Anyone who reaches it can read the
    rows: the default serves this machine alone, 0.0.0.0 or :: every interface."""
    wandb_project: str = ""
    """Weights & Biases project that the logged rows go to, too; WANDB_MODE=offline keeps them in
    the run's directory."""
    mlflow_uri: str = ""
    """MLflow tracking server (http://..., sqlite:///...) that the logged rows go to, too."""

    def place(self) -> str:
        return "telemetry."

    def conflicts(self) -> Iterator[Conflict]:
        if self.hz != 0 and not 0.1 <= self.hz <= 10:
            yield "hz", f"expected 0, or 0.1 to 10, got {self.hz}"
        try:
            ip_address(self.prometheus_address)
        except ValueError:
            yield (
                "prometheus_address",
                "expected an IPv4 or IPv6 address (127.0.0.1, ::1; 0.0.0.0 or :: for every "
                f"interface), got {self.prometheus_address!r}",
            )
