"""A fault to plant in a source: the line, what takes its place, and what is then reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """`before` stands once in the source; with `after` in its place the report matches `report`."""

    source: str
    before: str
    after: str
    launcher: str
    report: str

    def plant(self, path: Path) -> None:
        text = path.read_text()
        assert text.count(self.before) == 1, f"{text.count(self.before)} times: {self.before}"
        path.write_text(text.replace(self.before, self.after))
