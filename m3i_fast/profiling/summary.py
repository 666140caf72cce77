"""Summary of a recording: where the time of a step goes, by stage, family and kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_fast.json_files import misfit, read_json
from m3i_fast.observe.stages import STAGES, family_of
from m3i_fast.profiling.host_rows import loader_rows, thread_rows, wait_rows
from m3i_fast.profiling.kernel_families import FAMILIES, family, normalised
from m3i_fast.profiling.recording import (
    BETWEEN,
    LOADER,
    Activity,
    Recording,
    length,
    overlap,
    self_times,
    union,
)

SCHEMA = 1
_ROWS = [{"name": str, "ms": float, "share": float}]
_READ_BY_DIFF = {  # what `diff` reads of a summary
    **dict.fromkeys(("recipe", "profiler", "kind", "device"), str),
    "step_ms": float,
    "stages": _ROWS,
    "kernels": [{**_ROWS[0], "calls": float}],
    "device_waits": [{"name": str, "stage": str, "ms": float, "calls": float}],
}
SLOWED = 1.1
"""Factor above which a slowdown of profiled steps, or a change of pace, is warned of."""
DISAGREES = 0.02
"""Share above which a stage's time by the profiler and by the program's own timer differ."""
LONG_MS = 10.0
"""Length of a stage, in ms a step, from which its two times are compared; in a shorter one the
microseconds between two readings of a clock count."""

_OUTSIDE = {BETWEEN: "Between stages", LOADER: "Loader, beside the steps"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Peak rates of a card, as its maker publishes them."""

    name: str
    flop_s: float
    byte_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Milliseconds of a step in three windows of the same run: before, during, after profiling."""

    before_ms: float
    profiled_ms: float
    after_ms: float

    @property
    def slowdown(self) -> float:
        """Return the time of a profiled step over the mean of the others."""
        return self.profiled_ms / ((self.before_ms + self.after_ms) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostWait:
    """A line of code at which the host waits for a GPU, or would if there were one."""

    name: str
    stage: str
    stack: tuple[str, ...]
    """Call stack, the innermost frame first."""
    calls: float
    """Number of calls a step."""


def summarise(
    recording: Recording,
    *,
    recipe: str,
    profiler: str,
    device: str,
    pace: Pace,
    own: Mapping[str, float] | None = None,
    waits: Sequence[HostWait] = (),
    peak: Peak | None = None,
) -> dict[str, Any]:
    """Return the summary of a recording; JSON-able.

    Times are in ms a step. Shares are of the step; those of `families` and `kernels` are of all
    activities and sum to 1. own: times of the stages of the same steps by the program's own timer,
    where that is the host's clock. waits: host waits that were recorded in a step of their own,
    with stacks.
    """
    steps = len(recording.steps)
    window = recording.end - recording.begin
    gpu = _gpu(recording, window) if recording.device == "cuda" else None
    stages = _stages(recording, window, own or {})
    summary = {
        "schema": SCHEMA,
        "recipe": recipe,
        "profiler": profiler,
        "kind": recording.device,
        "device": device,
        "num_steps": steps,
        "step_ms": window / steps / 1e6,
        "pace": asdict(pace) | {"slowdown": pace.slowdown},
        "stages": stages,
        "families": _families(recording.activities, steps),
        "kernels": _kernels(recording.activities, steps, peak),
        "gpu": gpu,
        "data_wait_share": sum(s["share"] for s in stages if s["name"] == "data.wait"),
        "work_share": length(union((w.begin, w.end) for w in recording.activities)) / window,
        "peak": asdict(peak) if peak else None,
        "waits": [asdict(wait) | {"stack": list(wait.stack)} for wait in waits],
        "device_waits": wait_rows(recording.waits, steps),
        "threads": thread_rows(recording.threads, steps),
        "loader": loader_rows(recording.loader, steps),
        "notes": [*recording.notes],
    }
    summary["notes"] += [*_warnings(pace), *_disagreement(stages)]
    return summary


def _warnings(pace: Pace) -> Iterator[str]:
    windows = f"{pace.before_ms:.1f} ms before and {pace.after_ms:.1f} ms after"
    if pace.slowdown > SLOWED:
        yield (
            f"PROFILING SLOWED THE RUN {pace.slowdown:.2f} times: {pace.profiled_ms:.1f} ms a step "
            f"against {windows}. Shares of kernels with many small calls are too large; take times "
            "from the other steps."
        )
    faster, slower = sorted((pace.before_ms, pace.after_ms))
    if slower > SLOWED * faster:
        yield (
            f"THE RUN'S OWN PACE CHANGED: {windows} a step, without profiling. The machine does "
            "other work, or the steps are not steady yet (raise --warmup): do not compare times "
            "with these."
        )


def _disagreement(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warn of the stages whose times by the profiler are not those that the program measured."""
    apart = [
        f"{stage['name']} {stage['ms']:.2f} and {stage['own_ms']:.2f} ms"
        for stage in stages
        if stage["own_ms"] is not None
        and max(stage["ms"], stage["own_ms"]) >= LONG_MS
        and abs(stage["ms"] - stage["own_ms"]) > DISAGREES * stage["own_ms"]
    ]
    if apart:
        yield (
            f"THE PROFILER AND THE PROGRAM'S OWN TIMER DISAGREE on {', '.join(apart)}: the "
            "recording lacks events, or the machine was so busy that time passed between the two."
        )


def _stages(recording: Recording, window: int, own: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row a stage, in the order of a step; what no stage covers comes last.

    `ms` is the host's self time, `own_ms` the same by the program's own timer; on a GPU `device_ms`
    is the time in which something that the stage launched ran.
    """
    steps = len(recording.steps)
    begin, end = recording.steps[0].begin, recording.steps[-1].end
    inside = [s for s in recording.stages if begin <= s.begin < end]
    host: dict[str, int] = defaultdict(int)
    for stage, self_ns in zip(inside, self_times(inside), strict=True):
        host[stage.name] += self_ns
    host[BETWEEN] = window - sum(host.values())
    on_device: dict[str, list[Activity]] = defaultdict(list)
    for activity in recording.activities if recording.device == "cuda" else ():
        on_device[activity.stage].append(activity)
    order = [*STAGES, *_OUTSIDE]
    names = sorted(set(host) | set(on_device), key=lambda name: (order.index(_key(name)), name))
    return [
        {
            "name": name,
            "title": _title(name),
            "ms": host[name] / steps / 1e6,
            "share": host[name] / window,
            "own_ms": own.get(name),
            "device_ms": _busy(on_device[name]) / steps / 1e6 if on_device else None,
        }
        for name in names
    ]


def _key(stage: str) -> str:
    return stage if stage in _OUTSIDE else family_of(stage)


def _title(stage: str) -> str:
    if stage in _OUTSIDE:
        return _OUTSIDE[stage]
    if stage.startswith("loss."):
        return f"Loss, {stage.removeprefix('loss.')}"
    return STAGES[stage]


def _busy(activities: Iterable[Activity]) -> int:
    return length(union((item.begin, item.end) for item in activities))


def _families(activities: Sequence[Activity], steps: int) -> list[dict[str, Any]]:
    sums: dict[str, int] = defaultdict(int)
    for item in activities:
        sums[family(item.name)] += item.self_ns
    total = sum(sums.values())
    return [
        {
            "name": name,
            "title": FAMILIES[name],
            "ms": self_ns / steps / 1e6,
            "share": self_ns / total if total else 0.0,
        }
        for name, self_ns in sorted(sums.items(), key=lambda pair: -pair[1])
    ]


def _kernels(activities: Sequence[Activity], steps: int, peak: Peak | None) -> list[dict[str, Any]]:
    """Return a row a kernel, the longest first; rates are of calls with known FLOPs or bytes."""
    groups: dict[tuple[str, str], list[Activity]] = defaultdict(list)
    for item in activities:
        groups[normalised(item.name), family(item.name)].append(item)
    total = sum(item.self_ns for item in activities)
    rows = []
    for (name, kind), items in groups.items():
        self_ns = sum(item.self_ns for item in items)
        flop_s = _rate(items, lambda item: item.flops)
        # Operators of no family create views and do bookkeeping: they move no data.
        byte_s = None if kind == "other" else _rate(items, lambda item: item.num_bytes)
        rows.append(
            {
                "name": name,
                "family": kind,
                "ms": self_ns / steps / 1e6,
                "calls": len(items) / steps,
                "share": self_ns / total if total else 0.0,
                "flop_s": flop_s,
                "byte_s": byte_s,
                "of_peak_flop_s": flop_s / peak.flop_s if peak and flop_s else None,
                "of_peak_byte_s": byte_s / peak.byte_s if peak and byte_s else None,
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _rate(items: Sequence[Activity], amount: Callable[[Activity], float]) -> float | None:
    """Return the amount a second over the calls that spend most of their time in themselves."""
    known = [i for i in items if amount(i) > 0 and i.self_ns > (i.end - i.begin) / 2]
    nanoseconds = sum(item.self_ns for item in known)
    return 1e9 * sum(map(amount, known)) / nanoseconds if nanoseconds else None


def _gpu(recording: Recording, window: int) -> dict[str, Any]:
    """Return busy and idle shares of the window, and how much communication is overlapped."""
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    streams: set[Hashable] = set()
    for item in recording.activities:
        spans[family(item.name) == "comm"].append((item.begin, item.end))
        streams.add(item.stream)
    sent, other = union(spans[True]), union(spans[False])
    busy = union([*sent, *other])
    steps = len(recording.steps)
    return {
        "num_streams": len(streams),
        "busy_ms": length(busy) / steps / 1e6,
        "idle_share": 1 - length(busy) / window,
        "longest_idle_ms": max(map(_gap, zip(busy, busy[1:], strict=False)), default=0) / 1e6,
        "comm_ms": length(sent) / steps / 1e6,
        "comm_overlap": overlap(sent, other) / length(sent) if sent else None,
    }


def _gap(pair: tuple[tuple[int, int], tuple[int, int]]) -> int:
    return pair[1][0] - pair[0][1]


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json of a folder, or the file itself.

    Raises FileNotFoundError, and ValueError naming the file for one that is no such summary.
    """
    path = folder / "summary.json" if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a summary that m3i-fast profile wrote")
    summary: dict[str, Any] = read_json(path)
    if summary.get("schema") != SCHEMA:
        got = summary.get("schema")
        raise ValueError(f"{path}: expected a summary of schema {SCHEMA}, got {got}")
    if wrong := misfit(summary, _READ_BY_DIFF):
        raise ValueError(f"{path}: damaged: {wrong}")
    return summary
