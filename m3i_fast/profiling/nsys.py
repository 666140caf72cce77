"""Reads the SQLite file that `nsys export -t sqlite` writes, in its older and newer schemas.

A table exists only where something was recorded, and columns differ between versions: the text of
an NVTX range is in the table or, by number, in StringIds; the name of a kernel is `demangledName`,
`shortName` or `name`, that of an API call `nameId`; a range that was never closed ends at NULL, 0
or -1; call stacks exist where they were requested. All of this is read from the file itself.
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
    Activity,
    HostRange,
    Recording,
    StageLookup,
    SyncCall,
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
"""CUPTI's kinds of synchronisation in which the host waits; in kind 2 a stream waits."""
DIRECTIONS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}


def read_nsys(path: Path) -> Recording:
    """Read the steps in an export of nsys.

    Raises FileNotFoundError, and ValueError naming the file and the missing table or column, for a
    file that is no export, is damaged or holds no whole step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an export of nsys, got no file")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            return _Export(database, path).recording()
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{path}: not a whole SQLite file ({error}); export the report again: nsys export -t "
            f"sqlite --force-overwrite true REPORT.nsys-rep"
        ) from error


class _Export:
    """An open export: its tables, strings and notes."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self._path = database, path
        names = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
        self._tables = {name for (name,) in names}
        self._notes: list[str] = []
        self._strings: dict[int, str] = {}
        if "StringIds" in self._tables:
            self._strings = dict(self._rows("StringIds", "id", "value"))

    def recording(self) -> Recording:
        """Read the steps, their stages, activities and waits."""
        ranges = self._ranges()
        steps = [each for each in ranges if each.name == STEP]
        expect_steps(steps, str(self._path))
        thread = steps[0].thread
        if len({step.thread for step in steps}) > 1:
            self._notes.append("steps of several threads: only those of the first are read")
        steps = [step for step in steps if step.thread == thread]
        stages = [r for r in ranges if is_stage(r.name) and r.thread == thread]
        stage_at = StageLookup(stages)
        launched = self._launches(steps)
        activities = sorted(
            (*self._kernels(launched, stage_at), *self._copies(launched, stage_at)),
            key=lambda item: item.begin,
        )
        waits = tuple(self._waits(steps, stage_at))
        self._diagnostics()
        return Recording(
            source=str(self._path),
            device="cuda",
            steps=tuple(steps),
            stages=tuple(stages),
            activities=tuple(activities),
            waits=waits,
            notes=tuple(self._notes),
        )

    # ---- Tables and columns

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self._database.execute(f'PRAGMA table_info("{table}")')}

    def _expect_table(self, table: str, trace: str) -> None:
        if table not in self._tables:
            raise ValueError(
                f"{self._path}: expected a table {table}, got none, so nothing of it was recorded; "
                f"run nsys with --trace={trace}"
            )

    def _rows(self, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield columns of a table's rows; `a|b|c`: the first that exists, `a?`: NULL if absent."""
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
        """Return a text, looked up where it is the number of one."""
        if isinstance(value, int):
            return self._strings.get(value, f"string {value}")
        return str(value)

    # ---- Contents of the tables

    def _ranges(self) -> list[HostRange]:
        self._expect_table(RANGES, "nvtx")
        ranges, num_open = [], 0
        for begin, end, text, text_id, thread in self._rows(
            RANGES, "start", "end", "text?", "textId?", "globalTid?"
        ):
            name = text if text else self._text(text_id)
            if name != STEP and not is_stage(name):
                continue
            if end is None or end < begin or end <= 0:
                num_open += 1
                continue
            ranges.append(HostRange(name, begin, end, thread))
        if num_open:
            self._notes.append(f"{num_open} ranges were never closed and are left out")
        return sorted(ranges, key=lambda each: each.begin)

    def _launches(self, steps: list[HostRange]) -> dict[int, int]:
        """Return when each call within the steps was made, by its correlation id."""
        self._expect_table(CALLS, "cuda")
        begin, end = steps[0].begin, steps[-1].end
        rows = self._rows(CALLS, "start", "correlationId")
        return {number: start for start, number in rows if begin <= start < end}

    def _kernels(self, launched: dict[int, int], stage_at: StageLookup) -> Iterator[Activity]:
        self._expect_table(KERNELS, "cuda")
        columns = "start", "end", "streamId", "correlationId", "demangledName|shortName|name"
        for begin, end, stream, number, name in self._rows(KERNELS, *columns):
            if number in launched:
                yield Activity(
                    name=self._text(name),
                    begin=begin,
                    end=end,
                    self_ns=end - begin,
                    stage=stage_at(launched[number]),
                    stream=stream,
                )

    def _copies(self, launched: dict[int, int], stage_at: StageLookup) -> Iterator[Activity]:
        for table, kind in COPIES.items():
            if table not in self._tables:
                continue
            columns = "start", "end", "streamId", "correlationId", "bytes?", "copyKind?"
            for begin, end, stream, number, num_bytes, way in self._rows(table, *columns):
                if number in launched:
                    yield Activity(
                        name=f"{kind} {DIRECTIONS.get(way, '')}".strip(),
                        begin=begin,
                        end=end,
                        self_ns=end - begin,
                        stage=stage_at(launched[number]),
                        stream=stream,
                        num_bytes=float(num_bytes or 0),
                    )

    def _waits(self, steps: list[HostRange], stage_at: StageLookup) -> Iterator[SyncCall]:
        """Yield the host's waits from CUPTI's table of them, else from API calls by name."""
        stacks = self._stacks()
        chains = {}
        calls: list[tuple[str, int, int, int]] = []
        columns = "start", "end", "correlationId", "nameId|name", "callchainId?"
        for start, end, number, name, chain in self._rows(CALLS, *columns):
            chains[number] = chain
            calls.append((self._text(name).partition("_v")[0], start, end, number))
        if WAITS in self._tables:
            waits = [
                (HOST_WAITS[kind], start, end, number)
                for start, end, number, kind in self._rows(
                    WAITS, "start", "end", "correlationId", "syncType"
                )
                if kind in HOST_WAITS
            ]
        else:
            waits = [call for call in calls if call[0].endswith("Synchronize")]
        for name, start, end, number in sorted(waits, key=lambda wait: wait[1]):
            if steps[0].begin <= start < steps[-1].end:
                stack = stacks.get(chains.get(number), ())
                yield SyncCall(name=name, begin=start, end=end, stage=stage_at(start), stack=stack)

    def _stacks(self) -> dict[Any, tuple[str, ...]]:
        """Return the call stacks by their number, the innermost frame first."""
        if STACKS not in self._tables:
            return {}
        frames: dict[Any, list[tuple[int, str]]] = defaultdict(list)
        for number, symbol, depth in self._rows(STACKS, "id", "symbol", "stackDepth"):
            frames[number].append((depth, self._text(symbol)))
        return {number: tuple(s for _, s in sorted(stack)) for number, stack in frames.items()}

    def _diagnostics(self) -> None:
        """Note nsys's own complaints, once each, of severities above information."""
        if DIAGNOSTICS in self._tables:
            messages = [
                text
                for text, severity in self._rows(DIAGNOSTICS, "text", "severity?")
                if severity is None or severity >= 2
            ]
            texts = dict.fromkeys(map(self._text, messages))
            self._notes.extend(f"nsys: {text}" for text in texts)
