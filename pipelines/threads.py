"""Pools of threads of the loader, by a name that tools of the system show."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path


def start_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool of threads that Python and the system call by this name.

    name: at most 15 bytes, which is what Linux keeps. Threads of C++ that they start inherit it.
    """
    assert len(name.encode()) <= 15, name
    return ThreadPoolExecutor(num_threads, name, initializer=_begin, initargs=(name,))


def _begin(name: str) -> None:
    """Tell Linux the name of this thread, which Python does by itself from 3.14 on."""
    with suppress(OSError):  # another system, or one whose /proc is not to be written
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
