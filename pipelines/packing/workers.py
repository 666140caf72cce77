"""Tasks run here, by processes of this machine, or by Ray; their records come as they finish."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol, TypeVar

from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.progress import Advance

IN_FLIGHT = 2  # tasks a process, so that none waits for its next; each holds its pictures' list
POLL_S = 0.2  # between two looks at what the processes have done


class Task(Protocol):
    """Work on some pictures of a source, alike in any process."""

    @property
    def items(self) -> tuple[Any, ...]:
        """Return the pictures."""

    def run(self, advance: Advance, /) -> Any:
        """Do the work; `advance` is told the pictures that are done."""


AnyTask = TypeVar("AnyTask", bound=Task)


class Run(Protocol):
    """Runs tasks, and yields each with what its `run` returned as they finish."""

    def __call__(
        self, tasks: Sequence[AnyTask], advance: Advance, /
    ) -> Iterator[tuple[AnyTask, Any]]: ...


def run_here(tasks: Sequence[AnyTask], advance: Advance) -> Iterator[tuple[AnyTask, Any]]:
    """Run tasks one after the other in this process."""
    for task in tasks:
        yield task, task.run(advance)


def with_processes(number: int) -> Run:
    """Return a function that runs tasks in as many processes."""

    def run_in_processes(
        tasks: Sequence[AnyTask], advance: Advance
    ) -> Iterator[tuple[AnyTask, Any]]:
        if not tasks:
            return
        context = multiprocessing.get_context("forkserver")
        # Imported once, not in each process; the tokenizer's package takes seconds.
        context.set_forkserver_preload([__name__, "open_clip.tokenizer"])
        counter = context.Value("q", 0)
        seen = 0
        pool = ProcessPoolExecutor(
            number, mp_context=context, initializer=_start, initargs=(counter, dict(os.environ))
        )
        try:
            waiting = iter(tasks)
            task_of: dict[Future[Any], AnyTask] = {}
            while True:
                for task in islice(waiting, IN_FLIGHT * number - len(task_of)):
                    task_of[pool.submit(_run_counted, task)] = task
                if not task_of:
                    return
                done, _ = wait(task_of, timeout=POLL_S, return_when=FIRST_COMPLETED)
                advance(counter.value - seen)
                seen = counter.value
                for future in done:
                    yield task_of.pop(future), future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a process of the pack was ended from outside, as the system does where memory is "
                "short; start again with fewer --workers: it goes on where it was"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return run_in_processes


_counter: Any = None  # of this process


def _start(counter: Any, environment: dict[str, str]) -> None:
    """Prepare a process, which counts pictures, as `follow_parent`."""
    global _counter
    _counter = counter
    follow_parent(environment)


def follow_parent(environment: dict[str, str]) -> None:
    """Give this process its parent's variables, and have it end when the parent does.

    The server that forks it has those of its own start, before a program set a bucket's.
    """
    os.environ.update(environment)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _run_counted(task: Task) -> Any:
    def advance(number: int) -> None:
        with _counter.get_lock():
            _counter.value += number

    return task.run(advance)


def _run_alone(task: Task) -> Any:
    return task.run(lambda number: None)


def with_ray(address: str) -> Run:
    """Return a function that runs each task as a task of a Ray cluster; "local" starts one here.

    SOURCE, and DIR where that is no URL, have to be folders that all nodes see by the same name.
    """

    def run_in_ray(tasks: Sequence[AnyTask], advance: Advance) -> Iterator[tuple[AnyTask, Any]]:
        if not tasks:
            return
        ray = require("ray", extra="ray")
        ray.init(address=address, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=1, max_retries=3)(_run_alone)
            waiting = iter(tasks)
            task_of: dict[Any, AnyTask] = {}
            while True:
                # More than there are processors: a cluster that grows does so by what waits.
                number = max(int(ray.cluster_resources().get("CPU", 1)), 1)
                for task in islice(waiting, max(IN_FLIGHT * number - len(task_of), 0)):
                    task_of[remote.remote(task)] = task
                if not task_of:
                    return
                done, _ = ray.wait(list(task_of), num_returns=1)
                for reference in done:
                    task = task_of.pop(reference)
                    record = ray.get(reference)
                    advance(len(task.items))
                    yield task, record
        finally:
            ray.shutdown()

    return run_in_ray
