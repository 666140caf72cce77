"""What a run tells of itself while it lasts. Every command imports this: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Changes nothing of what is trained: a resume may have others."""

    hz: float = 1.0
    """Samples a second of the GPUs and the processor of the first rank's node, 0.1 to 10, whose
    means are logged; 0: none."""
    prometheus_port: int = 0
    """Port at which the first rank serves the last logged row to Prometheus; 0: none.
    launch/grafana.json shows it."""
    prometheus_address: str = "127.0.0.1"
    """IPv4 or IPv6 address of the interface that prometheus_port is opened on. Anyone who reaches it
    can read the rows: the default serves this machine alone, 0.0.0.0 or :: every interface."""
    wandb_project: str = ""
    """Weights & Biases project that the logged rows go to, too; WANDB_MODE=offline keeps them in
    the run's directory."""
    mlflow_uri: str = ""
    """MLflow tracking server (http://..., sqlite:///...) that the logged rows go to, too."""

    def __post_init__(self) -> None:
        if self.hz != 0 and not 0.1 <= self.hz <= 10:
            raise ValueError(f"telemetry.hz: expected 0, or 0.1 to 10, got {self.hz}")
        if not 0 <= self.prometheus_port <= 65535:
            raise ValueError(
                f"telemetry.prometheus_port: expected 0 to 65535, got {self.prometheus_port}"
            )
        try:
            ip_address(self.prometheus_address)
        except ValueError:
            raise ValueError(
                "telemetry.prometheus_address: expected an IPv4 or IPv6 address (127.0.0.1, ::1; "
                f"0.0.0.0 or :: for every interface), got {self.prometheus_address!r}"
            ) from None
