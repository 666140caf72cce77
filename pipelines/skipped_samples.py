"""Samples that could not be used: which they are, in files that a resume reads again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from m3i_fast.json_files import parse_json
from m3i_fast.pipelines.samples_to_views import SampleError

logger = logging.getLogger(__name__)

_SHAPE = {"sample_id": int, "row": int}


class SkippedSamples:
    """The samples that a rank's loader skips, and their file, to which new ones are appended.

    The first rank writes `file`, rank N the file of the same name with -rankN: no two processes
    write to one. A resume knows those of all ranks, and counts its own rank's.
    """

    def __init__(self, file: Path | None, rank: int) -> None:
        """file: JSON lines; None: nothing is written."""
        self._first = file
        self._own = file.with_stem(f"{file.stem}-rank{rank}") if file and rank else file
        self.known: set[int] = set()  # rows of the table
        self.count = 0  # of this rank

    def read(self) -> None:
        """Take note of the samples in the files; raises OSError as reading does.

        A line that a crash cut off is left out with a warning: its sample is found again.
        """
        if self._first is None:
            return
        own: set[int] = set()
        others = self._first.parent.glob(f"{self._first.stem}-rank*{self._first.suffix}")
        for file in (self._first, *sorted(others)):
            rows = _rows(file) if file.is_file() else set()
            self.known |= rows
            own |= rows if file == self._own else set()
        self.count = max(self.count, len(own))

    def add(self, row: int, error: SampleError) -> None:
        """Take note of a sample and append it to the file."""
        self.known.add(row)
        self.count += 1
        if self._own is None:
            return
        told: dict[str, Any] = {
            "sample_id": error.sample_id,
            "row": row,
            "position": error.position,
            "file": error.file,
            "reason": error.reason,
        }
        before = self._own.read_bytes() if self._own.is_file() else b""
        ends = not before or before.endswith(b"\n")
        with self._own.open("a") as file:
            file.write(("" if ends else "\n") + json.dumps(told) + "\n")


def _rows(file: Path) -> set[int]:
    rows = set()
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            rows.add(parse_json(line, _SHAPE, f"{file}:{number}")["row"])
        except ValueError as error:
            logger.warning("%s; the line is left out", error)
    return rows
