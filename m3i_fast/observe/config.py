"""What a run tells of itself while it lasts. Every command imports this: no torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryConfig:
    """Changes nothing of what is trained: a resume may have others."""

    hz: float = 1.0
    """Samples a second of the GPUs and the processor of the first rank's node, 0.1 to 10, whose
    means are logged; 0: none."""

    def __post_init__(self) -> None:
        if self.hz != 0 and not 0.1 <= self.hz <= 10:
            raise ValueError(f"telemetry.hz: expected 0, or 0.1 to 10, got {self.hz}")
