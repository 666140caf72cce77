"""Which values of the monitors are healthy, and a watch that tells a collapse from learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

PATIENCE = 3  # logged steps in a row: one out of range may be chance


class CollapseError(RuntimeError):
    """A run was to end at a collapse, and one was seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Healthy:
    """The range of a monitor, what it means to leave it, and what to change then."""

    pattern: str
    """Name of the metric; `*` stands for the name of a term."""
    low: float = -math.inf
    high: float = math.inf
    cause: str
    remedy: str

    def holds(self, value: float) -> bool:
        """False for NaN."""
        return self.low <= value <= self.high

    @property
    def text(self) -> str:
        """`at least 1.5`, `at most -0.02`, `1 to 100`."""
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return (
            f"at most {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"
        )


TEACHER = "ema.momentum nearer to 1, objective.decorrelation-weight above 0, a lower optim.lr"
TEMPERATURE = "objective.temperature nearer to 0.07, a lower optim.lr"
PROTOTYPES = "ema.momentum nearer to 1, more objective.num-prototypes, a lower optim.lr"
HEALTHY = (
    Healthy(
        pattern="monitor/*_std",
        low=0.01,
        cause="all images have nearly the same target, so a constant predicts it",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/target_rank",
        low=1.5,
        cause="the targets fill one dimension of the encoder's, so hardly anything is predicted",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/target_alignment",
        low=1e-3,
        cause="the encoder says the same of what it sees and of what it has to predict",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/target_uniformity",
        high=-0.05,
        cause="the targets of all cells point one way",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/target_kmeans_entropy",
        low=0.3,
        cause="nearly all targets are of one or two kinds",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/*_cosine",
        high=0.999,
        cause="predictions equal their targets, which only targets without content allow",
        remedy=TEACHER,
    ),
    Healthy(
        pattern="monitor/*_use",
        low=0.4,
        cause="most images are assigned to one prototype, or to few",
        remedy=PROTOTYPES,
    ),
    Healthy(
        pattern="monitor/*_doubt",
        high=0.999,
        cause="assignments to prototypes are even for each image, and say nothing",
        remedy=PROTOTYPES,
    ),
    Healthy(
        pattern="monitor/*_log_scale",
        low=0.999,
        high=100.1,
        cause="the inverse temperature left its bounds: the softmax is saturated or flat",
        remedy=TEMPERATURE,
    ),
)


def healthy(name: str) -> Healthy | None:
    """The range of a metric; None where none is known."""
    return next((entry for entry in HEALTHY if fnmatchcase(name, entry.pattern)), None)


@dataclass(frozen=True, slots=True)
class Collapse:
    """A monitor that stayed out of its healthy range."""

    name: str
    value: float
    step: int
    healthy: Healthy

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.name} = {self.value:.4g}, the last {PATIENCE} logged steps "
            f"out of its healthy range, {self.healthy.text}: {self.healthy.cause}. "
            f"Look at: {self.healthy.remedy}"
        )


class CollapseWatch:
    """Sees every logged step, and speaks once a metric that stays out of its healthy range.

    Steps up to `first_step` do not count: a network at its start may look collapsed.
    """

    def __init__(self, *, first_step: int) -> None:
        self._first_step = first_step
        self._out_of_range: dict[str, int] = {}  # logged steps in a row

    def see(self, step: int, values: Mapping[str, float]) -> list[Collapse]:
        """What has been out of range for PATIENCE logged steps with this one."""
        if step <= self._first_step:
            return []
        found = []
        for name, value in values.items():
            entry = healthy(name)
            if entry is None:
                continue
            count = 0 if entry.holds(value) else self._out_of_range.get(name, 0) + 1
            if self._out_of_range.get(name, 0) < PATIENCE:  # spoken of already from there on
                self._out_of_range[name] = count
                if count == PATIENCE:
                    found.append(Collapse(name, value, step, entry))
        return found

    def state_dict(self) -> dict[str, int]:
        """JSON-able: logged steps in a row that each monitor has been out of range."""
        return dict(self._out_of_range)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._out_of_range = dict(state)
