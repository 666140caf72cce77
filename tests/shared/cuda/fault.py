"""A fault to plant in a source: the line, what takes its place, and what is then reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Fault:
    """`before` stands once in the source; with `after` in its place the report matches `report`."""

    source: str
    before: str
    after: str
    launcher: str
    report: str

    def planted(self, text: str) -> str:
        assert text.count(self.before) == 1, f"{text.count(self.before)} times: {self.before}"
        return text.replace(self.before, self.after)

    def plant(self, path: Path) -> None:
        path.write_text(self.planted(path.read_text()))


def a_third_by_day(faults: Mapping[str, Fault]) -> list[Any]:
    """Parameters of a test that builds a kernel for each: all but every third are nightly."""
    return [
        pytest.param(fault, id=name, marks=[pytest.mark.nightly] if number % 3 else [])
        for number, (name, fault) in enumerate(faults.items())
    ]
