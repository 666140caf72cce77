"""What changed in the machine code of kernels against an earlier report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_fast.json_files import read_json

NUMBERS = {
    "registers": "registers",
    "instructions": "instructions",
    "longest_block": "longest block",
    "spills": "spills",
}
TABLES = ("by_class", "accesses", "atomics")
SHAPE = {
    "kernels": [
        {
            "kernel": str,
            "architecture": str,
            **dict.fromkeys(NUMBERS, int),
            **dict.fromkeys(TABLES, {str: int}),
            "loads_in_flight": {str: int},
            "loops": [{"instructions": int, "line": str, "depth": int}],
        }
    ]
}
"""Of a report's file."""


@dataclass(frozen=True, slots=True)
class Change:
    """A figure of a kernel that is not what it was."""

    kernel: str
    architecture: str
    what: str
    before: int
    now: int

    @property
    def share(self) -> float | None:
        """Return by how much it grew, of what it was; None where there was nothing."""
        return (self.now - self.before) / self.before if self.before else None


def read_report(file: Path) -> list[dict[str, Any]]:
    """Return the kernels of a report. Raises ValueError for anything else."""
    if not file.is_file():
        raise ValueError(f"baseline: expected a file that --json wrote, got {file}")
    kernels: list[dict[str, Any]] = read_json(file, SHAPE)["kernels"]
    return kernels


def changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Change]:
    """Return what changed of the kernels of both, in the order of the newer report."""
    earlier = {(each["kernel"], each["architecture"]): each for each in before}
    found = []
    for each in now:
        if old := earlier.get((each["kernel"], each["architecture"])):
            named, renamed = figures(each), figures(old)
            for what in dict.fromkeys([*named, *renamed]):
                numbers = renamed.get(what, 0), named.get(what, 0)
                if numbers[0] != numbers[1]:
                    found.append(Change(each["kernel"], each["architecture"], what, *numbers))
    return found


def only_in_one(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the kernels that are only in one of two reports, as a reader is told."""
    names = [[f"{e['kernel']}, sm_{e['architecture']}" for e in report] for report in (before, now)]
    yield from (f"gone: {name}" for name in names[0] if name not in names[1])
    yield from (f"new: {name}" for name in names[1] if name not in names[0])


def figures(kernel: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of a kernel that a change is told of, by what they are."""
    found = {shown: kernel[name] for name, shown in NUMBERS.items()}
    found["most loads in flight"] = max(map(int, kernel["loads_in_flight"]), default=0)
    found["loops"] = len(kernel["loops"])
    for table in TABLES:
        found |= kernel[table]
    for number, loop in enumerate(kernel["loops"]):
        found[f"loop {number}"] = loop["instructions"]
    return found
