"""What a recording says of a step: where its time goes, by stage, by family and by kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_fast.json_files import misfit, read_json
from m3i_fast.observe.stages import STAGES, family_of
from m3i_fast.profiling.kernel_families import FAMILIES, family, normalised
from m3i_fast.profiling.recording import (
    BETWEEN,
    Recording,
    Wait,
    Work,
    length,
    overlap,
    own_times,
    union,
)

SCHEMA = 1
_ROWS = [{"name": str, "ms": float, "share": float}]
_COMPARED = {  # what `profile_diff` reads
    **dict.fromkeys(("recipe", "profiler", "kind", "device"), str),
    "step_ms": float,
    "stages": _ROWS,
    "kernels": [{**_ROWS[0], "calls": float}],
}
SLOWED = 1.1
"""Profiled steps that take so many times as long as others are warned of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """What the card can do at most, as its maker says."""

    name: str
    flop_s: float
    byte_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Milliseconds of a step in three windows of the same run."""

    before_ms: float
    profiled_ms: float
    after_ms: float

    @property
    def slowdown(self) -> float:
        """Of the profiled steps, over the mean of the others."""
        return self.profiled_ms / ((self.before_ms + self.after_ms) / 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostWait:
    """A line of code at which the host waits for a GPU, or would if there were one."""

    name: str
    stage: str
    stack: tuple[str, ...]
    """The innermost frame first."""
    calls: float
    """A step."""


def summarise(
    recording: Recording,
    *,
    recipe: str,
    profiler: str,
    device: str,
    pace: Pace,
    waits: Sequence[HostWait] = (),
    peak: Peak | None = None,
) -> dict[str, Any]:
    """JSON-able. Times in ms a step; shares are of the step, of `families` and `kernels` of the
    work, which sums to 1. `waits`: what was seen in a step of its own, with stacks."""
    steps = len(recording.steps)
    window = recording.end - recording.begin
    gpu = _gpu(recording, window) if recording.device == "cuda" else None
    stages = _stages(recording, window)
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
        "families": _families(recording.work, steps),
        "kernels": _kernels(recording.work, steps, peak),
        "gpu": gpu,
        "data_wait_share": sum(s["share"] for s in stages if s["name"] == "data.wait"),
        "work_share": length(union((w.begin, w.end) for w in recording.work)) / window,
        "peak": asdict(peak) if peak else None,
        "waits": [asdict(wait) | {"stack": list(wait.stack)} for wait in waits],
        "device_waits": _waits(recording.waits, steps),
        "notes": [*recording.notes],
    }
    summary["notes"] += _warnings(pace)
    return summary


def _warnings(pace: Pace) -> Iterator[str]:
    windows = f"{pace.before_ms:.1f} ms before and {pace.after_ms:.1f} ms after"
    if pace.slowdown > SLOWED:
        yield (
            f"PROFILING SLOWED THE RUN {pace.slowdown:.2f} times: {pace.profiled_ms:.1f} ms a step "
            f"against {windows}. Shares of what has many small calls are too large; take times "
            "from the other steps."
        )
    faster, slower = sorted((pace.before_ms, pace.after_ms))
    if slower > SLOWED * faster:
        yield (
            f"THE RUN'S OWN PACE CHANGED: {windows} a step, without profiling. The machine does "
            "other work, or the steps are not steady yet (--warmup): compare no times with these."
        )


def _stages(recording: Recording, window: int) -> list[dict[str, Any]]:
    """In the order of a step. `ms` of the host, without stages inside; on a GPU `device_ms`, in
    which something that the stage launched ran. What no stage covers comes last."""
    steps = len(recording.steps)
    begin, end = recording.steps[0].begin, recording.steps[-1].end
    found = [s for s in recording.stages if begin <= s.begin < end]
    host: dict[str, int] = defaultdict(int)
    for stage, own in zip(found, own_times(found), strict=True):
        host[stage.name] += own
    host[BETWEEN] = window - sum(host.values())
    on_device: dict[str, list[Work]] = defaultdict(list)
    for work in recording.work if recording.device == "cuda" else ():
        on_device[work.stage].append(work)
    order = [*STAGES, BETWEEN]
    names = sorted(set(host) | set(on_device), key=lambda name: (order.index(_key(name)), name))
    return [
        {
            "name": name,
            "title": _title(name),
            "ms": host[name] / steps / 1e6,
            "share": host[name] / window,
            "device_ms": _busy(on_device[name]) / steps / 1e6 if on_device else None,
        }
        for name in names
    ]


def _key(stage: str) -> str:
    return stage if stage == BETWEEN else family_of(stage)


def _title(stage: str) -> str:
    if stage == BETWEEN:
        return "Between stages"
    if stage.startswith("loss."):
        return f"Loss, {stage.removeprefix('loss.')}"
    return STAGES[stage]


def _busy(work: Iterable[Work]) -> int:
    return length(union((item.begin, item.end) for item in work))


def _families(work: Sequence[Work], steps: int) -> list[dict[str, Any]]:
    sums: dict[str, int] = defaultdict(int)
    for item in work:
        sums[family(item.name)] += item.own
    total = sum(sums.values())
    return [
        {
            "name": name,
            "title": FAMILIES[name],
            "ms": own / steps / 1e6,
            "share": own / total if total else 0.0,
        }
        for name, own in sorted(sums.items(), key=lambda pair: -pair[1])
    ]


def _kernels(work: Sequence[Work], steps: int, peak: Peak | None) -> list[dict[str, Any]]:
    """All, the longest first. Rates are of the calls of which FLOPs or bytes are known."""
    groups: dict[tuple[str, str], list[Work]] = defaultdict(list)
    for item in work:
        groups[normalised(item.name), family(item.name)].append(item)
    total = sum(item.own for item in work)
    rows = []
    for (name, kind), items in groups.items():
        own = sum(item.own for item in items)
        flop_s = _rate(items, lambda item: item.flops)
        # What is of no family makes views and administers: it moves nothing.
        byte_s = None if kind == "other" else _rate(items, lambda item: item.num_bytes)
        rows.append(
            {
                "name": name,
                "family": kind,
                "ms": own / steps / 1e6,
                "calls": len(items) / steps,
                "share": own / total if total else 0.0,
                "flop_s": flop_s,
                "byte_s": byte_s,
                "of_peak_flop_s": flop_s / peak.flop_s if peak and flop_s else None,
                "of_peak_byte_s": byte_s / peak.byte_s if peak and byte_s else None,
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _rate(items: Sequence[Work], amount: Callable[[Work], float]) -> float | None:
    """A second of the calls that do the work themselves, instead of calling what does."""
    known = [i for i in items if amount(i) > 0 and i.own > (i.end - i.begin) / 2]
    nanoseconds = sum(item.own for item in known)
    return 1e9 * sum(map(amount, known)) / nanoseconds if nanoseconds else None


def _gpu(recording: Recording, window: int) -> dict[str, Any]:
    """Shares of the window; of communication, what ran beside other work."""
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    streams: set[Hashable] = set()
    for item in recording.work:
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


def _waits(waits: Sequence[Wait], steps: int) -> list[dict[str, Any]]:
    """As the profiler saw them, by name, stage and stack, the longest first."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[Wait]] = defaultdict(list)
    for wait in waits:
        groups[wait.name, wait.stage, wait.stack].append(wait)
    rows = [
        {
            "name": name,
            "stage": stage,
            "stack": list(stack),
            "calls": len(found) / steps,
            "ms": sum(wait.end - wait.begin for wait in found) / steps / 1e6,
        }
        for (name, stage, stack), found in groups.items()
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a folder, or the file itself.

    Raises FileNotFoundError, and ValueError naming the file for what is no such summary.
    """
    path = folder / "summary.json" if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a summary that m3i-fast profile wrote")
    found: dict[str, Any] = read_json(path)
    if found.get("schema") != SCHEMA:
        got = found.get("schema")
        raise ValueError(f"{path}: expected a summary of schema {SCHEMA}, got {got}")
    if wrong := misfit(found, _COMPARED):
        raise ValueError(f"{path}: damaged: {wrong}")
    return found
