"""Rows of a summary about the host: its waits, its other threads and the loader's operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from m3i_fast.profiling.recording import HostRange, SyncCall, ThreadUse


def wait_rows(waits: Sequence[SyncCall], steps: int) -> list[dict[str, Any]]:
    """Return the waits that the profiler recorded by name, stage and stack, the longest first."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[SyncCall]] = defaultdict(list)
    for wait in waits:
        groups[wait.name, wait.stage, wait.stack].append(wait)
    rows = [
        {
            "name": name,
            "stage": stage,
            "stack": list(stack),
            "calls": len(calls) / steps,
            "ms": sum(call.end - call.begin for call in calls) / steps / 1e6,
        }
        for (name, stage, stack), calls in groups.items()
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))


def thread_rows(threads: Sequence[ThreadUse], steps: int) -> list[dict[str, Any]]:
    """Return a row a name of threads, those that spend most in the OS first."""
    return [
        {
            "name": use.name,
            "num": use.num,
            "calls": use.calls / steps,
            "ms": use.ns / steps / 1e6,
            "longest": use.longest,
        }
        for use in sorted(threads, key=lambda use: -use.ns)
    ]


def loader_rows(operators: Sequence[HostRange], steps: int) -> list[dict[str, Any]]:
    """Return a row an operator of the loader, the longest first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for operator in operators:
        groups[operator.name].append(operator.end - operator.begin)
    rows = [
        {"name": name, "calls": len(ns) / steps, "ms": sum(ns) / steps / 1e6}
        for name, ns in groups.items()
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))
