"""Requests in flight, each of which can be given up at any moment: by its reader, or at exit."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from m3i_fast.pipelines.threads import Cores, begin_thread

_Result = TypeVar("_Result")
_LOOP_THREAD = "m3i-requests"
_END_S = 1.0  # the interpreter's end waits so long for requests that were given up


class Stop(threading.Event):
    """An event that, once it is set, gives up the requests that were made with it."""

    def __init__(self) -> None:
        super().__init__()
        self._in_flight: set[Future[Any]] = set()
        self._in_flight_lock = threading.Lock()

    def set(self) -> None:
        """Give up the requests in flight and all later ones."""
        super().set()
        with self._in_flight_lock:
            requests = list(self._in_flight)
        for request in requests:
            request.cancel()

    def run(self, request: Callable[[], Coroutine[Any, Any, _Result]]) -> _Result:
        """Make a request and wait for its answer.

        Raises what the request raises, concurrent.futures.CancelledError where it is given up, and
        ForkedError.
        """
        if self.is_set():
            raise CancelledError
        future = _LOOP.start(request)
        with self._in_flight_lock:
            self._in_flight.add(future)
        try:
            if self.is_set():
                future.cancel()
            return future.result()
        finally:
            future.cancel()  # where Ctrl-C ends the wait; of no effect on a request that is done
            with self._in_flight_lock:
                self._in_flight.discard(future)


class ForkedError(RuntimeError):
    """A process that was forked after the first request cannot make one."""


@contextmanager
def request_pool(num_threads: int, name: str) -> Iterator[tuple[ThreadPoolExecutor, Stop]]:
    """Yield threads, and what their requests are to be made with.

    An error in the block gives the requests up, as Ctrl-C does, rather than wait for them.
    """
    pool, stop = ThreadPoolExecutor(num_threads, name), Stop()
    try:
        yield pool, stop
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class DaemonPool:
    """Threads that make calls in their order, and for which the interpreter's end does not wait.

    A ThreadPoolExecutor is joined before anything can tell its threads to stop. name, cores: as
    `start_pool` takes them.
    """

    def __init__(self, num_threads: int, name: str, cores: Cores | None = None) -> None:
        self._num_threads, self._name, self._cores = num_threads, name, cores
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._futures: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Return the future result of a call; the first calls start a thread each."""
        future: Future[_Result] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        self._calls.put(call)
        if len(self._threads) < self._num_threads:
            name = f"{self._name}-{len(self._threads)}"
            thread = threading.Thread(
                target=_make_calls,
                args=(self._calls, self._name, self._cores),
                name=name,
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()
        return future

    def close(self) -> None:
        """Cancel the calls that have not begun; the threads end after those that have."""
        for future in list(self._futures):
            future.cancel()
        for _ in self._threads:
            self._calls.put(None)

    def __del__(self) -> None:
        self.close()


def _make_calls(
    calls: SimpleQueue[Callable[[], None] | None], name: str, cores: Cores | None
) -> None:
    begin_thread(name, cores)
    while (call := calls.get()) is not None:
        call()
        del call  # with what it refers to, while the thread waits for the next one


class _Loop:
    """An event loop in a thread, which is started with the first request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0  # that the loop is in
        self._has_ended = False

    def start(self, request: Callable[[], Coroutine[Any, Any, _Result]]) -> Future[_Result]:
        if self._loop is not None and self._process != os.getpid():
            # Its thread is not here, nor are those of obstore, which cannot be started again.
            raise ForkedError(
                f"process {os.getpid()} was forked by {self._process}, which had read from object "
                "storage: start it by multiprocessing's spawn or forkserver instead"
            )
        with self._lock:
            if self._has_ended:
                given_up: Future[_Result] = Future()
                given_up.cancel()
                return given_up
            if self._loop is None:
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                thread = threading.Thread(
                    target=_run_loop, args=(self._loop,), name=_LOOP_THREAD, daemon=True
                )
                thread.start()
                atexit.register(self._end, self._loop, thread)
        return asyncio.run_coroutine_threadsafe(request(), self._loop)

    def _end(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """Give up all requests, so that no thread returns from one into a dying interpreter."""

        async def give_up() -> None:
            requests = asyncio.all_tasks() - {asyncio.current_task()}
            for request in requests:
                request.cancel()
            await asyncio.gather(*requests, return_exceptions=True)
            loop.stop()

        if self._process != os.getpid():
            return
        with self._lock:
            self._has_ended = True
        asyncio.run_coroutine_threadsafe(give_up(), loop)
        thread.join(_END_S)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    begin_thread(_LOOP_THREAD, None)
    loop.run_forever()


_LOOP = _Loop()
