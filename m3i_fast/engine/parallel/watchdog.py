"""Watchdog: ends a process that completes no step, with its stacks on disk and an exit code.

A rank that hangs makes the others wait in a collective. Each rank has a watchdog of its own, so
that all of them end within one limit, each with its stacks and the rank that hangs. This module
imports the standard library alone.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_CODE = 76
LOST_PEER = os.EX_UNAVAILABLE
"""Exit code, 69, of a rank whose peer ended while they talked."""
# What gloo, NCCL and TCP say of it.
_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "ncclremoteerror",
    "remote process exit",
)
INIT_MINUTES = 5.0  # nodes that read Python's packages from a cold file system differ by one or two
WATCHDOG_MINUTES = 10.0
A_STEP = "a step"
GRACE = 5  # number of limits that a start, a first step, a save or an evaluation may take


class MissingRanks(TimeoutError):
    """Error for ranks that did not join within the time limit; its exit code is EXIT_CODE."""


def end_at_once(code: int) -> NoReturn:
    """End this process of a world after an error that has been told.

    Leaving the world would wait over NCCL for ranks that wait for this one. What started the ranks
    sees the exit code and ends them.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # of a pipe that nobody reads any more
            stream.flush()
    os._exit(code)


def lost_a_peer(error: BaseException) -> bool:
    """Return whether a collective says that another rank has ended, or its node was lost."""
    return any(words in str(error).lower() for words in _OF_A_LOST_PEER)


def in_a_world() -> bool:
    """Return whether this process has joined others; imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def describe_ranks(ranks: Sequence[int], size: int) -> str:
    """Return the numbers of some of a world's ranks, at most 20 of them."""
    names = ", ".join(map(str, ranks[:20])) + (", ..." if len(ranks) > 20 else "")
    what = "rank" if len(ranks) == 1 else f"{len(ranks)} ranks:"
    return f"{what} {names} (of 0 to {size - 1})"


def _hanging_ranks(seconds: float) -> str:
    """Return a sentence that names the ranks that hang, the same on all ranks.

    Each rank that reaches its limit stores how many collectives it has started. Once all have, or
    after `seconds`, the first rank to see it compares them. A rank without a number is stopped or
    holds Python's lock; else the others wait for the rank with the fewest collectives.
    """
    c10d = sys.modules["torch.distributed"].distributed_c10d
    # A connection for this thread: the one that hangs may hold the lock of the default store's.
    store, size = c10d._get_default_store().clone(), c10d.get_world_size()
    started = sum(group._get_sequence_number_for_group() for group in c10d._world.pg_map)
    store.set(f"hang/{c10d.get_rank()}", str(started))
    store.add("hang/count", 1)
    ends = time.monotonic() + seconds
    while not store.check(["hang/text"]):
        if store.add("hang/count", 0) == size or time.monotonic() > ends:
            known = [rank for rank in range(size) if store.check([f"hang/{rank}"])]
            counts = {rank: int(store.get(f"hang/{rank}")) for rank in known}
            fewest, most = min(counts.values()), max(counts.values())
            if silent := sorted(set(range(size)).difference(known)):
                text = (
                    f"hanging: {describe_ranks(silent, size)}; no answer of the watchdog there: "
                    "stopped, in Python's lock, or with a longer limit"
                )
            elif fewest < most:
                behind = [rank for rank in known if counts[rank] == fewest]
                text = (
                    f"hanging: {describe_ranks(behind, size)}; {fewest:,} collectives started "
                    f"there, {most:,} by others"
                )
            else:
                text = f"no rank hangs alone: all have started the same {most:,} collectives"
            store.set("hang/text", text)
        time.sleep(0.1)
    return str(store.get("hang/text").decode())


class Watchdog:
    """Context in which `beat` must be called at least every `seconds`, or the process ends.

    The stacks of all threads are then in `path` and the exit code is EXIT_CODE. The ranks of a
    world also name the ranks that hang, for which they wait at most half a limit. Where the hanging
    thread holds Python's lock, faulthandler ends the process one limit later, with exit code 1.
    seconds: inf for no watchdog. On a machine with slow steps the limit is GRACE times the fastest
    step, where that is longer.

    A RuntimeError that leaves the context has its traceback written to `path` as well, since a rank
    that dies shows as a failed collective on the others. A process that was stopped as a whole and
    then continued gets its time back: after SIGTSTP (Ctrl-Z, Slurm's suspend) any time, after
    SIGSTOP alone less than a limit.

    path: None for standard error, where there is no run directory yet. flag: the command-line flag
    that sets `seconds`, in minutes. clock: seconds. pause: waits for an event for so many of them.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        seconds: float,
        doing: str = "the first step",
        flag: str = "--watchdog-minutes",
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._path, self._seconds, self._doing, self._flag = path, seconds, doing, flag
        self._clock, self._pause = clock, pause
        self._poll = min(seconds / 20, 5.0)
        self._fastest = math.inf  # step, in seconds
        self._give(GRACE * seconds)
        self._stopped, self._arming = threading.Event(), threading.RLock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _give(self, seconds: float) -> None:
        """Start the clock of an activity that may take so many seconds."""
        self._began, self._limit = self._clock(), seconds
        self._deadline = self._began + seconds

    def __enter__(self) -> Watchdog:
        """Start the thread that watches the clock."""
        if math.isfinite(self._seconds):
            if self._path is None:
                self._file = os.fdopen(os.dup(2), "a")
            else:
                # The first rank makes it; another node's directory cache may not show it yet.
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
        """Stop the thread, and remove the file of stacks if nothing was written."""
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

    @property
    def doing(self) -> str:
        """Return what the process does now: A_STEP, or what may take longer."""
        return self._doing

    def beat(self) -> None:
        """Record that a step is complete, and start the clock of the next one."""
        self._fastest = min(self._fastest, self._clock() - self._began)
        self._begin_step()

    def renew(self) -> None:
        """Record that a part of the activity is complete, and give the next part the same time."""
        self._give(self._limit)

    def _begin_step(self) -> None:
        self._doing = A_STEP
        fastest = self._fastest if math.isfinite(self._fastest) else 0.0
        self._give(max(self._seconds, GRACE * fastest))

    @contextmanager
    def allow_longer(self, doing: str) -> Iterator[None]:
        """Allow the enclosed activity GRACE limits."""
        self._doing = doing
        self._give(GRACE * self._seconds)
        yield
        self._begin_step()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        """Stop the process with no timer armed: faulthandler's would end it once it continues."""
        with self._arming:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)

    def _watch(self) -> None:
        last = self._clock()
        while not self._pause(self._stopped, self._poll):
            now = self._clock()
            suspended_s = now - last - self._poll
            if suspended_s > self._seconds / 2:
                self._deadline += suspended_s
            last = now
            left = self._deadline - now
            if left < 0:
                self._end()
            # faulthandler's C thread needs no lock of Python's, in case this thread never gets it
            # again. It fires a limit later, in case a beat came that this thread has not seen yet.
            later = left + self._seconds
            with self._arming:
                faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def _end(self) -> None:
        """Write the stacks and exit, without logging: the thread that hangs may hold its lock."""
        where = "standard error" if self._path is None else self._path
        text = (
            f"{time.strftime('%F %T %z')}: rank {os.environ.get('RANK', '0')}, process "
            f"{os.getpid()}: no end of {self._doing} for {self._limit / 60:g} minutes "
            f"({self._flag} {self._seconds / 60:g}; inf: no limit); exit code {EXIT_CODE}, stacks "
            f"in {where}"
        )
        self._write(text)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file, all_threads=True)
        if in_a_world():
            # In a thread, since the store does not answer where its host is what hangs.
            wait = max(self._seconds / 2, 5.0)
            faulthandler.dump_traceback_later(wait + 10, exit=True, file=self._file)
            try:
                named = ThreadPoolExecutor(1).submit(_hanging_ranks, wait).result(wait + 2)
            except Exception as error:
                named = f"hanging: not known, the ranks' store does not answer ({error!r})"
            self._write(named)
            time.sleep(1)  # the others read it from a store that this process may host
        if self._path is not None:
            os.fsync(self._file.fileno())
        os._exit(EXIT_CODE)

    def _write(self, line: str) -> None:
        """Write a line to standard error and to the file of stacks."""
        os.write(2, f"{line}\n".encode())
        if self._path is not None:
            os.write(self._file.fileno(), f"{line}\n".encode())
