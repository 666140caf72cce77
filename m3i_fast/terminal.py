"""Consoles that show text as it is: paths, names and errors may hold what rich takes for markup.

rich reads [b] as a style, [/b] as its end and :bug: as a picture. Nothing is read so here, and what
has a style is a `rich.text.Text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Update(Protocol):
    """Moves a bar on; what is None stays as it is."""

    def __call__(
        self,
        advance: int = 0,
        *,
        completed: int | None = None,
        total: int | None = None,
        doing: str | None = None,
    ) -> None: ...


def make_console(*, stderr: bool = False) -> Console:
    """Make a console on standard output or standard error."""
    return Console(stderr=stderr, markup=False, emoji=False)


@contextmanager
def progress_bar(
    doing: str, total: int | None, *, console: Console, in_bytes: bool = False
) -> Iterator[Update]:
    """Draw a bar with the time left, which is gone at the end; yield what moves it.

    total: of items, or of bytes with `in_bytes`; None where it is not known yet.
    """
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(doing, total=total)

        def update(
            advance: int = 0,
            *,
            completed: int | None = None,
            total: int | None = None,
            doing: str | None = None,
        ) -> None:
            step = None if completed is not None else advance
            progress.update(task, advance=step, completed=completed, total=total, description=doing)

        yield update
