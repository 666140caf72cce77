"""What a profiler recorded of some training steps, whichever profiler it was. Times in ns."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from m3i_fast.observe.stages import STAGES, family_of

STEP = "step"
"""The name of the range around a whole step."""
BETWEEN = "between stages"
"""What a step does outside every stage."""

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that a thread of the host was in."""

    name: str
    begin: int
    end: int
    thread: Hashable = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A kernel or a copy on a GPU; without one, a call of an operator."""

    name: str
    begin: int
    end: int
    own: int
    """Of an operator without those that it calls; of a kernel all of it."""
    stage: str
    """The innermost stage that it was launched in."""
    stream: Hashable = None
    flops: float = 0.0
    """0: not known."""
    num_bytes: float = 0.0
    """Of its tensor arguments, of what a copy copies; 0: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """A call in which the host waits for the device."""

    name: str
    begin: int
    end: int
    stage: str
    stack: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Steady steps in order. `begin`, `end`: of all of them, and of the work they launched."""

    source: str
    device: Literal["cuda", "cpu"]
    steps: tuple[Interval, ...]
    stages: tuple[Interval, ...]
    work: tuple[Work, ...]
    waits: tuple[Wait, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def begin(self) -> int:
        return self.steps[0].begin

    @property
    def end(self) -> int:
        return max([self.steps[-1].end, *(work.end for work in self.work)])


def is_stage(name: str) -> bool:
    """Whether a range's name is one that the trainer gives."""
    return family_of(name) in STAGES and name != "loss"


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same time without overlap, in order."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(spans: Spans) -> int:
    """Of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def overlap(a: Spans, b: Spans) -> int:
    """Time that is in both; neither has overlaps, both are in order."""
    total = i = j = 0
    while i < len(a) and j < len(b):
        total += max(min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]), 0)
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def own_times(intervals: Sequence[Interval]) -> list[int]:
    """Of each, the time that no interval inside it on the same thread covers.

    They sum to the time that any is open. What reaches over the end of the one around it is cut.
    """
    own = [0] * len(intervals)
    threads: dict[Hashable, list[int]] = defaultdict(list)
    for index, interval in enumerate(intervals):
        threads[interval.thread].append(index)
    for indices in threads.values():
        indices.sort(key=lambda i: (intervals[i].begin, -intervals[i].end))
        open_: list[tuple[int, int]] = []  # index, end
        for index in indices:
            begin, end = intervals[index].begin, intervals[index].end
            while open_ and open_[-1][1] <= begin:
                open_.pop()
            if open_:
                end = min(end, open_[-1][1])
                own[open_[-1][0]] -= end - begin
            own[index] += end - begin
            open_.append((index, end))
    return own


class Inside:
    """Says in which interval, the innermost one, a moment lies; of one thread, which nest."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self._changes: list[int] = []
        self._names: list[str] = []
        open_: list[Interval] = []
        for interval in sorted(intervals, key=lambda i: (i.begin, -i.end)):
            self._close(open_, interval.begin)
            self._change(interval.begin, interval.name)
            open_.append(interval)
        self._close(open_, None)

    def _close(self, open_: list[Interval], until: int | None) -> None:
        while open_ and (until is None or open_[-1].end <= until):
            ended = open_.pop()
            self._change(ended.end, open_[-1].name if open_ else BETWEEN)

    def _change(self, moment: int, name: str) -> None:
        self._changes.append(moment)
        self._names.append(name)

    def __call__(self, moment: int) -> str:
        place = bisect_right(self._changes, moment)
        return self._names[place - 1] if place else BETWEEN


def expect_steps(steps: Sequence[Interval], source: str) -> None:
    """ValueError where nothing was recorded of a whole step."""
    if not steps:
        raise ValueError(
            f"{source}: expected at least one whole range named {STEP!r}, which m3i-fast profile "
            "puts around a step, got none"
        )
