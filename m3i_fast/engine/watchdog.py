"""Ends a process in which no step gets done: the stacks of its threads on disk, an exit code.

A rank that is stuck has the others wait in a collective; each of them has a watchdog of its own, so
that all end within one limit, each with its stacks. Only the standard library is imported here.
"""

from __future__ import annotations

import faulthandler
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

EXIT_CODE = 76
GRACE = 5  # limits that a first step, a save or an evaluation may take


class Watchdog:
    """From `with` to its end `beat` is called at least every `seconds`, or the process ends.

    Then every thread's stack is in `path`, and the exit code is EXIT_CODE; where a thread that
    keeps Python's lock hangs, it is faulthandler's 1, a limit later. seconds: inf for none of this.
    An error that leaves the `with` has its traceback written to `path` as well, since a rank that
    dies shows as an error of the others' collectives. A process that was stopped as a whole, for
    less than a limit, and goes on is given its time again.
    """

    def __init__(self, path: Path, *, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        self._poll = min(seconds / 20, 5.0)
        self._doing = "the first step"
        self._deadline = time.monotonic() + GRACE * seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if math.isfinite(self._seconds):
            self._path.unlink(missing_ok=True)
            self._file = self._path.open("a")
            self._deadline = time.monotonic() + GRACE * self._seconds
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            return
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, RuntimeError):
            self._file.writelines(traceback.format_exception(kind, error, trace))
        self._file.close()
        if not self._path.stat().st_size:
            self._path.unlink()

    def beat(self) -> None:
        """A step is done."""
        self._doing = "a step"
        self._deadline = time.monotonic() + self._seconds

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Work that may take GRACE limits."""
        self._doing = doing
        self._deadline = time.monotonic() + GRACE * self._seconds
        yield
        self.beat()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(self._poll):
            now = time.monotonic()
            stood_still = now - last - self._poll
            if stood_still > self._seconds / 2:
                self._deadline += stood_still
            last = now
            left = self._deadline - now
            if left < 0:
                self._end()
            # By a thread of C, should this one not get Python's lock any more: a limit later, so
            # that a beat which this one has not seen yet is no reason.
            later = left + self._seconds
            faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _end(self) -> None:
        """No logging: the thread that hangs may hold its lock."""
        limit = GRACE * self._seconds if self._doing != "a step" else self._seconds
        text = (
            f"{time.strftime('%F %T %z')}: process {os.getpid()}: no end of {self._doing} for "
            f"{limit / 60:g} minutes (--watchdog-minutes {self._seconds / 60:g}); exit code "
            f"{EXIT_CODE}, stacks in {self._path}\n"
        )
        os.write(2, text.encode())
        os.write(self._file.fileno(), text.encode())
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file, all_threads=True)
        os.fsync(self._file.fileno())
        os._exit(EXIT_CODE)
