"""What a run does about steps that would spoil it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import COUNTS, NUMBERS, Checked, Conflict, unmet


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig(Checked):
    """Skip a step on all ranks where its loss or gradient is not finite on any of them.

    Limits, back-off and rollbacks are applied when the metrics are read, every log_every steps.
    """

    max_in_a_row: Annotated[int, COUNTS] = 10
    """Skipped steps in a row that end the run."""
    max_share: float = 0.1
    """Share of the last 1000 steps that may be skipped; more end the run."""
    backoff_after: Annotated[int, NUMBERS] = 3
    """Skipped steps in a row after which the learning rate is scaled down; 0: never."""
    backoff_scale: float = 0.5
    """Factor of the learning rate, applied again with every further backoff_after in a row."""
    backoff_steps: Annotated[int, COUNTS] = 200
    """Steps that the learning rate stays scaled."""
    spikes: Literal["off", "skip", "rollback"] = "off"
    """What is done about a loss far above its running mean. off: nothing; skip: skip the step;
    rollback: load the last checkpoint before it, and go on with the data that follow."""
    spike_deviations: float = 6.0
    """Standard deviations above the running mean from which on a loss is a spike."""
    spike_window: Annotated[int, range(2, NUMBERS.stop)] = 100
    """Steps that mean and deviation are computed over; the first as many steps are no spikes."""
    max_rollbacks: Annotated[int, NUMBERS] = 3
    """Most rollbacks of a run; one more ends it."""

    def place(self) -> str:
        return "guard."

    def conflicts(self) -> Iterator[Conflict]:
        return unmet(
            self,
            max_share=(0 < self.max_share <= 1, "in (0, 1]"),
            backoff_scale=(0 < self.backoff_scale <= 1, "in (0, 1]"),
            spike_deviations=(self.spike_deviations > 0, "> 0"),
        )
