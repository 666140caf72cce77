"""The threads that read from object storage, for the shards of all data sets of a run together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from m3i_fast.pipelines.storage.requests import DaemonPool
from m3i_fast.pipelines.threads import Cores

_Result = TypeVar("_Result")


class ReadPool:
    """A bounded number of threads, which start with the first read and after `stop` again.

    cores: that they run on; None: where the system puts them.
    """

    def __init__(self, reads_in_flight: int, cores: Cores | None = None) -> None:
        self._reads_in_flight, self._cores = reads_in_flight, cores
        self._threads: DaemonPool | None = None

    def submit(self, read: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
        """Have a read done in its turn."""
        if self._threads is None:
            self._threads = DaemonPool(self._reads_in_flight, "m3i-fetch", self._cores)
        return self._threads.submit(read, *arguments)

    def stop(self) -> None:
        """Cancel what has not begun, and let the threads end with what they are at."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.close()
