"""Difference of two profiles: what makes the steps of one slower than those of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3i_fast.profiling.summary_text import Table, table

TOP = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Change of a stage or a kernel from profile A to profile B; 0 where it is absent."""

    name: str
    a_ms: float
    b_ms: float
    a_calls: float = 0.0
    b_calls: float = 0.0
    a_share: float = 0.0
    b_share: float = 0.0

    @property
    def delta_ms(self) -> float:
        """Return the milliseconds that B takes more than A."""
        return self.b_ms - self.a_ms

    @property
    def why(self) -> str:
        """Return new, gone, more calls, fewer calls, slower calls or faster calls.

        Of the number and the length of the calls, it names the one that causes more of the change.
        """
        if self.a_calls == 0 or self.b_calls == 0:
            return "new" if self.a_calls == 0 else "gone"
        before = self.a_ms / self.a_calls
        by_number = (self.b_calls - self.a_calls) * before
        by_length = self.delta_ms - by_number
        if abs(by_number) > abs(by_length):
            return "more calls" if by_number > 0 else "fewer calls"
        return "slower calls" if by_length > 0 else "faster calls"


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The changes between two profiles, the largest first, whatever their sign."""

    a: str
    b: str
    step: Change
    stages: tuple[Change, ...]
    kernels: tuple[Change, ...]
    waits: tuple[Change, ...]
    """Of the waits that the profiler recorded, each a call in a stage."""
    notes: tuple[str, ...]


def compare_profiles(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    """Compare two summaries, as `summary.summarise` makes them.

    Raises ValueError where one is of a GPU's kernels and the other of a CPU's operators.
    """
    if a["kind"] != b["kind"]:
        raise ValueError(
            f"profile diff: expected two profiles of one kind of device, got {a['kind']} and "
            f"{b['kind']}; profile both on a GPU, or both on a CPU"
        )
    notes = [
        f"{what} differs: {a[key]} and {b[key]}"
        for key, what in (("device", "The device"), ("profiler", "The profiler"))
        if a[key] != b[key]
    ]
    return Difference(
        a=a["recipe"],
        b=b["recipe"],
        step=Change(name="step", a_ms=a["step_ms"], b_ms=b["step_ms"]),
        stages=_changes(a["stages"], b["stages"]),
        kernels=_changes(_by_name(a["kernels"]), _by_name(b["kernels"])),
        waits=_changes(_by_name(_wait_rows(a)), _by_name(_wait_rows(b))),
        notes=tuple(notes),
    )


def _by_name(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum the rows of a name: kernels that differ in template arguments may be of two families."""
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        sums = by_name.setdefault(row["name"], {"name": row["name"]})
        for key in ("ms", "calls", "share"):
            sums[key] = sums.get(key, 0.0) + row[key]
    return list(by_name.values())


def _wait_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recorded waits with names that hold their stages, and shares of the step."""
    return [
        {
            "name": f"{wait['name']}, {wait['stage']}",
            "ms": wait["ms"],
            "calls": wait["calls"],
            "share": wait["ms"] / summary["step_ms"],
        }
        for wait in summary["device_waits"]
    ]


def _changes(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[Change, ...]:
    before, after = ({row["name"]: row for row in rows} for rows in (a, b))
    none: Mapping[str, Any] = {"ms": 0.0, "calls": 0.0, "share": 0.0}
    changes = []
    for name in {**before, **after}:
        old, new = before.get(name, none), after.get(name, none)
        changes.append(
            Change(
                name=name,
                a_ms=old["ms"],
                b_ms=new["ms"],
                a_calls=old.get("calls", 1.0),
                b_calls=new.get("calls", 1.0),
                a_share=old["share"],
                b_share=new["share"],
            )
        )
    return tuple(sorted(changes, key=lambda change: -abs(change.delta_ms)))


def stage_table(difference: Difference) -> Table:
    """Return the table of the stages that changed most."""
    head = ["Stage", "A, ms", "B, ms", "B - A, ms"]
    return head, [[c.name, *_milliseconds(c)] for c in difference.stages[:TOP]]


def call_table(changes: Sequence[Change]) -> Table:
    """Return the table of the kernels or waits that changed most."""
    head = ["Name", "A, ms", "B, ms", "B - A, ms", "Calls, A", "Calls, B", "Share, A", "Share, B"]
    rows = [
        [
            change.name,
            *_milliseconds(change),
            f"{change.a_calls:.4g}",
            f"{change.b_calls:.4g}",
            f"{100 * change.a_share:.1f}%",
            f"{100 * change.b_share:.1f}%",
            change.why,
        ]
        for change in changes[:TOP]
    ]
    return [*head, "Why"], rows


def _milliseconds(change: Change) -> list[str]:
    return [f"{change.a_ms:.3f}", f"{change.b_ms:.3f}", f"{change.delta_ms:+.3f}"]


def markdown(difference: Difference) -> str:
    """Return the difference as Markdown: a sentence, and the tables."""
    step = difference.step
    paragraphs = [
        f"A step takes {step.b_ms:.3f} ms (B, {difference.b}) instead of {step.a_ms:.3f} ms (A, "
        f"{difference.a}): {step.delta_ms:+.3f} ms, {step.b_ms / step.a_ms:.3f} times as long.",
        *difference.notes,
        "## Stages",
        table(*stage_table(difference)),
    ]
    for heading, changes in (
        ("Kernels or operators", difference.kernels),
        ("Waits that the profiler recorded", difference.waits),
    ):
        if changes:
            paragraphs += [f"## {heading}", table(*call_table(changes))]
    return "\n\n".join(paragraphs) + "\n"
