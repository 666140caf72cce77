"""Reads the SQLite file that `nsys export -t sqlite` writes, of its older and newer schemas.

Tables are made only where something was recorded, and columns came and went: texts of NVTX ranges
stand in the table or, by number, in StringIds; the name of a kernel is `demangledName`, `shortName`
or `name`, of an API call `nameId`; a range that was never closed ends at NULL, 0 or -1; call stacks
are there where they were asked for. All of it is looked up in the file at hand.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from m3i_fast.profiling.recording import (
    STEP,
    Inside,
    Interval,
    Recording,
    Wait,
    Work,
    expect_steps,
    is_stage,
)

KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "Memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "Memset"}
CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
WAITS = "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION"
RANGES = "NVTX_EVENTS"
STACKS = "CUDA_CALLCHAINS"
DIAGNOSTICS = "DIAGNOSTIC_EVENT"
HOST_WAITS = {1: "cudaEventSynchronize", 3: "cudaStreamSynchronize", 4: "cudaDeviceSynchronize"}
"""CUPTI's kinds of synchronisation in which the host waits; 2 is of one stream for another."""
DIRECTIONS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}


def read_nsys(path: Path) -> Recording:
    """The steps in an export.

    Raises FileNotFoundError, and ValueError naming the file and the table or column that is not
    there, for what is no export, is damaged, or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an export of nsys, there is no file")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _Export(database, path).recording()
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: not a whole SQLite file ({error}); export the report again: nsys export -t "
            f"sqlite --force-overwrite true REPORT.nsys-rep"
        ) from error


class _Export:
    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self._path = database, path
        found = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self._tables = {name for (name,) in found}
        self._notes: list[str] = []
        self._strings: dict[int, str] = {}
        if "StringIds" in self._tables:
            self._strings = dict(self._rows("StringIds", "id", "value"))

    def recording(self) -> Recording:
        ranges = self._ranges()
        steps = [interval for interval in ranges if interval.name == STEP]
        expect_steps(steps, str(self._path))
        thread = steps[0].thread
        if len({step.thread for step in steps}) > 1:
            self._notes.append("steps of several threads: only those of the first are read")
        steps = [step for step in steps if step.thread == thread]
        stages = [r for r in ranges if is_stage(r.name) and r.thread == thread]
        inside = Inside(stages)
        launched = self._launches(steps)
        work = sorted(
            (*self._kernels(launched, inside), *self._copies(launched, inside)),
            key=lambda item: item.begin,
        )
        waits = tuple(self._waits(steps, inside))
        self._diagnostics()
        return Recording(
            source=str(self._path),
            device="cuda",
            steps=tuple(steps),
            stages=tuple(stages),
            work=tuple(work),
            waits=waits,
            notes=tuple(self._notes),
        )

    # ---- Tables and columns

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self._database.execute(f'PRAGMA table_info("{table}")')}

    def _expect_table(self, table: str, trace: str) -> None:
        if table not in self._tables:
            raise ValueError(
                f"{self._path}: no table {table}: nothing of it was recorded; expected nsys to be "
                f"run with --trace={trace}"
            )

    def _rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        """In the table's order. `a|b|c`: the first of these that there is, `a?`: NULL without."""
        there = self._columns(table)
        chosen = []
        for column in columns:
            names = column.rstrip("?").split("|")
            first = next((f'"{name}"' for name in names if name in there), None)
            if first is None and not column.endswith("?"):
                raise ValueError(
                    f"{self._path}: table {table} has no column {' or '.join(names)}; it has "
                    f"{', '.join(sorted(there))}"
                )
            chosen.append(first or "NULL")
        yield from self._database.execute(f'SELECT {", ".join(chosen)} FROM "{table}"')

    def _text(self, value: Any) -> str:
        """A text, or the number of one."""
        if isinstance(value, int):
            return self._strings.get(value, f"string {value}")
        return str(value)

    # ---- What is in them

    def _ranges(self) -> list[Interval]:
        self._expect_table(RANGES, "nvtx")
        found, num_open = [], 0
        for begin, end, text, text_id, thread in self._rows(
            RANGES, "start", "end", "text?", "textId?", "globalTid?"
        ):
            name = text if text else self._text(text_id)
            if name != STEP and not is_stage(name):
                continue
            if end is None or end < begin or end <= 0:
                num_open += 1
                continue
            found.append(Interval(name, begin, end, thread))
        if num_open:
            self._notes.append(f"{num_open} ranges were never closed and are left out")
        return sorted(found, key=lambda interval: interval.begin)

    def _launches(self, steps: list[Interval]) -> dict[int, int]:
        """Correlation to the moment of the call, of calls in the steps."""
        self._expect_table(CALLS, "cuda")
        begin, end = steps[0].begin, steps[-1].end
        rows = self._rows(CALLS, "start", "correlationId")
        return {number: start for start, number in rows if begin <= start < end}

    def _kernels(self, launched: dict[int, int], inside: Inside) -> Iterator[Work]:
        self._expect_table(KERNELS, "cuda")
        columns = "start", "end", "streamId", "correlationId", "demangledName|shortName|name"
        for begin, end, stream, number, name in self._rows(KERNELS, *columns):
            if number in launched:
                yield Work(
                    name=self._text(name),
                    begin=begin,
                    end=end,
                    own=end - begin,
                    stage=inside(launched[number]),
                    stream=stream,
                )

    def _copies(self, launched: dict[int, int], inside: Inside) -> Iterator[Work]:
        for table, kind in COPIES.items():
            if table not in self._tables:
                continue
            columns = "start", "end", "streamId", "correlationId", "bytes?", "copyKind?"
            for begin, end, stream, number, num_bytes, way in self._rows(table, *columns):
                if number in launched:
                    yield Work(
                        name=f"{kind} {DIRECTIONS.get(way, '')}".strip(),
                        begin=begin,
                        end=end,
                        own=end - begin,
                        stage=inside(launched[number]),
                        stream=stream,
                        num_bytes=float(num_bytes or 0),
                    )

    def _waits(self, steps: list[Interval], inside: Inside) -> Iterator[Wait]:
        """Of the table of waits where CUPTI kept one, else of the API's calls, by their names."""
        stacks = self._stacks()
        chains = {}
        calls: list[tuple[str, int, int, int]] = []
        columns = "start", "end", "correlationId", "nameId|name", "callchainId?"
        for start, end, number, name, chain in self._rows(CALLS, *columns):
            chains[number] = chain
            calls.append((self._text(name).partition("_v")[0], start, end, number))
        if WAITS in self._tables:
            found = [
                (HOST_WAITS[kind], start, end, number)
                for start, end, number, kind in self._rows(
                    WAITS, "start", "end", "correlationId", "syncType"
                )
                if kind in HOST_WAITS
            ]
        else:
            found = [call for call in calls if call[0].endswith("Synchronize")]
        for name, start, end, number in sorted(found, key=lambda item: item[1]):
            if steps[0].begin <= start < steps[-1].end:
                stack = stacks.get(chains.get(number), ())
                yield Wait(name=name, begin=start, end=end, stage=inside(start), stack=stack)

    def _stacks(self) -> dict[Any, tuple[str, ...]]:
        """Call stacks by their number, the innermost frame first."""
        if STACKS not in self._tables:
            return {}
        frames: dict[Any, list[tuple[int, str]]] = defaultdict(list)
        for number, symbol, depth in self._rows(STACKS, "id", "symbol", "stackDepth"):
            frames[number].append((depth, self._text(symbol)))
        return {number: tuple(s for _, s in sorted(found)) for number, found in frames.items()}

    def _diagnostics(self) -> None:
        """What nsys itself complains of, once each; severities above information."""
        if DIAGNOSTICS in self._tables:
            told = [
                text
                for text, severity in self._rows(DIAGNOSTICS, "text", "severity?")
                if severity is None or severity >= 2
            ]
            self._notes.extend(f"nsys: {text}" for text in dict.fromkeys(map(self._text, told)))
