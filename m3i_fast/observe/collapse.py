"""Healthy ranges of the monitors, and a watch that reports values that stay out of them.

A collapse ends what a run can learn; a hint says that a run learns less than it could.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

PATIENCE = 3  # logged steps in a row: a single one out of range may be chance
# A hint judges a running mean, since a step has few rows: 16 cells of 4 pictures in the demo.
HINT_ROWS = 10  # window of the running mean, in logged steps
HINT_STEPS = 150  # after `first_step`: before that no method predicts much of any target


class CollapseError(RuntimeError):
    """Error that ends a run after a collapse, where the run asks for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthyRange:
    """The healthy range of a monitor, what it means to leave it, and what to change then."""

    pattern: str
    """Name of the metric; `*` stands for the name of a term."""
    low: float = -math.inf
    high: float = math.inf
    cause: str
    remedy: str
    is_hint: bool = False
    """Whether the running mean is judged, and leaving the range never ends a run."""

    def holds(self, value: float) -> bool:
        """Return whether the value is in the range; False for NaN."""
        return self.low <= value <= self.high

    @property
    def text(self) -> str:
        """Return the range in words: `at least 1.5`, `at most -0.02` or `1 to 100`."""
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return (
            f"at most {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"
        )


TEACHER = "ema.momentum nearer to 1, objective.decorrelation-weight above 0, a lower optim.lr"
TEMPERATURE = "objective.temperature nearer to 0.07, a lower optim.lr"
PROTOTYPES = "ema.momentum nearer to 1, more objective.num-prototypes, a lower optim.lr"
TARGETS = (
    "standardise running and a larger weight of the term in objective.terms, "
    "objective.mixing.dense-fraction 1, more steps"
)
WEIGHTS = "its weight in objective.terms, or objective.balance.mode gradient_norm"
# The bounds of hints come from the demo with labels and captions for 1 %, 300 steps
# (tests/observe/runs), in the mean of the last logged steps:
#   M3I without standardised targets  explained -0.9 and -1.4  constant up to 0.86
#   SiameseIM                         explained 0.11           constant 0.33
#   M3I with standardised targets     explained 0.24 and 0.29  constant 0.05
# Over all of the encoder's parameters the dense terms of the first had gradient norms of 0.001 to
# 0.03, beside 0.5 to 17 in a step with one labelled picture, and cosines of -0.38 to -0.53; those
# of the last had cosines of +0.2 to +0.5.
HEALTHY_RANGES = (
    HealthyRange(
        pattern="monitor/*_constant",
        high=0.7,
        cause="most of the energy of the targets is one vector, so a constant predicts them: a "
        "cosine looks well where nothing is learnt",
        remedy=TARGETS,
        is_hint=True,
    ),
    HealthyRange(
        pattern="monitor/*_explained",
        low=0.02,
        cause="the predictions are no better than the mean target",
        remedy=TARGETS,
        is_hint=True,
    ),
    HealthyRange(
        pattern="gradient_share/*",
        low=0.01,
        cause="the term pulls on the encoder with less than a hundredth of the strongest term's "
        "gradient, so it has almost no effect",
        remedy=WEIGHTS,
        is_hint=True,
    ),
    HealthyRange(
        pattern="gradient_cosine/*",
        low=-0.3,
        cause="two terms pull the encoder apart, and what one learns the other undoes",
        remedy="a smaller weight of one of them in objective.terms, or one of them alone",
        is_hint=True,
    ),
    HealthyRange(
        pattern="monitor/*_std",
        low=0.01,
        cause="all images have nearly the same target, so a constant predicts it",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/target_rank",
        low=1.5,
        cause="the targets fill one dimension of the encoder's, so hardly anything is predicted",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/target_alignment",
        low=1e-3,
        cause="the encoder says the same of what it sees and of what it has to predict",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/target_uniformity",
        high=-0.05,
        cause="the targets of all cells point one way",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/target_kmeans_entropy",
        low=0.3,
        cause="nearly all targets are of one or two kinds",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/*_cosine",
        high=0.999,
        cause="predictions equal their targets, which only targets without content allow",
        remedy=TEACHER,
    ),
    HealthyRange(
        pattern="monitor/*_use",
        low=0.4,
        cause="most images are assigned to one prototype, or to few",
        remedy=PROTOTYPES,
    ),
    HealthyRange(
        pattern="monitor/*_doubt",
        high=0.999,
        cause="assignments to prototypes are even for each image, and say nothing",
        remedy=PROTOTYPES,
    ),
    HealthyRange(
        pattern="monitor/*_log_scale",
        low=0.999,
        high=100.1,
        cause="the inverse temperature left its bounds: the softmax is saturated or flat",
        remedy=TEMPERATURE,
    ),
)


def healthy_range(name: str) -> HealthyRange | None:
    """Return the healthy range of a metric; None where none is known."""
    return next((entry for entry in HEALTHY_RANGES if fnmatchcase(name, entry.pattern)), None)


@dataclass(frozen=True, slots=True)
class Collapse:
    """A monitor that stayed out of its healthy range."""

    name: str
    value: float
    step: int
    healthy: HealthyRange

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.name} = {self.value:.4g}, the last {PATIENCE} logged steps "
            f"out of its healthy range, {self.healthy.text}: {self.healthy.cause}. "
            f"Look at: {self.healthy.remedy}"
        )


@dataclass(frozen=True, slots=True)
class Hint(Collapse):
    """A monitor whose running mean is out of its healthy range."""

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.name} = {self.value:.4g} in the mean of about {HINT_ROWS} "
            f"logged steps, healthy is {self.healthy.text}: {self.healthy.cause}. "
            f"Look at: {self.healthy.remedy}"
        )


class CollapseWatch:
    """Receives every logged row, and reports each metric once that stays out of its healthy range.

    Steps up to `first_step` do not count, since a network may look collapsed at its start.
    """

    def __init__(self, *, first_step: int) -> None:
        self._first_step = first_step
        self._out_of_range: dict[str, int] = {}  # logged steps in a row
        self._means: dict[str, float] = {}
        self._num_rows = 0  # number of rows in the means

    def new_collapses(self, step: int, values: Mapping[str, float]) -> list[Collapse]:
        """Return the monitors that are now out of range for PATIENCE logged steps in a row."""
        if step <= self._first_step:
            return []
        collapses = []
        for name, value in values.items():
            entry = healthy_range(name)
            if entry is None or entry.is_hint:
                continue
            count = 0 if entry.holds(value) else self._out_of_range.get(name, 0) + 1
            if self._out_of_range.get(name, 0) < PATIENCE:  # from PATIENCE on it is reported
                self._out_of_range[name] = count
                if count == PATIENCE:
                    collapses.append(Collapse(name, value, step, entry))
        return collapses

    def new_hints(self, step: int, values: Mapping[str, float]) -> list[Hint]:
        """Return the monitors whose running mean has left its range with this logged step."""
        if step <= self._first_step:
            return []
        self._num_rows += 1
        rate = 1 / min(self._num_rows, HINT_ROWS)
        for name, value in values.items():
            entry = healthy_range(name)
            if name.startswith("gradient/") or (entry is not None and entry.is_hint):
                mean = self._means.get(name, value)
                self._means[name] = mean + rate * (value - mean)
        if self._num_rows < HINT_ROWS or step <= self._first_step + HINT_STEPS:
            return []
        hints = []
        for name, value in (self._means | _shares(self._means)).items():
            entry = healthy_range(name)
            if entry is None or entry.holds(value) or name in self._out_of_range:
                continue
            self._out_of_range[name] = PATIENCE
            hints.append(Hint(name, value, step, entry))
        return hints

    def state_dict(self) -> dict[str, float]:
        """Return the numbers of logged steps out of range and the running means; JSON-able."""
        means = {f"{_MEAN}{name}": value for name, value in self._means.items()}
        return {**self._out_of_range, **means, _NUM_ROWS: self._num_rows}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state that `state_dict` returned; older checkpoints hold no means."""
        counts = dict(state)
        self._num_rows = int(counts.pop(_NUM_ROWS, 0))
        names = [name for name in counts if name.startswith(_MEAN)]
        self._means = {name.removeprefix(_MEAN): counts.pop(name) for name in names}
        self._out_of_range = {name: int(count) for name, count in counts.items()}


_MEAN, _NUM_ROWS = "mean of ", "rows"


def _shares(means: Mapping[str, float]) -> dict[str, float]:
    """Return each term's gradient over the largest of any term's, as `gradient_share/TERM`."""
    norms = {name: mean for name, mean in means.items() if name.startswith("gradient/")}
    largest = max(norms.values(), default=0.0)
    return {
        name.replace("gradient/", "gradient_share/"): mean / largest
        for name, mean in norms.items()
        if largest > 0
    }
