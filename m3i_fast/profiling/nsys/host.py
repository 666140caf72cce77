"""What nsys recorded of the host: calls of the operating system, by thread (--trace=osrt)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from m3i_fast.profiling.nsys.tables import Tables
from m3i_fast.profiling.recording import HostRange, StageLookup, SyncCall, ThreadUse

OS_CALLS = "OSRT_API"
NAMES = "ThreadNames"
PROCESS = 1 << 24
"""Ids of the threads of one process are equal above these bits."""
ENDED = "(ended)"
"""Stands for the name of a thread that ended before nsys read the names."""
SHORTEST_NS = 1000
"""nsys records no shorter calls but signals, of which Python makes thousands a step."""


def os_calls(
    tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup
) -> Iterator[SyncCall]:
    """Yield the calls that the thread of the steps made in them, by their start."""
    columns = "start", "end", "globalTid", "nameId"
    for begin, end, thread, name in sorted(tables.rows(OS_CALLS, *columns)):
        inside = thread == steps[0].thread and steps[0].begin <= begin < steps[-1].end
        if inside and end - begin >= SHORTEST_NS:
            yield SyncCall(name=tables.text(name), begin=begin, end=end, stage=stage_at(begin))


def thread_names(tables: Tables) -> dict[int, str]:
    """Return the names of the threads that were there as nsys read them, by their global ids."""
    if NAMES not in tables:
        return {}
    return {number: tables.text(name) for number, name in tables.rows(NAMES, "globalTid", "nameId")}


@dataclass(slots=True)
class _Sums:
    threads: set[int] = field(default_factory=set)
    calls: int = 0
    ns: Counter[str] = field(default_factory=Counter)


def threads(tables: Tables, steps: Sequence[HostRange]) -> Iterator[ThreadUse]:
    """Yield what the other threads of the process spent in calls of the OS during the steps."""
    begin, end, main = steps[0].begin, steps[-1].end, steps[0].thread
    if OS_CALLS not in tables or not isinstance(main, int):
        return
    names = thread_names(tables)
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for first, last, thread, name in tables.rows(OS_CALLS, "start", "end", "globalTid", "nameId"):
        inside = min(last, end) - max(first, begin)
        if thread == main or thread // PROCESS != main // PROCESS:
            continue
        if inside < SHORTEST_NS:
            continue
        group = sums[names.get(thread, ENDED)]
        group.threads.add(thread)
        group.calls += 1
        group.ns[tables.text(name)] += inside
    for name, group in sums.items():
        longest, _ = group.ns.most_common(1)[0]
        yield ThreadUse(
            name=name,
            num=len(group.threads),
            calls=group.calls,
            ns=group.ns.total(),
            longest=longest,
        )
