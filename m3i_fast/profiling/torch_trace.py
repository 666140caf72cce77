"""Reads the trace that torch.profiler writes: operators with their shapes, and a GPU's kernels."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m3i_fast.json_files import parse_json
from m3i_fast.profiling.operator_costs import Event, argument, bytes_of, flops_of
from m3i_fast.profiling.recording import (
    STEP,
    Inside,
    Interval,
    Recording,
    Wait,
    Work,
    expect_steps,
    is_stage,
    own_times,
)

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
HOST_WAITS = re.compile(r"^(aten::(_local_scalar_dense|nonzero)$|cu(da)?\w+Synchronize)")


def read_trace(path: Path) -> Recording:
    """The steps in a trace, gzipped or not.

    Raises FileNotFoundError, and ValueError naming the file and what is not there, for what is no
    trace, is damaged, or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a trace of torch.profiler, there is no file")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole trace: {error}") from error
    tree = parse_json(raw, {"traceEvents": [dict]}, str(path))
    events = [e for e in tree["traceEvents"] if e.get("ph") == "X"]
    for event in events:
        if lost := {"name", "ts", "dur", "tid"} - event.keys():
            raise ValueError(f"{path}: event {event} has no {', '.join(sorted(lost))}")
    return _recording(events, str(path))


def _recording(events: Sequence[Event], source: str) -> Recording:
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_kind[event.get("cat", "")].append(event)
    ranges = [_interval(event) for event in by_kind["user_annotation"]]
    steps = sorted((r for r in ranges if r.name == STEP), key=lambda r: r.begin)
    expect_steps(steps, source)
    thread = steps[0].thread
    stages = [r for r in ranges if is_stage(r.name) and r.thread == thread]
    inside = Inside(stages)
    operators = _within(steps, by_kind["cpu_op"])
    kernels = [event for kind in ON_DEVICE for event in by_kind[kind]]
    calls = _within(steps, [event for kind in CALLS for event in by_kind[kind]])
    work = _kernels(kernels, calls, operators, inside) if kernels else _calls(operators, inside)
    waits = calls if kernels else operators
    return Recording(
        source=source,
        device="cuda" if kernels else "cpu",
        steps=tuple(steps),
        stages=tuple(sorted(stages, key=lambda r: r.begin)),
        work=tuple(sorted(work, key=lambda w: w.begin)),
        waits=tuple(
            Wait(name=i.name, begin=i.begin, end=i.end, stage=inside(i.begin))
            for i in map(_interval, waits)
            if HOST_WAITS.match(i.name)
        ),
    )


def _interval(event: Event) -> Interval:
    begin = round(1000 * event["ts"])
    return Interval(event["name"], begin, begin + round(1000 * event["dur"]), event["tid"])


def _within(steps: Sequence[Interval], events: Sequence[Event]) -> list[Event]:
    begin, end = steps[0].begin / 1000, steps[-1].end / 1000
    return [event for event in events if begin <= event["ts"] < end]


def _calls(operators: Sequence[Event], inside: Inside) -> Iterator[Work]:
    """Where there is no GPU: operators, each without those that it calls."""
    intervals = [_interval(event) for event in operators]
    for event, interval, own in zip(operators, intervals, own_times(intervals), strict=True):
        yield Work(
            name=interval.name,
            begin=interval.begin,
            end=interval.end,
            own=own,
            stage=inside(interval.begin),
            stream=interval.thread,
            flops=flops_of(event),
            num_bytes=bytes_of(event),
        )


def _kernels(
    kernels: Sequence[Event], calls: Sequence[Event], operators: Sequence[Event], inside: Inside
) -> Iterator[Work]:
    """Kernels that the steps launched; an operator's FLOPs are those of its longest kernel."""
    launched = {argument(call, "correlation"): _interval(call).begin for call in calls}
    by_id = {argument(event, "External id"): event for event in operators}
    longest: dict[Any, Event] = {}
    for kernel in kernels:
        number = argument(kernel, "External id")
        if number not in longest or kernel["dur"] > longest[number]["dur"]:
            longest[number] = kernel
    for kernel in kernels:
        moment = launched.get(argument(kernel, "correlation"))
        if moment is None:
            continue
        interval, number = _interval(kernel), argument(kernel, "External id")
        operator = by_id.get(number) if longest[number] is kernel else None
        copied = float(argument(kernel, "bytes") or 0)
        yield Work(
            name=interval.name,
            begin=interval.begin,
            end=interval.end,
            own=interval.end - interval.begin,
            stage=inside(moment),
            stream=argument(kernel, "stream"),
            flops=flops_of(operator) if operator else 0.0,
            num_bytes=copied or (bytes_of(operator) if operator else 0.0),
        )
