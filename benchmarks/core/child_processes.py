"""Processes for long work that end when the one that started them has ended."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread


def child_processes(count: int) -> Executor:
    """Return a pool of so many processes, which inherit nothing of this one's state.

    Where this one is killed they stop at once, so that nobody goes on writing what its next start
    goes on from. Where one of them is killed, all that was given to the executor fails.
    """
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
