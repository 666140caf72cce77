"""Which values of the monitors are healthy, and a watch that tells a collapse from learning.

A collapse ends what can be learnt; a hint says that a run learns less than it could.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

PATIENCE = 3  # logged steps in a row: one out of range may be chance
# A hint is about a running mean, since few rows are in a step: 16 cells of 4 pictures in the demo.
HINT_ROWS = 10  # logged steps that the mean is of, nearly
HINT_STEPS = 150  # after `first_step`: before that hardly any target is predicted by any method


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
    is_hint: bool = False
    """Whether it is judged by its running mean and ends no run."""

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
TARGETS = (
    "standardise running and a larger weight of the term in objective.terms, "
    "objective.mixing.dense-fraction 1, more steps"
)
WEIGHTS = "its weight in objective.terms, or objective.balance.mode gradient_norm"
# Where the bounds of hints are from: the demo with labels and captions for 1 %, 300 steps
# (tests/observe/runs). M3I as it was first explained -0.9 and -1.4 of the variance in the mean of
# the last logged steps and had constants up to 0.86; SiameseIM explained 0.11 with a constant of
# 0.33, M3I with standardised targets 0.24 and 0.29 with 0.05. By all of the encoder's parameters
# the dense terms of the first had norms of 0.001 to 0.03 beside 0.5 to 17 of a step with one
# labelled picture, and cosines of -0.38 to -0.53, of the last +0.2 to +0.5.
HEALTHY = (
    Healthy(
        pattern="monitor/*_constant",
        high=0.7,
        cause="most of the energy of the targets is one vector, so a constant predicts them: a "
        "cosine looks well where nothing is learnt",
        remedy=TARGETS,
        is_hint=True,
    ),
    Healthy(
        pattern="monitor/*_explained",
        low=0.02,
        cause="the predictions are no better than the mean target",
        remedy=TARGETS,
        is_hint=True,
    ),
    Healthy(
        pattern="gradient_share/*",
        low=0.01,
        cause="the term pulls on the encoder with less than a hundredth of the strongest term's "
        "gradient, so it is all but left out",
        remedy=WEIGHTS,
        is_hint=True,
    ),
    Healthy(
        pattern="gradient_cosine/*",
        low=-0.3,
        cause="two terms pull the encoder apart, and what one learns the other undoes",
        remedy="a smaller weight of one of them in objective.terms, or one of them alone",
        is_hint=True,
    ),
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
    """Sees every logged step, and speaks once a metric that stays out of its healthy range.

    Steps up to `first_step` do not count: a network at its start may look collapsed.
    """

    def __init__(self, *, first_step: int) -> None:
        self._first_step = first_step
        self._out_of_range: dict[str, int] = {}  # logged steps in a row
        self._means: dict[str, float] = {}
        self._num_rows = 0  # that the means are of

    def see(self, step: int, values: Mapping[str, float]) -> list[Collapse]:
        """What has been out of range for PATIENCE logged steps with this one."""
        if step <= self._first_step:
            return []
        found = []
        for name, value in values.items():
            entry = healthy(name)
            if entry is None or entry.is_hint:
                continue
            count = 0 if entry.holds(value) else self._out_of_range.get(name, 0) + 1
            if self._out_of_range.get(name, 0) < PATIENCE:  # spoken of already from there on
                self._out_of_range[name] = count
                if count == PATIENCE:
                    found.append(Collapse(name, value, step, entry))
        return found

    def hints(self, step: int, values: Mapping[str, float]) -> list[Hint]:
        """What is out of range in the running mean with this logged step, and was not before."""
        if step <= self._first_step:
            return []
        self._num_rows += 1
        rate = 1 / min(self._num_rows, HINT_ROWS)
        for name, value in values.items():
            entry = healthy(name)
            if name.startswith("gradient/") or (entry is not None and entry.is_hint):
                mean = self._means.get(name, value)
                self._means[name] = mean + rate * (value - mean)
        if self._num_rows < HINT_ROWS or step <= self._first_step + HINT_STEPS:
            return []
        found = []
        for name, value in (self._means | _shares(self._means)).items():
            entry = healthy(name)
            if entry is None or entry.holds(value) or name in self._out_of_range:
                continue
            self._out_of_range[name] = PATIENCE
            found.append(Hint(name, value, step, entry))
        return found

    def state_dict(self) -> dict[str, float]:
        """JSON-able: logged steps in a row that each monitor has been out of range; the means."""
        means = {f"{_MEAN}{name}": value for name, value in self._means.items()}
        return {**self._out_of_range, **means, _NUM_ROWS: self._num_rows}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Older checkpoints hold no means."""
        counts = dict(state)
        self._num_rows = int(counts.pop(_NUM_ROWS, 0))
        names = [name for name in counts if name.startswith(_MEAN)]
        self._means = {name.removeprefix(_MEAN): counts.pop(name) for name in names}
        self._out_of_range = {name: int(count) for name, count in counts.items()}


_MEAN, _NUM_ROWS = "mean of ", "rows"


def _shares(means: Mapping[str, float]) -> dict[str, float]:
    """Each term's gradient beside the largest of any term's, as `gradient_share/TERM`."""
    found = {name: mean for name, mean in means.items() if name.startswith("gradient/")}
    largest = max(found.values(), default=0.0)
    return {
        name.replace("gradient/", "gradient_share/"): mean / largest
        for name, mean in found.items()
        if largest > 0
    }
