"""Ends a process in which no step gets done: the stacks of its threads on disk, an exit code.

A rank that is stuck has the others wait in a collective; each of them has a watchdog of its own, so
that all end within one limit, each with its stacks. Only the standard library is imported here.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

EXIT_CODE = 76
INIT_MINUTES = 5.0  # nodes that read Python's packages from a cold file system differ by one or two
WATCHDOG_MINUTES = 10.0  # as long as NCCL waits for a collective, unless told otherwise
GRACE = 5  # limits that a start, a first step, a save or an evaluation may take


class MissingRanks(TimeoutError):
    """Ranks of a run have not come within the limit of time; its exit code is EXIT_CODE too."""


class Watchdog:
    """From `with` to its end `beat` is called at least every `seconds`, or the process ends.

    Then every thread's stack is in `path`, and the exit code is EXIT_CODE; where a thread that
    keeps Python's lock hangs, it is faulthandler's 1, a limit later. seconds: inf for none of this.
    A machine whose steps are slow has GRACE times its fastest step where that is longer.
    An error that leaves the `with` has its traceback written to `path` as well, since a rank that
    dies shows as an error of the others' collectives. A process that was stopped as a whole, and
    goes on, is given its time again: by SIGTSTP (Ctrl-Z, Slurm's suspend) for any time, by SIGSTOP
    alone for less than a limit.
    path: None for standard error, where there is no run's directory yet. flag: of the command line,
    that sets `seconds` in minutes.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        seconds: float,
        doing: str = "the first step",
        flag: str = "--watchdog-minutes",
    ) -> None:
        self._path, self._seconds, self._doing, self._flag = path, seconds, doing, flag
        self._poll = min(seconds / 20, 5.0)
        self._fastest = math.inf  # step, in seconds
        self._give(GRACE * seconds)
        self._stopped, self._arming = threading.Event(), threading.RLock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _give(self, seconds: float) -> None:
        """Begin something that may take so long."""
        self._began, self._limit = time.monotonic(), seconds
        self._deadline = self._began + seconds

    def __enter__(self) -> Watchdog:
        if math.isfinite(self._seconds):
            if self._path is None:
                self._file = os.fdopen(os.dup(2), "a")
            else:
                # Made by the first rank; another node's cache of directories may not have it yet.
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.unlink(missing_ok=True)
                self._file = self._path.open("a")
            self._give(GRACE * self._seconds)
            is_main = threading.current_thread() is threading.main_thread()
            self._stops = is_main and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
            if self._stops:
                signal.signal(signal.SIGTSTP, self._on_stop)
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
        if self._stops:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if isinstance(error, RuntimeError) and self._path is not None:
            self._file.writelines(traceback.format_exception(kind, error, trace))
        self._file.flush()
        is_empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if self._path is not None and is_empty:
            self._path.unlink(missing_ok=True)  # the whole directory may have gone

    def beat(self) -> None:
        """Note that a step is done, and begin the next."""
        self._fastest = min(self._fastest, time.monotonic() - self._began)
        self._begin_step()

    def _begin_step(self) -> None:
        self._doing = "a step"
        fastest = self._fastest if math.isfinite(self._fastest) else 0.0
        self._give(max(self._seconds, GRACE * fastest))

    @contextmanager
    def allow_longer(self, doing: str) -> Iterator[None]:
        """Let what is done inside take GRACE limits."""
        self._doing = doing
        self._give(GRACE * self._seconds)
        yield
        self._begin_step()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        """Stop with no timer armed: faulthandler's would end the process once it goes on."""
        with self._arming:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)

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
            with self._arming:
                faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _end(self) -> None:
        """No logging: the thread that hangs may hold its lock."""
        where = "standard error" if self._path is None else self._path
        text = (
            f"{time.strftime('%F %T %z')}: rank {os.environ.get('RANK', '0')}, process "
            f"{os.getpid()}: no end of {self._doing} for {self._limit / 60:g} minutes "
            f"({self._flag} {self._seconds / 60:g}; inf: no limit); exit code {EXIT_CODE}, stacks "
            f"in {where}\n"
        )
        os.write(2, text.encode())
        if self._path is not None:
            os.write(self._file.fileno(), text.encode())
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file, all_threads=True)
        if self._path is not None:
            os.fsync(self._file.fileno())
        os._exit(EXIT_CODE)
