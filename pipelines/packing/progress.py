"""The bar of a pack: pictures done, images/s, time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Pictures a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


class Advance(Protocol):
    def __call__(self, number: int, /) -> None: ...


@contextmanager
def bar(console: Console, doing: str, total: int, done: int) -> Iterator[Advance]:
    """Show a bar; what is yielded advances it. done: pictures of an earlier start."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as progress:
        task = progress.add_task(doing, total=total, completed=done)
        yield lambda number: progress.advance(task, number)
