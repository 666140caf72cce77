"""Reads the trace that torch.profiler writes: operators with their shapes, and a GPU's kernels."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3i_fast.json_files import parse_json
from m3i_fast.profiling.operator_costs import Event, argument, bytes_of, flops_of
from m3i_fast.profiling.recording import (
    LOADER,
    STEP,
    Activity,
    HostRange,
    Recording,
    StageLookup,
    SyncCall,
    expect_steps,
    is_stage,
    self_times,
)

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
HOST_WAITS = re.compile(r"^(aten::(_local_scalar_dense|nonzero)$|cu(da)?\w+Synchronize)")


def read_trace(path: Path) -> Recording:
    """Read the steps in a trace of torch.profiler, gzipped or not.

    Raises FileNotFoundError, and ValueError naming the file and what it lacks, for a file that is
    no trace, is damaged or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a trace of torch.profiler, got no file")
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
    stage_at = StageLookup(stages)
    operators = _within(steps, by_kind["cpu_op"])
    kernels = [event for kind in ON_DEVICE for event in by_kind[kind]]
    calls = _within(steps, [event for kind in CALLS for event in by_kind[kind]])
    torchs = {thread, *(event["tid"] for event in by_kind["cpu_op"])}  # DALI's run no operators
    stages_of_calls = {
        argument(call, "correlation"): (
            stage_at(_interval(call).begin) if call["tid"] in torchs else LOADER
        )
        for call in calls
    }
    activities = (
        _kernels(kernels, stages_of_calls, operators) if kernels else _calls(operators, stage_at)
    )
    waits = [call for call in calls if call["tid"] in torchs] if kernels else operators
    return Recording(
        source=source,
        device="cuda" if kernels else "cpu",
        steps=tuple(steps),
        stages=tuple(sorted(stages, key=lambda r: r.begin)),
        activities=tuple(sorted(activities, key=lambda w: w.begin)),
        waits=tuple(
            SyncCall(name=i.name, begin=i.begin, end=i.end, stage=stage_at(i.begin))
            for i in map(_interval, waits)
            if HOST_WAITS.match(i.name)
        ),
    )


def _interval(event: Event) -> HostRange:
    begin = round(1000 * event["ts"])
    return HostRange(event["name"], begin, begin + round(1000 * event["dur"]), event["tid"])


def _within(steps: Sequence[HostRange], events: Sequence[Event]) -> list[Event]:
    begin, end = steps[0].begin / 1000, steps[-1].end / 1000
    return [event for event in events if begin <= event["ts"] < end]


def _calls(operators: Sequence[Event], stage_at: StageLookup) -> Iterator[Activity]:
    """Yield the operators of a recording without a GPU, each with its self time."""
    intervals = [_interval(event) for event in operators]
    for event, interval, self_ns in zip(operators, intervals, self_times(intervals), strict=True):
        yield Activity(
            name=interval.name,
            begin=interval.begin,
            end=interval.end,
            self_ns=self_ns,
            stage=stage_at(interval.begin),
            stream=interval.thread,
            flops=flops_of(event),
            num_bytes=bytes_of(event),
        )


def _kernels(
    kernels: Sequence[Event], stages: Mapping[Any, str], operators: Sequence[Event]
) -> Iterator[Activity]:
    """Yield the kernels that were launched during the steps, in `stages` by their correlation.

    The longest kernel of an operator has its FLOPs.
    """
    by_id = {argument(event, "External id"): event for event in operators}
    longest: dict[Any, Event] = {}
    for kernel in kernels:
        number = argument(kernel, "External id")
        if number not in longest or kernel["dur"] > longest[number]["dur"]:
            longest[number] = kernel
    for kernel in kernels:
        stage = stages.get(argument(kernel, "correlation"))
        if stage is None:
            continue
        interval, number = _interval(kernel), argument(kernel, "External id")
        operator = by_id.get(number) if longest[number] is kernel else None
        copied = float(argument(kernel, "bytes") or 0)
        yield Activity(
            name=interval.name,
            begin=interval.begin,
            end=interval.end,
            self_ns=interval.end - interval.begin,
            stage=stage,
            stream=argument(kernel, "stream"),
            flops=flops_of(operator) if operator else 0.0,
            num_bytes=copied or (bytes_of(operator) if operator else 0.0),
        )
