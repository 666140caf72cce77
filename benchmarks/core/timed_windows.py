"""The measuring loop of `bench node`: windows of steps, timed by a clock at their edges alone.

Everything that is measured takes turns, round after round, each round begun by another one, so
that a drifting clock meets all alike. Of a window nothing is read, and for nothing is waited, but
at its two edges. Steps before the first window (compilation, allocators) and the few that lead into
each are not counted, and batches that were made ahead while another work had its turn are not used.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Clock = Callable[[], float]
Summary = Callable[[float, float], Mapping[str, Any]]

SETTLED = 0.05  # the last steps and those before differ by no more
COMPARED = 4  # steps on either side


class TimedWork(Protocol):
    """A loop whose steps are repeated and timed."""

    num_images: int
    """Source images of a step, of this rank."""

    def use_up(self) -> None:
        """Take what the loader has made ahead, so that a window begins with none."""

    def step(self) -> None:
        """Start one step; the device may still run when this returns."""

    def wait(self) -> None:
        """Wait until the device has finished every step that was started."""

    def read(self) -> dict[str, float]:
        """Return milliseconds a step of each stage since the last read, as `time/<stage>_ms`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long to warm up, and how long a window lasts."""

    num_windows: int = 5
    window_s: float = 5.0
    """A window has as many steps as fill it."""
    min_steps: int = 2
    """Of a window."""
    warmup_steps: int = 10
    """At least; then until steps take about the same time."""
    max_warmup_s: float = 60.0
    """After so long the windows begin, settled or not, if warmup_steps have been taken."""
    lead_steps: int = 3
    """Not counted, before each window."""

    def __post_init__(self) -> None:
        if self.num_windows < 3:
            raise ValueError(f"--windows: expected at least 3, got {self.num_windows}")
        if not self.window_s > 0:
            raise ValueError(f"--window-seconds: expected > 0, got {self.window_s}")
        if self.warmup_steps < 1:
            raise ValueError(f"--warmup-steps: expected at least 1, got {self.warmup_steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    seconds: float
    num_steps: int
    num_images: int
    """Source images of this rank in all steps."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds a step, as `time/<stage>_ms`."""
    telemetry: Mapping[str, Any] = field(default_factory=dict)
    """Of this window; empty where none was taken."""

    @property
    def images_s(self) -> float:
        return self.num_images / self.seconds

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps

    @property
    def is_throttled(self) -> bool:
        return bool(self.telemetry.get("throttled"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The windows of one timed loop."""

    windows: Sequence[Window]
    num_warmup_steps: int
    is_settled: bool
    """Whether steps took about the same time before the first window."""


def measure_windows(
    works: Mapping[str, TimedWork],
    schedule: Schedule,
    *,
    clock: Clock = time.monotonic,
    slowest: Callable[[float], float] = lambda seconds: seconds,
    telemetry: Summary = lambda begin_s, end_s: {},
) -> dict[str, Series]:
    """Warm every work up, then time windows of each in turn.

    clock: seconds, by which telemetry tells its samples, too. slowest: of all ranks' seconds the
    most, so that all of them take as many steps. telemetry: its summary between two times.
    """
    sizes: dict[str, int] = {}
    warmed: dict[str, tuple[int, bool]] = {}
    for name, work in works.items():
        seconds = _warm_up(work, schedule, clock, slowest)
        warmed[name] = len(seconds), _has_settled(seconds)
        step_s = statistics.median(seconds[-COMPARED:])
        sizes[name] = max(schedule.min_steps, round(schedule.window_s / max(step_s, 1e-9)))
    windows: dict[str, list[Window]] = {name: [] for name in works}
    names = list(works)
    for number in range(schedule.num_windows):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            window = _time(works[name], sizes[name], schedule.lead_steps, clock, telemetry)
            windows[name].append(window)
    return {
        name: Series(windows=found, num_warmup_steps=warmed[name][0], is_settled=warmed[name][1])
        for name, found in windows.items()
    }


def _warm_up(
    work: TimedWork, schedule: Schedule, clock: Clock, slowest: Callable[[float], float]
) -> list[float]:
    """Seconds of each step, waited for one by one, until they settle."""
    seconds: list[float] = []
    while len(seconds) < schedule.warmup_steps or not (
        _has_settled(seconds) or sum(seconds) > schedule.max_warmup_s
    ):
        begun = clock()
        work.step()
        work.wait()
        seconds.append(slowest(clock() - begun))
    return seconds


def _has_settled(seconds: Sequence[float]) -> bool:
    if len(seconds) < 2 * COMPARED:
        return False
    last = statistics.median(seconds[-COMPARED:])
    before = statistics.median(seconds[-2 * COMPARED : -COMPARED])
    return abs(last - before) <= SETTLED * before


def _time(work: TimedWork, num_steps: int, lead: int, clock: Clock, telemetry: Summary) -> Window:
    work.use_up()
    for _ in range(lead):
        work.step()
    work.wait()
    work.read()
    begun = clock()
    for _ in range(num_steps):
        work.step()
    work.wait()
    ended = clock()
    return Window(
        seconds=ended - begun,
        num_steps=num_steps,
        num_images=num_steps * work.num_images,
        stages=work.read(),
        telemetry=telemetry(begun, ended),
    )
