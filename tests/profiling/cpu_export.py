"""An export of nsys 2023.4 without a GPU, with a known answer; times are microseconds.

Two steps of 1000 us, alike. From the beginning of a step, on the thread of the steps:
  fwd.input 0-300 with a wait for a semaphore 100-150, bwd 500-900
On other threads of the process:
  "loader" waits from before the first step to after the last, and runs DALI's decoder 10-60
  a thread without a name sleeps 200-240
Beside them what must not count: a signal of 30 ns, a call before the steps, another process, a
mark and a category named as steps and stages, a range of DALI's domain named as a stage.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

PROCESS = 7 << 24
MAIN, LOADER, ENDED = PROCESS + 1, PROCESS + 2, PROCESS + 3
ANOTHER = (8 << 24) + 1
RANGE, MARK, CATEGORY = 59, 34, 33

_TABLES = """
CREATE TABLE StringIds (id, value);
CREATE TABLE ThreadNames (nameId, priority, globalTid);
CREATE TABLE OSRT_API (start, end, eventClass, globalTid, nameId, returnValue, callchainId);
CREATE TABLE NVTX_EVENTS (start, end, eventType, text, globalTid, textId, domainId);
"""


def write_cpu_export(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_TABLES)
        file = _File(database)
        for begin in (0, 1000):
            _step(file, begin)
        file.call(-500, -400, "read", MAIN)
        file.call(-100, 2100, "pthread_cond_wait", LOADER)
        file.call(0, 2000, "poll", ANOTHER)
        file.range(0, 2000, "bwd", LOADER, domain=1)
        file.range(100, 100, "step", MAIN, kind=MARK)
        file.range(100, 100, "log", MAIN, kind=CATEGORY)
        for thread, name in ((MAIN, "python"), (LOADER, "loader"), (ANOTHER, "bash")):
            database.execute("INSERT INTO ThreadNames VALUES (?, 0, ?)", (file.text(name), thread))
        database.commit()
    return path


def _step(file: _File, at: float) -> None:
    file.range(at, at + 1000, "step", MAIN)
    file.range(at, at + 300, "fwd.input", MAIN)
    file.range(at + 500, at + 900, "bwd", MAIN)
    file.call(at + 100, at + 150, "sem_wait", MAIN)
    file.call(at + 600, at + 600.03, "pthread_cond_signal", MAIN)
    file.call(at + 200, at + 240, "clock_nanosleep", ENDED)
    file.range(at + 10, at + 60, "[DALI][CPU op] Run decoders__Image", LOADER, domain=1)
    file.range(at + 5, at + 10, "[DALI][CPU op] Setup decoders__Image", LOADER, domain=1)


class _File:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._strings: dict[str, int] = {}

    def text(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            row = self._strings[text], text
            self._database.execute("INSERT INTO StringIds VALUES (?, ?)", row)
        return self._strings[text]

    def call(self, begin: float, end: float, name: str, thread: int) -> None:
        row = round(1000 * begin), round(1000 * end), thread, self.text(name)
        sql = "INSERT INTO OSRT_API (start, end, globalTid, nameId) VALUES (?, ?, ?, ?)"
        self._database.execute(sql, row)

    def range(
        self,
        begin: float,
        end: float,
        name: str,
        thread: int,
        *,
        domain: int = 0,
        kind: int = RANGE,
    ) -> None:
        last = round(1000 * end) if kind == RANGE else None
        row = round(1000 * begin), last, kind, name, thread, domain
        sql = "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, domainId) "
        self._database.execute(f"{sql} VALUES (?, ?, ?, ?, ?, ?)", row)
