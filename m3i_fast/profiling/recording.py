"""What a profiler recorded of some training steps, in one form for all profilers. Times in ns."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from m3i_fast.observe.stages import STAGES, family_of

STEP = "step"
"""Name of the range around a whole step."""
BETWEEN = "between stages"
"""Name for the time of a step outside all stages."""
LOADER = "loader"
"""Name for what threads of the loader launched beside the steps, which is of no stage."""

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class HostRange:
    """A named range of time that a thread of the host was in."""

    name: str
    begin: int
    end: int
    thread: Hashable = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """A kernel or a copy on a GPU; in a recording without a GPU, a call of an operator."""

    name: str
    begin: int
    end: int
    self_ns: int
    """Self time: of an operator without the operators that it calls, of a kernel all of it."""
    stage: str
    """The innermost stage that it was launched in; LOADER of what other threads launched."""
    stream: Hashable = None
    flops: float = 0.0
    """Number of FLOPs; 0 where not known."""
    num_bytes: float = 0.0
    """Bytes of an operator's tensor arguments or of a copy; 0 where not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncCall:
    """A call in which the host waits for the device."""

    name: str
    begin: int
    end: int
    stage: str
    stack: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ThreadUse:
    """What threads of one name, other than that of the steps, spent in calls of the OS."""

    name: str
    num: int
    """Number of threads of this name that made any call."""
    calls: int
    ns: int
    """Time in these calls during the steps, of all these threads together."""
    longest: str
    """The call that most of this time was spent in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Steady steps in order, their stages, and the activities that they launched."""

    source: str
    device: Literal["cuda", "cpu"]
    steps: tuple[HostRange, ...]
    stages: tuple[HostRange, ...]
    activities: tuple[Activity, ...]
    waits: tuple[SyncCall, ...] = ()
    """Waits for a GPU; in a recording of nsys without one, calls of the operating system."""
    threads: tuple[ThreadUse, ...] = ()
    loader: tuple[HostRange, ...] = ()
    """Operators that the loader ran beside the steps, on threads of its own."""
    notes: tuple[str, ...] = ()

    @property
    def begin(self) -> int:
        """Return the start of the first step."""
        return self.steps[0].begin

    @property
    def end(self) -> int:
        """Return the end of the last step, or of the last activity if that is later."""
        return max([self.steps[-1].end, *(activity.end for activity in self.activities)])


def is_stage(name: str) -> bool:
    """Return whether a range's name is that of a stage of the trainer."""
    return family_of(name) in STAGES and name != "loss"


def union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans that cover the same time without overlap, in order."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(spans: Spans) -> int:
    """Return the total length of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def overlap(a: Spans, b: Spans) -> int:
    """Return the time that is in both lists, each in order and without overlap."""
    total = i = j = 0
    while i < len(a) and j < len(b):
        total += max(min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]), 0)
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def self_times(ranges: Sequence[HostRange]) -> list[int]:
    """Return the time of each range that no range inside it on the same thread covers.

    They sum to the time in which any range is open. A range that ends after the one around it is
    cut there.
    """
    self_ns = [0] * len(ranges)
    threads: dict[Hashable, list[int]] = defaultdict(list)
    for index, each in enumerate(ranges):
        threads[each.thread].append(index)
    for indices in threads.values():
        indices.sort(key=lambda i: (ranges[i].begin, -ranges[i].end))
        open_: list[tuple[int, int]] = []  # index, end
        for index in indices:
            begin, end = ranges[index].begin, ranges[index].end
            while open_ and open_[-1][1] <= begin:
                open_.pop()
            if open_:
                end = min(end, open_[-1][1])
                self_ns[open_[-1][0]] -= end - begin
            self_ns[index] += end - begin
            open_.append((index, end))
    return self_ns


class StageLookup:
    """Returns the innermost range at a moment, of nested ranges of one thread."""

    def __init__(self, ranges: Sequence[HostRange]) -> None:
        self._changes: list[int] = []
        self._names: list[str] = []
        open_: list[HostRange] = []
        for each in sorted(ranges, key=lambda i: (i.begin, -i.end)):
            self._close(open_, each.begin)
            self._change(each.begin, each.name)
            open_.append(each)
        self._close(open_, None)

    def _close(self, open_: list[HostRange], until: int | None) -> None:
        while open_ and (until is None or open_[-1].end <= until):
            ended = open_.pop()
            self._change(ended.end, open_[-1].name if open_ else BETWEEN)

    def _change(self, moment: int, name: str) -> None:
        self._changes.append(moment)
        self._names.append(name)

    def __call__(self, moment: int) -> str:
        """Return the name of the innermost range at this moment, BETWEEN outside all ranges."""
        place = bisect_right(self._changes, moment)
        return self._names[place - 1] if place else BETWEEN


def expect_steps(steps: Sequence[HostRange], source: str) -> None:
    """Raise ValueError where no whole step was recorded."""
    if not steps:
        raise ValueError(
            f"{source}: expected at least one whole range named {STEP!r}, which m3i-fast profile "
            "puts around a step, got none"
        )
