"""Reads the SQLite file that `nsys export -t sqlite` writes, in its older and newer schemas.

A table exists only where something was recorded, and columns differ between versions: the text of
an NVTX range is in the table or, by number, in StringIds; the name of a kernel is `demangledName`,
`shortName` or `name`, that of an API call `nameId`; a range that was never closed ends at NULL, 0
or -1; call stacks exist where they were requested. All of this is read from the file itself.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from m3i_fast.profiling.nsys import device, host
from m3i_fast.profiling.nsys.tables import Tables
from m3i_fast.profiling.recording import (
    STEP,
    HostRange,
    Recording,
    StageLookup,
    expect_steps,
    is_stage,
)

RANGES = "NVTX_EVENTS"
RANGE_TYPES = (59, 60)
"""Of a thread, and from one thread to another; other events are marks, categories and domains."""
DALI_OPERATOR = re.compile(r"\[DALI\]\[\w+ op\] Run (.+)")
"""Ranges in which DALI runs an operator of the loader."""


def read_nsys(path: Path) -> Recording:
    """Read the steps in an export of nsys, of a GPU or of a CPU alone.

    Raises FileNotFoundError, and ValueError naming the file and the missing table or column, for a
    file that is no export, is damaged or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an export of nsys, got no file")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _recording(Tables(database, path))
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: not a whole SQLite file ({error}); export the report again: nsys export -t "
            f"sqlite --force-overwrite true REPORT.nsys-rep"
        ) from error


def _recording(tables: Tables) -> Recording:
    """Read the steps, their stages, and what ran in them."""
    notes: list[str] = []
    ranges = _ranges(tables, notes)
    steps = [each for each in ranges if each.name == STEP]
    expect_steps(steps, str(tables.path))
    thread = steps[0].thread
    if len({step.thread for step in steps}) > 1:
        notes.append("steps of several threads: only those of the first are read")
    steps = [step for step in steps if step.thread == thread]
    stages = [r for r in ranges if is_stage(r.name) and r.thread == thread]
    stage_at = StageLookup(stages)
    on_gpu = device.has_device(tables) or host.OS_CALLS not in tables
    if on_gpu:
        activities = device.activities(tables, steps, stage_at)
        waits = tuple(device.waits(tables, steps, stage_at))
    else:
        activities, waits = (), tuple(host.os_calls(tables, steps, stage_at))
    notes.extend(tables.complaints())
    return Recording(
        source=str(tables.path),
        device="cuda" if on_gpu else "cpu",
        steps=tuple(steps),
        stages=tuple(stages),
        activities=activities,
        waits=waits,
        threads=tuple(host.threads(tables, steps)),
        loader=tuple(_loader(ranges, steps)),
        notes=tuple(notes),
    )


def _ranges(tables: Tables, notes: list[str]) -> list[HostRange]:
    """Return the closed ranges of steps, stages and the loader's operators by their start.

    Notes how many were never closed.
    """
    tables.expect(RANGES, "nvtx")
    ranges, num_open = [], 0
    columns = "start", "end", "text?", "textId?", "globalTid?", "eventType?", "domainId?"
    for begin, end, text, text_id, thread, kind, domain in tables.rows(RANGES, *columns):
        name = text if text else tables.text(text_id)
        ours = not domain and (name == STEP or is_stage(name))
        if not (ours or DALI_OPERATOR.match(name)) or kind not in (None, *RANGE_TYPES):
            continue
        if end is None or end < begin or end <= 0:
            num_open += ours
            continue
        ranges.append(HostRange(name, begin, end, thread))
    if num_open:
        notes.append(f"{num_open} ranges were never closed and are left out")
    return sorted(ranges, key=lambda each: each.begin)


def _loader(ranges: Sequence[HostRange], steps: Sequence[HostRange]) -> Iterator[HostRange]:
    """Yield the operators that the loader ran during the steps, by their own names."""
    for each in ranges:
        operator = DALI_OPERATOR.match(each.name)
        if operator and steps[0].begin <= each.begin < steps[-1].end:
            yield replace(each, name=operator[1])
