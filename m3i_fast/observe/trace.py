"""Reads the trace that torch.profiler writes: operators with their shapes, and a GPU's kernels."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from m3i_fast.observe.recording import (
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
ELEMENT_BYTES = {
    "double": 8,
    "float": 4,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "signed char": 1,
    "unsigned char": 1,
    "bool": 1,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1,
}

Event = Mapping[str, Any]


def read_trace(path: Path) -> Recording:
    """The steps in a trace, gzipped or not.

    Raises FileNotFoundError, and ValueError naming the file and what is not there, for what is no
    trace, is damaged, or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a trace of torch.profiler, there is no file")
    try:
        raw = path.read_bytes()
        tree = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole trace: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("traceEvents"), list):
        raise ValueError(f"{path}: expected a trace of torch.profiler, got no traceEvents")
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
    launched = {_argument(call, "correlation"): _interval(call).begin for call in calls}
    by_id = {_argument(event, "External id"): event for event in operators}
    longest: dict[Any, Event] = {}
    for kernel in kernels:
        number = _argument(kernel, "External id")
        if number not in longest or kernel["dur"] > longest[number]["dur"]:
            longest[number] = kernel
    for kernel in kernels:
        moment = launched.get(_argument(kernel, "correlation"))
        if moment is None:
            continue
        interval, number = _interval(kernel), _argument(kernel, "External id")
        operator = by_id.get(number) if longest[number] is kernel else None
        copied = float(_argument(kernel, "bytes") or 0)
        yield Work(
            name=interval.name,
            begin=interval.begin,
            end=interval.end,
            own=interval.end - interval.begin,
            stage=inside(moment),
            stream=_argument(kernel, "stream"),
            flops=flops_of(operator) if operator else 0.0,
            num_bytes=copied or (bytes_of(operator) if operator else 0.0),
        )


def _argument(event: Event, name: str) -> Any:
    return event.get("args", {}).get(name)


def _list(event: Event, name: str) -> list[Any]:
    return list(_argument(event, name) or [])


# ---- Closed forms --------------------------------------------------------------------------------


def bytes_of(event: Event) -> float:
    """Of an operator's tensor arguments, each once; its results are not in a trace."""
    kinds, dims = _list(event, "Input type"), _list(event, "Input Dims")
    pairs = zip(kinds, dims, strict=False)
    return float(sum(ELEMENT_BYTES[k] * prod(d) for k, d in pairs if k in ELEMENT_BYTES and d))


def flops_of(event: Event) -> float:
    """Of matrix products, attention and the losses over all pairs; 0 for all other operators."""
    name, dims = event["name"], _list(event, "Input Dims")
    try:
        if name == "aten::mm" or name == "aten::_scaled_mm":
            return _product(dims[0], dims[1])
        if name in ("aten::addmm", "aten::baddbmm"):
            return _product(dims[1], dims[2])
        if name == "aten::bmm":
            return _product(dims[0], dims[1])
        if re.match(r"aten::_scaled_dot_product_\w*attention\w*$", name):
            return _attention(dims, backward=name.endswith("backward"))
        if name in ("m3i::boltzmann_sums", "m3i::boltzmann_grads") and not _is_exact(event):
            product = 2.0 * dims[0][0] * dims[1][0] * dims[0][1]
            wanted = _wanted(event) if name.endswith("grads") else 0
            return product * (1 + wanted)
    except (IndexError, TypeError):  # shapes were not recorded
        return 0.0
    return 0.0


def _product(a: Sequence[int], b: Sequence[int]) -> float:
    """[..., m, k] and [..., k, n]."""
    return 2.0 * prod(a) * b[-1]


def _attention(dims: Sequence[Sequence[int]], *, backward: bool) -> float:
    """Two products of [B, H, N, d] and [B, H, M, d]; backward five, one of them again."""
    query, key = dims[backward], dims[backward + 1]
    product = 2.0 * prod(query) * key[-2]
    return product * (5 if backward else 2)


def _is_exact(event: Event) -> bool:
    """Whether it is the call of `boltzmann_sums` that does nothing where a first one went well."""
    return event["name"].endswith("sums") and _list(event, "Concrete Inputs")[8:9] == ["True"]


def _wanted(event: Event) -> int:
    """Of `boltzmann_grads`: by z_hat and z, one product each."""
    flags = re.findall("True|False", "".join(_list(event, "Concrete Inputs")[-1:]))
    return max(flags[:2].count("True"), 1)
