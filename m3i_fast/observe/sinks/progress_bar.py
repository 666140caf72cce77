"""The progress of a run on a terminal: steps, images a second, loss, time left, what is waited for.

Steps and what the run does are read whenever the bar is drawn, so that neither waits for a logged
row. Where output is no terminal, as under Slurm, every logged row is a line of the log instead.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)

DRAWN_A_SECOND = 4.0
SLOW_S = 1.0  # from which on a stage of a step is told: shorter ones would flicker
LOADER_SHARE = 0.1  # of a step, from which on the wait for data is told
_ACCURACIES = {"knn": "kNN", "classifier": "top 1", "zero_shot": "zero-shot"}
# What the run does (`Trainer.doing`), in words; stages of a step that are not here are not told.
TOLD = {
    "the first step": "the first step, which takes longer",
    "data.wait": "waiting for the loader",
    "a save": "saving a checkpoint",
    "an evaluation": "evaluating",
    "a rollback": "going back to a checkpoint",
    "the end of the run": "writing the last checkpoint",
}


class TrainingBar(Progress):
    """A bar that `show` hands the logged rows; a context, which draws it.

    step: returns the steps taken, earlier parts of the run included; after a rollback fewer than
    before. doing: returns what the run does now, as a key of TOLD or anything else.
    """

    def __init__(
        self,
        console: Console,
        *,
        num_steps: int,
        step: Callable[[], int],
        doing: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
        is_shown: bool = True,
    ) -> None:
        self._bar: TaskID | None = None  # rich draws while it is built
        self._step, self._doing, self._clock = step, doing, clock
        self._pace = Pace(step(), clock())
        self._num_steps = num_steps
        self._in_lines = is_shown and not console.is_terminal
        self._row: dict[str, float] = {}
        self._since = ("", clock())
        super().__init__(
            TextColumn("training", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            refresh_per_second=DRAWN_A_SECOND,
            disable=not is_shown,
        )
        self._bar = self.add_task("", total=num_steps, completed=step(), figures="", left=None)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a logged row; those that it lacks stay as they were."""
        self._row |= values
        figures = figures_of(values)
        if figures and self._in_lines:
            logger.info("step %d of %d  %s", step, self._num_steps, "  ".join(figures))
        if "throughput/img_s" in values:
            self._pace.log(step, self._clock())

    def get_renderables(self) -> Iterable[RenderableType]:
        """Draw the bar as the run is now."""
        if self._bar is not None:
            now, step = self._clock(), self._step()
            left = self._pace.seconds_left(step, now, int(self.tasks[0].total or 0))
            figures = self._figures(now)
            self.update(self._bar, completed=step, left=left, figures=figures)
        return super().get_renderables()

    def _figures(self, now: float) -> str:
        doing = self._doing()
        if doing != self._since[0]:
            self._since = (doing, now)
        told = TOLD.get(doing, "") if now - self._since[1] >= SLOW_S else ""
        return "  ".join(filter(None, (*figures_of(self._row), told)))


def figures_of(row: Mapping[str, float]) -> list[str]:
    """Return what the bar says of a row: images and tokens a second, loss, accuracy, the loader."""
    told = []
    if "throughput/img_s" in row:
        told.append(f"{row['throughput/img_s']:,.0f} img/s")
        if "throughput/tokens_s" in row:
            told.append(f"{row['throughput/tokens_s']:,.0f} tokens/s")
        loss = row.get("loss/total", math.nan)  # none where all steps were skipped
        told.append(f"loss {loss:.3f}")
    for name, accuracy in _ACCURACIES.items():
        if f"evaluate/{name}_top1" in row:
            told.append(f"{accuracy} {100 * row[f'evaluate/{name}_top1']:.1f} %")
    stages = [value for name, value in row.items() if name.startswith("time/")]
    waited = row.get("time/data.wait_ms", 0.0)
    if waited > LOADER_SHARE * sum(stages):
        told.append(f"loader {100 * waited / sum(stages):.0f} %")
    return told


class Pace:
    """The pace of a run since the first row that this process logged, and the time that is left.

    Everything counts that the run does between its steps, such as checkpoints and evaluations.
    Before that row the steps of the start count, which are slower.
    """

    def __init__(self, step: int, now: float) -> None:
        self._step, self._began, self._is_start = step, now, True

    def log(self, step: int, now: float) -> None:
        """Take a logged row; the first one, and one before it after a rollback, begin anew."""
        if self._is_start or step <= self._step:
            self._step, self._began, self._is_start = step, now, False

    def seconds_left(self, step: int, now: float, num_steps: int) -> float | None:
        """Return the seconds to the last step; None where no step was taken at this pace."""
        if step >= num_steps:
            return 0.0
        taken = step - self._step
        return (now - self._began) / taken * (num_steps - step) if taken > 0 else None


class _TimeLeft(ProgressColumn):
    """The time left, in days and hours:minutes:seconds."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        text = "-:--:--" if left is None else str(timedelta(seconds=round(left)))
        return Text(f"{text} left", style="progress.remaining")
